"""A causal pair learns from prompts and responses, end to end: train and evaluate by the command line."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dsdistill.config import UserError
from dsdistill.config.load import make_config
from dsdistill.engine.passes.generation import stops
from dsdistill.engine.prepare import prepare
from tests.conftest import WORDS
from tests.engine.test_run import command, write

ROWS = [(" ".join(WORDS[i % 7 : i % 7 + 3]), " ".join(WORDS[i % 7 + 1 : i % 7 + 3])) for i in range(40)]


@pytest.fixture
def pairs(settings, tokenizer_dir, tmp_path):
    """Return settings of a run in which a decoder learns to repeat the last two of three words."""
    lines = "".join(json.dumps({"prompt": a, "response": b}) + "\n" for a, b in ROWS)
    (tmp_path / "pairs.jsonl").write_text(lines)
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32, "vocab_size": 64}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, **ends))
    teacher.save_pretrained(tmp_path / "decoder")
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "decoder")
    return settings | {
        "task": "causal_lm",
        "data": {
            "source": "files",
            "root": str(tmp_path),
            "train": "pairs.jsonl",
            "dev": "pairs.jsonl",
            "text": ["prompt", "response"],
            "max_length": 16,
            "cache": str(tmp_path / "cache"),
        },
        "teacher": {"path": str(tmp_path / "decoder"), "zero_stage": 0},
        "student": {"from_teacher": [2, 4]},
        "terms": {
            "task": {},
            "soft_label": {},
            "feature": {},
            "attention": {"divergence": "mse"},
            "contrastive": {"weight": 0.1},
            "trajectory": {"word_layers": [[1, 2]], "phrase_layers": [[2, 4]]},
        },
        "train": {"epochs": 20, "batch_size": 8, "micro_batch_size": 8, "learning_rate": 1e-2},
        "evaluation": {"generate": 12},
    }


def test_train_and_evaluate(pairs, tmp_path):
    pairs["terms"]["soft_label"]["weight"] = 0.01  # the teacher knows nothing
    path = write(tmp_path / "config.yaml", pairs)
    done = command("train", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = Path(pairs["run"]["dir"])
    done = command("evaluate", run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "BLEU" in done.stdout and "CER" in done.stdout
    summary = json.loads((run / "summary.json").read_text())
    for scores in summary["models"].values():
        assert {"perplexity", "bleu", "rouge_1", "rouge_2", "rouge_l", "cer"} <= set(scores)
    assert summary["bleu_signature"].startswith("nrefs:1|case:mixed")
    texts = [json.loads(line) for line in (run / "generated.jsonl").read_text().splitlines()]
    assert [(text["prompt"], text["reference"]) for text in texts] == ROWS[:12]
    student, teacher = summary["models"]["student"], summary["models"]["teacher"]
    right = sum(text["student"] == text["reference"] for text in texts)
    assert right >= 6 and student["rouge_l"] > 0.5 > teacher["rouge_l"]
    assert student["perplexity"] < 2  # of the responses only: the beginning of a prompt cannot be guessed


def test_writing_ends_where_turns_do(tokenizer_dir):
    """A chat template may end turns with another special token than the one that ends texts."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<turn>"})
    tokenizer.add_tokens(["</think>"])
    end, turn, thought = tokenizer.convert_tokens_to_ids(["<end>", "<turn>", "</think>"])
    assert stops(tokenizer, [[5, turn], [6, thought], [7, 8]]) == {end, turn}


def test_refusals(pairs, settings, monkeypatch):
    with pytest.raises(UserError, match=r"evaluation\.generate: got task classification, expected causal_lm"):
        make_config(settings | {"evaluation": {"generate": 5}})
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "sacrebleu" else find(name, *a)
    )
    with pytest.raises(UserError, match="no package sacrebleu, expected pip install sacrebleu"):
        prepare(make_config(pairs), 1)
    prepare(make_config(pairs | {"evaluation": {}}), 1)
