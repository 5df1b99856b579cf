"""Distil families of models, up to a student that plain transformers reloads, on two ranks under ZeRO-3.

A dozen run always; `python -m pytest -m families tests/models` runs all, and every model type of transformers through
the trial of a small copy, and prints the tables that dsdistill/models/README.md holds.
"""

import json
import math
from dataclasses import dataclass

import pytest
import torch
import yaml
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from dsdistill.config import UserError, load
from dsdistill.data import evaluation_batches, load_data
from dsdistill.data.batch import NO_LABEL
from dsdistill.engine.export import export
from dsdistill.engine.resolve import words_of
from dsdistill.models.build import architecture, load_tokenizer
from dsdistill.models.probe import probe
from tests.engine.launch import launch
from tests.models import tiny
from tests.models.conftest import tell
from tests.models.families import peaked

WORKER = __file__.replace("test_families", "family_worker")
TASKS = dict.fromkeys(tiny.MASKED, "masked_lm") | dict.fromkeys((*tiny.CAUSAL, *tiny.COMPOSITES), "causal_lm")
CLASSES = {"masked_lm": AutoModelForMaskedLM, "causal_lm": AutoModelForCausalLM}


@dataclass
class Trained:
    """Trained holds the result of one family."""

    verdict: str  # done, or the line of its refusal
    terms: list[str]
    refused: list[str]  # terms that it lacks, with the reason
    folder: object
    config: object


def plain(family: str, folder=None, **options) -> PreTrainedModel:
    """Return the teacher of a family in plain transformers, or what a folder holds."""
    kind = CLASSES[TASKS[family]]
    # A type without a class for text alone: its export is a Mistral.
    if family == "mistral3" and (folder is None or AutoConfig.from_pretrained(folder).model_type == family):
        kind = AutoModelForImageTextToText
    if folder is not None:
        return kind.from_pretrained(folder, **options).float().eval()
    settings = {**tiny.MASKED, **tiny.CAUSAL, **tiny.COMPOSITES}[family]
    torch.manual_seed(3)
    return peaked(kind.from_config(AutoConfig.for_model(family, **settings)), 4.0).eval()


def able(family: str, folder) -> tuple[dict, list[str]]:
    """Return the terms that make sense for a family, and why the others do not."""
    config, task, refused = architecture(str(folder), None, "teacher"), TASKS[family], []
    terms: dict = {"task": {}, "soft_label": {}}
    for needs, added in (
        ({"hidden": True}, {"hidden": {}, "pairwise": {"layers": "uniform"}}),
        ({"attention": True}, {"attention": {}}),
        ({"lens": True}, {"fdd": {}} if task == "causal_lm" else {}),
    ):
        try:
            probe(config, task, "teacher", **{"attention": False, "hidden": False, **needs})
            terms |= added
        except UserError as error:
            refused.append(
                f"{next(iter(needs))}: {str(error).partition('got ')[2].partition(', expected')[0]}"
            )
    return terms, refused


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory, tokenizer_dir, data_dir) -> dict[str, Trained]:
    """Train all families that this session asks for, for three steps, with one set of ranks."""
    wanted = [
        item.callspec.params["family"]
        for item in request.session.items
        if getattr(item, "callspec", None)
        and "family" in item.callspec.params
        and item.module is request.module
    ]
    home, found = tmp_path_factory.mktemp("families"), {}
    for family in dict.fromkeys(wanted):
        folder = home / family
        plain(family).save_pretrained(folder / "teacher")
        AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder / "teacher")
        terms, refused = able(family, folder / "teacher")
        settings = {
            "task": TASKS[family],
            "run": {"name": family, "dir": str(folder / "run"), "log_every": 1},
            "data": {
                "source": "files",
                "train": str(data_dir / "train.txt"),
                "dev": str(data_dir / "dev.txt"),
                "max_length": 24,
                "max_dev": 8,
                "cache": str(folder / "cache"),
            },
            "teacher": {"path": str(folder / "teacher"), "zero_stage": 3},
            "student": {
                "from_teacher": list(tiny.CUT[family]),
                "config": tiny.CONFIG.get(family),
                "zero_stage": 3,
            },
            "terms": terms,
            "train": {"steps": 3, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3},
        }
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump(settings))
        found[family] = Trained("", list(terms), refused, folder, path)
    done = launch(WORKER, *(one.config for one in found.values()), ranks=2, timeout=3000)
    for one in found.values():
        verdict = one.config.with_suffix(".verdict")
        assert verdict.exists(), done.stdout[-2000:] + done.stderr[-6000:]
        one.verdict = verdict.read_text()
    return found


def marked(families) -> list:
    return [
        pytest.param(name, marks=() if name in tiny.ALWAYS else pytest.mark.families) for name in families
    ]


@pytest.mark.parametrize("family", marked(TASKS))
def test_from_a_teacher_to_the_reloaded_student(trained, family):
    """The run's scores must be those of its exported student in plain transformers under eager attention."""
    one = trained[family]
    teacher = one.folder / "teacher"
    difference = _difference(family, teacher)
    tell("families", family, ", ".join(one.terms), f"{difference:.1e}", "; ".join(one.refused) or one.verdict)
    assert one.verdict == "done" and difference < 1e-4
    out = one.folder / "exported"
    export(str(one.folder / "run"), str(out))
    summary = json.loads((one.folder / "run" / "summary.json").read_text())["models"]
    for name, folder in (("teacher", teacher), ("student", out)):
        expected = _perplexity(family, folder, one.config)
        assert summary[name]["perplexity"] == pytest.approx(expected, rel=1e-4), name
    lines = [json.loads(line) for line in (one.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["terms"] for line in lines if "terms" in line]
    assert losses and all(math.isfinite(term["raw"]) for step in losses for term in step.values())


def _difference(family: str, folder) -> float:
    """Return the largest difference of the teacher's logits from the eager ones, relative to the largest logit."""
    ids = torch.arange(2 * 20).reshape(2, 20) % 38 + 2
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    with torch.no_grad():
        ours, truth = (
            plain(family, folder, attn_implementation=name)(input_ids=ids, attention_mask=mask).logits
            for name in (None, "eager")
        )
    valid = mask.bool()
    return float((ours - truth)[valid].abs().max() / truth[valid].abs().max())


def _perplexity(family: str, folder, config) -> float:
    """Return the perplexity by plain transformers, from logits."""
    config = load([str(config)])
    tokenizer = load_tokenizer(str(folder), "tokenizer")
    dev = load_data(config.data, config.task, words_of(tokenizer)).dev
    model = plain(family, folder, attn_implementation="eager")
    total, count = 0.0, 0
    for batch in evaluation_batches(dev, 4, 1, 0, tokenizer.pad_token_id):
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.mask.long()).logits.double()
        labels = batch.labels
        if TASKS[family] == "causal_lm":
            logits, labels = logits[:, :-1], labels[:, 1:].masked_fill(~batch.mask[:, 1:], NO_LABEL)
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=NO_LABEL, reduction="none"
        )
        total, count = total + losses.sum().item(), count + int((labels != NO_LABEL).sum())
    return math.exp(total / count)


TYPES = sorted(
    {
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
)


@pytest.mark.families
@pytest.mark.parametrize("kind", TYPES)
def test_every_model_type_has_a_verdict(kind):
    """A small copy of its default config passes the trial, or is refused in one line."""
    assert kind in CONFIG_MAPPING
    for task, names in (
        ("causal_lm", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("masked_lm", MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        ("classification", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    ):
        if kind not in names:
            continue
        reads, reason = ["outputs"], ""
        for need in ("hidden", "attention"):
            try:
                config = architecture(None, {"model_type": kind}, "teacher")
                probe(config, task, "teacher", **{"attention": False, "hidden": False, need: True})
                reads.append(need)
            except UserError as error:
                assert "\n" not in str(error)
                reason = str(error).partition("got ")[2].partition(", expected")[0]
        if len(reads) == 1:
            try:
                probe(config, task, "teacher", attention=False, hidden=False)
            except (UserError, UnboundLocalError):
                reads = []
        tell("verdicts", kind, task, ", ".join(reads) or "refused", reason)
