"""Runs read their train set while they train: on one rank or two, stopped and resumed, with passes over the set."""

import json
import random
from pathlib import Path

import datasets
import pytest
import yaml

from dsdistill.config import load
from dsdistill.engine.preview import preview
from dsdistill.engine.tokenising import tokenize
from tests.conftest import sentence
from tests.data.test_streamed import local, write
from tests.engine.launch import launch

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": 0,
}


@pytest.fixture
def home(tmp_path) -> Path:
    rng = random.Random(0)
    write(tmp_path / "hub", "train", [sentence(rng, 9) for _ in range(200)], 3)
    write(tmp_path / "hub", "dev", [sentence(rng, 9) for _ in range(12)], 1)
    return tmp_path


def config(home: Path, tokenizer_dir: Path, name: str) -> Path:
    made = {
        "task": "causal_lm",
        "run": {"name": name, "dir": str(home / name), "log_every": 1, "save_every": 4, "keep": 9},
        "data": {
            "source": "some/set",
            "streaming": True,
            "max_length": 24,
            "tokenizer": str(tokenizer_dir),
            "cache": str(home / f"cache-{name}"),
        },
        "teacher": {"config": LLAMA | {"num_hidden_layers": 4}, "zero_stage": 0},
        "student": {"config": LLAMA | {"num_hidden_layers": 2}},
        "terms": {"task": {}, "soft_label": {}, "hidden": {"layers": "cka_offline"}},
        "train": {"batch_size": 8, "micro_batch_size": 4, "steps": 12, "learning_rate": 1e-3},
        "evaluation": {"structure": True},
    }
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def ran(home: Path, *configs: object, ranks: int) -> None:
    done = launch(Path(__file__).with_name("streamed_worker.py"), home / "hub", *configs, ranks=ranks)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def steps(folder: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(of["step"], of["tokens"], of["documents"], of["loss"]) for of in lines if "loss" in of]


def test_one_rank_two_ranks_and_a_resume_see_the_same(home, tokenizer_dir):
    one, two = (config(home, tokenizer_dir, name) for name in ("one", "two"))
    ran(home, one, ranks=1)
    ran(home, two, f"{two}@4", f"evaluate:{home / 'two'}", ranks=2)
    alone, both = steps(home / "one"), steps(home / "two")
    assert [of[:3] for of in alone] == [of[:3] for of in both] and len(alone) == 12
    for mine, other in zip(alone, both, strict=True):
        assert mine[3] == pytest.approx(other[3], rel=1e-3)
    student = json.loads((home / "two" / "summary.json").read_text())["models"]["student"]
    assert 0 <= student["structural_consistency"] <= 100  # on examples of the first part, read again
    for name in ("one", "two"):
        assert not list(home.glob(f"cache-{name}/stream-*/[0-9]*/"))  # only the notes are left
        assert len((next(home.glob(f"cache-{name}/stream-*/parts.jsonl"))).read_text().splitlines()) > 6


def test_commands_that_look_read_only_what_they_show(home, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", local(home / "hub"))
    loaded = load([str(config(home, tokenizer_dir, "looked"))])
    found = preview(loaded, 2)
    assert len(found.examples) == 2 and found.sets["train"]["examples"] > 2
    told = tokenize(loaded)
    assert "looked train: streamed; a run tokenises it as it goes on" in told
    assert "looked dev: 12 examples" in told
    assert not list(home.glob("cache-looked/stream-*/[0-9]*/"))
