"""Runs over conversations and mixtures: packed or not, on one rank or two, stopped; also preview and tokenize."""

import json
import random
from pathlib import Path

import pytest
import yaml

from tests.conftest import WORDS, sentence
from tests.engine.launch import launch, run_configs

LLAMA = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
}
EVERY = {
    "task": {},
    "soft_label": {},
    "hidden": {"layers": "uniform"},
    "attention": {"layers": "uniform"},
    "pairwise": {"layers": "last"},
    "trajectory": {"word_layers": [[1, 2]], "phrase_layers": [[2, 4]]},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Write chats.jsonl (60 conversations of one or two questions), pairs.jsonl (40) and dev.jsonl (10)."""
    folder, rng = tmp_path_factory.mktemp("corpora"), random.Random(0)

    def conversation() -> dict:
        turns = [{"role": "system", "content": sentence(rng, 4)}] if rng.random() < 0.3 else []
        for _ in range(rng.randint(1, 2)):
            turns += [
                {"role": "user", "content": sentence(rng, 6)},
                {"role": "assistant", "content": sentence(rng, 8)},
            ]
        return {"messages": turns}

    def pair() -> dict:
        return {"question": sentence(rng, 6), "answer": rng.choice(WORDS)}

    for name, make, count in (("chats", conversation, 60), ("pairs", pair, 40), ("dev", conversation, 10)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(make()) + "\n" for _ in range(count)))
    return folder


def settings(home: Path, tmp_path: Path, name: str, **data) -> Path:
    """Write the config of a run of six steps; `data` adds to its section data."""
    made = {
        "task": "causal_lm",
        "run": {"name": name, "dir": str(tmp_path / name), "log_every": 1, "save_every": 3, "keep": 9},
        "data": {
            "source": "files",
            "root": str(home),
            "train": "chats.jsonl",
            "dev": "dev.jsonl",
            "messages": "messages",
            "label": None,
            "max_length": 96,
            "train_tokenizer": 400,
            "tokenizer_kind": "bytes",
            "cache": str(tmp_path / "cache"),
        }
        | data,
        "teacher": {"config": LLAMA | {"num_hidden_layers": 4}, "zero_stage": 0},
        "student": {"config": LLAMA | {"num_hidden_layers": 2}},
        "terms": EVERY,
        "train": {"batch_size": 4, "micro_batch_size": 2, "steps": 6, "learning_rate": 1e-3},
    }
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_packed_conversations_on_one_rank_and_two(home, tmp_path):
    """Losses do not depend on how ranks share the blocks, nor on a stop in the middle."""
    one = settings(home, tmp_path, "one", packing=True)
    two = settings(home, tmp_path, "two", packing=True)
    run_configs([one], ranks=1)
    run_configs([two], ranks=2)
    single, shared = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["loss"] for line in single] == pytest.approx([line["loss"] for line in shared], rel=1e-4)
    assert all(line["documents"] > 4 and line["tokens"] > 300 for line in single)
    assert [line["documents"] for line in single] == [line["documents"] for line in shared]
    run_configs([f"{one}@3"], ranks=1)
    assert [line["loss"] for line in lines(tmp_path / "one")] == [line["loss"] for line in single]


def test_a_mixture_tells_the_loss_of_each_source(home, tmp_path):
    parts = [
        {"train": "chats.jsonl", "weight": 1.0},
        {
            "train": "pairs.jsonl",
            "text": ["question", "answer"],
            "layout": "template",
            "weight": 3.0,
            "name": "quiz",
        },
    ]
    config = settings(home, tmp_path, "mixed", train=parts, packing=False)
    run_configs([config], ranks=2)
    logged = lines(tmp_path / "mixed")
    for line in logged:
        assert set(line["sources"]) == {"chats.jsonl", "quiz"}
        found = line["sources"].values()
        total = sum(of["loss"] * of["count"] for of in found if of["count"])
        whole = total / sum(of["count"] for of in found)
        assert whole == pytest.approx(line["terms"]["task"]["raw"], rel=1e-4)
    assert sum(line["documents"] for line in logged) == 24


def test_preview_shows_what_the_models_will_see(home, tmp_path):
    config = settings(home, tmp_path, "seen")
    target = tmp_path / "seen.json"
    done = launch("-m", "dsdistill", "preview", config, "-n", 2, "--json", target, ranks=1)
    assert done.returncode == 0, done.stderr
    assert "documents" in done.stdout and "filler" in done.stdout and "labelled" in done.stdout
    shown = json.loads(target.read_text())
    assert len(shown) == 2
    for example in shown:
        lengths = {len(example[name]) for name in ("input_ids", "labels", "mask", "position_ids", "segments")}
        assert len(lengths) == 1
        starts = [i for i, position in enumerate(example["position_ids"]) if position == 0]
        assert starts == [
            i for i, of in enumerate(example["segments"]) if i == 0 or of != example["segments"][i - 1]
        ]
        assert example["text"].startswith("<|im_start|>") and "assistant" in example["text"]
        labelled = [i for i, label in enumerate(example["labels"]) if label != -100]
        assert labelled and all(example["labels"][i] == example["input_ids"][i] for i in labelled)
    done = launch("-m", "dsdistill", "preview", config, "-n", 1, "--ids", ranks=1)
    assert done.returncode == 0 and " ".join(map(str, shown[0]["input_ids"])) in done.stdout


def test_bad_rows_are_counted_and_named_and_a_run_refuses_the_first(home, tmp_path):
    (tmp_path / "bad.jsonl").write_text(
        (home / "chats.jsonl").read_text() + 'not json\n{"messages": []}\n{"messages": [{"role": "user"}]}\n'
    )
    config = settings(home, tmp_path, "bad", train=str(tmp_path / "bad.jsonl"))
    done = launch("-m", "dsdistill", "preview", config, "-n", 0, ranks=1)
    assert done.returncode == 0 and "3 rows cannot be used" in done.stdout
    assert [f"bad.jsonl, line {line}" in done.stdout for line in (61, 62, 63)] == [True] * 3
    done = launch("-m", "dsdistill", "train", config, ranks=1)
    assert done.returncode == 2 and "bad.jsonl, line 6" in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_rows_of_a_labelled_set_are_counted_and_named(tokenizer_dir, tmp_path):
    (tmp_path / "rows.tsv").write_text("text\tlabel\nthe sum\ta\nof each\tb\n \tb\nlast\t-\nragged\nrow\tb\n")
    config = {
        "data": {"source": "files", "root": str(tmp_path), "train": "rows.tsv", "dev": "rows.tsv"}
        | {"tokenizer": str(tokenizer_dir), "cache": str(tmp_path / "cache"), "max_length": 16},
        "student": {
            "config": {"model_type": "bert", "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2}
        },
        "terms": {"task": {}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = launch("-m", "dsdistill", "preview", tmp_path / "config.yaml", "-n", 1, ranks=1)
    assert done.returncode == 0, done.stderr
    assert "train: 3 examples" in done.stdout and "label: a" in done.stdout
    assert "3 rows cannot be used" in done.stdout
    assert [f"rows.tsv, line {line}: got " in done.stdout for line in (4, 5, 6)] == [True] * 3


def test_tokenize_fills_what_train_reads(home, tmp_path):
    config = settings(home, tmp_path, "filled")
    done = launch("-m", "dsdistill", "tokenize", config, ranks=1)
    assert done.returncode == 0 and "filled train: " in done.stdout, done.stderr
    stores = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("tokens-*/store.json")}
    assert len(stores) == 2
    done = launch("-m", "dsdistill", "tokenize", config, "--verify", ranks=1)
    assert done.returncode == 0 and "2 stores are what their sources give" in done.stdout
    assert stores == {path: path.stat().st_mtime_ns for path in stores}


def test_a_model_that_leaks_runs_one_document_a_row(home, tmp_path):
    """ALiBi counts positions itself: under auto the log says so once; packing on request is refused by name."""
    bloom = {"model_type": "bloom", "vocab_size": 400, "hidden_size": 32, "n_head": 4, "pad_token_id": 0}
    config = settings(home, tmp_path, "bloom")
    changed = yaml.safe_load(config.read_text())
    changed["teacher"] = None
    changed["student"] = {"config": bloom | {"n_layer": 2}}
    changed["terms"] = {"task": {}}
    config.write_text(yaml.safe_dump(changed))
    done = launch("-m", "dsdistill", "preview", config, "-n", 1, ranks=1)
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count("data.packing: each document has a row, because of a student of model type bloom")
        == 1
    )
    assert "60 examples" in done.stdout
    done = launch("-m", "dsdistill", "train", config, "data.packing=true", ranks=1)
    assert (
        done.returncode == 2 and "data.packing: got true, with a student of model type bloom" in done.stderr
    )
