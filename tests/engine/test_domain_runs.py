"""Domain structural mapping from a teacher to an exported student."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForMaskedLM

from dsdistill.config import UserError
from dsdistill.config.load import make_config
from dsdistill.data import evaluation_batches
from dsdistill.data.batch import NO_LABEL
from dsdistill.engine.export import find_checkpoint, load_objective, read_config
from dsdistill.engine.prepare import prepare
from dsdistill.models.domain_fusion import load_exported
from dsdistill.models.trace import Trace
from tests.engine.launch import launch, run_configs
from tests.engine.test_resume import losses
from tests.engine.test_run import command


def write(folder, settings, name, **student):
    case = settings | {"run": settings["run"] | {"name": name, "dir": str(folder / name)}}
    case["student"] = case["student"] | student
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(case))
    return path


METRICS = ("semantic_alignment", "representation_compactness", "structural_consistency")


def test_ranks_stages_and_a_resume_change_nothing_and_the_student_needs_no_teacher(mapping, tmp_path):
    mapping["run"] |= {"save_every": 4}
    mapping["terms"] |= {"domain": {"decoder": 0.5}}
    still = mapping["student"] | {"config": mapping["student"]["config"] | {"hidden_dropout_prob": 0.0}}
    moved = mapping | {"train": mapping["train"] | {"micro_batch_size": 8}}
    one, stopped = (write(tmp_path, moved, name, **still) for name in ("one", "stopped"))
    run_configs([one, stopped], ranks=1)
    checkpoints = tmp_path / "stopped" / "checkpoints"
    (tmp_path / "stopped" / "summary.json").unlink()
    for path in (checkpoints / "step-00000010").iterdir():  # a kill during the save leaves this
        path.unlink()
    assert "resuming from step-00000008" in run_configs([stopped], ranks=1)
    expected = losses(tmp_path / "one")
    assert losses(tmp_path / "stopped") == expected
    assert expected[-1]["terms"]["domain"]["raw"] < expected[0]["terms"]["domain"]["raw"]

    sharded = write(
        tmp_path,
        mapping | {"train": mapping["train"] | {"micro_batch_size": 4}},
        "sharded",
        **still,
        zero_stage=3,
        gradient_checkpointing=True,
    )
    run_configs([sharded])
    for want, line in zip(expected, losses(tmp_path / "sharded"), strict=True):
        assert line["loss"] == pytest.approx(want["loss"], rel=1e-4)

    before = json.loads((tmp_path / "one" / "summary.json").read_text())["models"]["student"]
    done = command("evaluate", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "one" / "summary.json").read_text())["models"]["student"]
    assert scores["perplexity"] == pytest.approx(before["perplexity"], rel=1e-4)  # the fusion was loaded
    for name in METRICS:
        assert 0 <= scores[f"{name}_low"] <= scores[f"{name}_high"] <= 100
        assert 0 < scores[name] <= 100
    assert {"erank", "participation_ratio", "C", "R", "rho_token"} <= set(scores)
    assert scores["token_ms"] > 0 and scores["decoder_ms"] > 0

    done = command("export", "one", "--out", "exported", cwd=tmp_path)
    assert done.returncode == 0 and "load_exported" in done.stderr
    with pytest.raises((OSError, ValueError)):
        AutoModelForMaskedLM.from_pretrained(tmp_path / "exported")
    student = load_exported(str(tmp_path / "exported"))
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path / "exported" / "student").eval()
    ids = torch.tensor([[2, 7, 4, 3]])
    with torch.no_grad():
        assert not torch.allclose(student(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4)
    for name, accuracy in accuracies(tmp_path / "one", student).items():
        assert scores[f"{name}_accuracy"] == pytest.approx(accuracy)


def accuracies(run, student):
    """The share of the dev set's hidden tokens that are found, by the exported model and by the decoder's weights."""
    config = read_config(str(run))
    prepared, (objective,) = prepare(config, 1), prepare(config, 1).objectives
    objective.load_state_dict(load_objective(str(run), find_checkpoint(str(run))))
    term, right, count = objective.terms["domain"], {"token": 0, "decoder": 0}, 0
    for batch in evaluation_batches(prepared.data.dev, 4, 1, 0, prepared.tokenizer.pad_token_id):
        chosen = batch.labels != NO_LABEL
        with torch.no_grad():
            found = student(batch.input_ids, attention_mask=batch.mask.long(), output_hidden_states=True)
            states = term.decoded(Trace(hidden={2: found.hidden_states[-1]}), batch)
            logits = {"token": found.logits, "decoder": student.get_output_embeddings()(states)}
        count += int(chosen.sum())
        for name, values in logits.items():
            right[name] += int((values.argmax(-1) == batch.labels)[chosen].sum())
    return {name: hits / count for name, hits in right.items()}


def test_the_teacher_hands_over_anew_in_each_stage(mapping, tmp_path):
    """The teacher's share is 1 at a stage's first step and falls by the same amount at each step, to 0 at its end."""
    mapping |= {"evaluation": {}, "stages": [{"name": "short", "share": 1}, {"name": "long", "share": 3}]}
    mapping["train"] |= {"steps": 16, "micro_batch_size": 8}
    done = launch(Path(__file__).with_name("share_worker.py"), write(tmp_path, mapping, "run"), ranks=1)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    expected = [1 - step / 4 for step in range(4)] + [1 - step / 12 for step in range(12)]
    assert found["shares"] == pytest.approx(expected)
    # At a share of 1 all examples take the teacher's features, towards the end few do.
    assert found["taken"][0] == found["taken"][4] == 1 and sum(found["taken"][-3:]) / 3 < 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"domain": {"teacher_map": "trained"}}}, "student.domain.teacher_map: got trained"),
        ({"terms": {"domain": None}}, "student.domain: got no terms.domain"),
        ({"student": {"domain": None}}, "terms.domain: got no student.domain"),
        ({"data": {"general": None}}, "data.domain and data.general: got only one of them"),
    ],
    ids=["collapse", "no term", "no module", "one side"],
)
def test_refusals(mapping, changes, message):
    for section, values in changes.items():
        mapping[section] = mapping[section] | values
    with pytest.raises(UserError, match=message):
        make_config(mapping)
