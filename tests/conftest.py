"""Tiny real models, a tokenizer and labelled text that every test folder may use; no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
import sys
from pathlib import Path

import pytest
import torch
import yaml

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter, which must be chosen before anything imports them.
    os.environ.setdefault("TRITON_INTERPRET", "1")

WORDS = (
    "the a of tensor value shape list file node graph sum mean row column index returns raises given "
    "whether each first last open close read write sorted empty matrix vector batch token layer head"
).split()


def sentence(rng: random.Random, longest: int = 24) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, longest)))


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """Write a WordPiece tokenizer of a few dozen words; return its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate(special + WORDS)}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **dict(zip(names, special, strict=True)))
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Write train.tsv (37 rows: an uneven last batch at 8) and dev.tsv (11 rows), texts of 2 to 24 words, 3 classes."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    for name, rows in (("train", 37), ("dev", 11)):
        lines = ["text\tlabel\tscore"]
        lines += [f"{sentence(rng)}\t{'abc'[i % 3]}\t{rng.random():.3f}" for i in range(rows)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = "\n".join(sentence(rng) for _ in range(120))
    for name in ("train", "dev"):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


BERT = {
    "model_type": "bert",
    "vocab_size": 64,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory, tokenizer_dir) -> Path:
    """Write teacher/ (4 layers of 48) and student/ (2 layers of 32): classifiers of 3 classes with peaked attention."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("models")
    labels = {
        "num_labels": 3,
        "id2label": dict(enumerate("abc")),
        "label2id": {c: i for i, c in enumerate("abc")},
    }
    for seed, (name, changes) in enumerate(
        (("teacher", {}), ("student", {"hidden_size": 32, "num_hidden_layers": 2}))
    ):
        torch.manual_seed(seed)
        settings = BERT | changes | labels
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            # With initial weights all outputs are nearly uniform, which would hide errors.
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4.0)
            model.classifier.weight.mul_(8.0)
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder / name)
    return folder


@pytest.fixture
def settings(models_dir, data_dir, tmp_path) -> dict:
    """Return a whole config as plain settings: every term on, tiny models, 10 steps of 8 examples."""
    return small_run(models_dir, data_dir, tmp_path)


def small_run(models_dir: Path, data_dir: Path, folder: Path) -> dict:
    """Return what the fixture `settings` gives, for a folder of any scope."""
    return {
        "run": {"name": "test", "dir": str(folder / "run"), "log_every": 1},
        "data": {
            "source": "files",
            "train": str(data_dir / "train.tsv"),
            "dev": str(data_dir / "dev.tsv"),
            "max_length": 32,
            "cache": str(folder / "cache"),
        },
        "teacher": {"path": str(models_dir / "teacher"), "zero_stage": 3},
        "student": {"path": str(models_dir / "student"), "zero_stage": 2},
        "terms": {
            "task": {},
            "soft_label": {},
            "hidden": {},
            "attention": {},
            "pairwise": {"layers": "uniform"},
        },
        "train": {"epochs": 2, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3},
    }


def merge(settings: dict, changes: dict) -> dict:
    """Change settings by dotted key; None removes a key."""
    settings = yaml.safe_load(yaml.safe_dump(settings))
    for dotted, value in changes.items():
        *parents, key = dotted.split(".")
        section = settings
        for parent in parents:
            section = section.setdefault(parent, {})
        section[key] = value
        if value is None:
            del section[key]
    return settings


def snapshot(folder: Path) -> dict:
    """Return every path below a folder and its contents."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def kept(folder: Path) -> dict:
    """Return a snapshot without the cache, which keeps what is costly to make again."""
    return {path: held for path, held in snapshot(folder).items() if Path(path).parts[0] != "cache"}


@pytest.fixture
def config(settings, tmp_path):
    """Return a function that writes the tests' config with changes and returns its path."""

    def write(changes: dict | None = None, name: str = "config.yaml") -> str:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(merge(settings, changes or {})), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def terms_of_before():
    """Remove the terms that a test adds."""
    from dsdistill.alignment.terms import TERMS
    from dsdistill.config import schema
    from dsdistill.config.terms import Terms

    before, computed = dict(Terms.model_fields), dict(TERMS)
    yield
    for name in Terms.model_fields.keys() - before.keys():
        del Terms.model_fields[name], Terms.__annotations__[name]
    for name in TERMS.keys() - computed.keys():
        del TERMS[name]
    assert before == Terms.model_fields
    Terms.model_rebuild(force=True)
    schema.take_over_terms()


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Return a function that runs a command and returns its one line; it must change nothing and load no weight."""
    import dsdistill.engine.first_weights
    import dsdistill.engine.module
    import dsdistill.engine.teacher
    import dsdistill.models.build
    from dsdistill import cli

    def loads(*_, **__):
        pytest.fail("a model was built before the refusal")

    def refuse(*arguments: object) -> str:
        before, environment = kept(tmp_path), dict(os.environ)
        with monkeypatch.context() as patch:
            for module in (
                dsdistill.engine.first_weights,
                dsdistill.engine.module,
                dsdistill.engine.teacher,
                dsdistill.models.build,
            ):
                patch.setattr(module, "build_model", loads)
            patch.setattr(sys, "argv", ["dsdistill", *map(str, arguments)])
            patch.chdir(tmp_path)
            capsys.readouterr()
            try:
                code = cli.run()
            finally:
                os.environ.clear()  # the engine writes this process's rank there
                os.environ.update(environment)
        printed = capsys.readouterr()
        assert code == 2, printed.err
        lines = printed.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("dsdistill: "), printed.err
        assert ": got " in lines[0] and ", expected " in lines[0]
        assert kept(tmp_path) == before, "a refused command leaves nothing behind but what it tokenised"
        return lines[0].removeprefix("dsdistill: ")

    return refuse
