"""An export must be what plain transformers writes for such a model, in the dtype and files that were asked for."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, T5Config, T5Model

from dsdistill import cli
from dsdistill.config import UserError
from dsdistill.data.bytes_bpe import train_bytes_tokenizer
from dsdistill.data.chat import turn_end
from dsdistill.engine.export import _round, export, find_checkpoint, load_student, read_config
from dsdistill.models.settings import GENERATION
from tests.conftest import merge
from tests.data import templates
from tests.engine.launch import run_configs
from tests.engine.test_heads import causal, write  # noqa: F401  (a fixture)

END = "<|turn_end|>"
SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def run(causal, tmp_path):  # noqa: F811
    """Return a run in bf16 without a teacher, on conversations by a template that is not its tokenizer's."""
    folder = train_bytes_tokenizer(["one two three"], 300, str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [END]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "mine.jinja").write_text(templates.PLAIN.replace("<|im_end|>", END))
    turns = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 16)
    model = {"model_type": "llama", "vocab_size": len(tokenizer), "tie_word_embeddings": True, **SIZES}
    change = {
        "teacher": None,
        "terms": {"task": {}},
        "train.dtype": "bf16",
        "student": {"config": model},
        "data.messages": "messages",
        "data.max_length": 64,
        "data.train": str(tmp_path / "train.jsonl"),
        "data.dev": str(tmp_path / "dev.jsonl"),
        "data.tokenizer": str(tmp_path / "tokenizer"),
        "data.chat_template": str(tmp_path / "mine.jinja"),
    }
    run_configs([write(tmp_path, merge(causal, change), "run")], ranks=1)
    return tmp_path / "run"


class _Saying(LogitsProcessor):
    """A model that generates a fixed text."""

    def __init__(self, ids: list[int]):
        self.ids = list(ids)

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -1.0).index_fill(1, torch.tensor([self.ids.pop(0)]), 1.0)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def test_an_export_is_what_plain_transformers_writes(run, tmp_path):
    """Compare dtypes, shards, files, keys and shapes, and generate with a model that ends its turns."""
    ids = torch.arange(3, 40)[None]
    config = read_config(str(run))
    cases = {
        "default": ({}, torch.bfloat16),
        "fp32": ({"dtype": "fp32"}, torch.float32),
        "fp16": ({"dtype": "fp16", "max_shard_size": "1MB"}, torch.float16),
    }
    for name, (options, dtype) in cases.items():
        out, plain = tmp_path / name, tmp_path / f"{name}-plain"
        export(str(run), str(out), **options)
        assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out), dtype=dtype)
        fresh.save_pretrained(plain, max_shard_size=10**6 if "max_shard_size" in options else "5GB")
        tokenizer = AutoTokenizer.from_pretrained(out)
        tokenizer.save_pretrained(plain)
        assert names(out) == names(plain)
        assert ("model.safetensors.index.json" in names(out)) == ("max_shard_size" in options)
        written, expected = read_weights(out), read_weights(plain)
        assert {key: (value.shape, value.dtype) for key, value in written.items()} == {
            key: (value.shape, value.dtype) for key, value in expected.items()
        }
        exact = load_student(str(run), config, find_checkpoint(str(run)))[0].state_dict()
        fresh.load_state_dict({key: value.to(dtype) for key, value in exact.items()})
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
        assert loaded.dtype == dtype
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, fresh.eval()(input_ids=ids).logits)
    shards = sorted((tmp_path / "fp16").glob("*.safetensors"))
    assert len(shards) > 3 and all(path.stat().st_size < 10**6 + 10**4 for path in shards)
    assert tokenizer.chat_template == (tmp_path / "mine.jinja").read_text()
    end = tokenizer.convert_tokens_to_ids(END)
    assert end != tokenizer.eos_token_id
    said = [*tokenizer("one")["input_ids"], end, end]
    got = loaded.generate(ids, max_new_tokens=9, do_sample=False, logits_processor=[_Saying(said)])
    assert got[0, ids.shape[1] :].tolist() == said[:-1]
    stops = json.loads((tmp_path / "fp32" / GENERATION).read_text())["eos_token_id"]
    assert set(stops) >= {end, tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (templates.PLAIN, "<|im_end|>"),
        (templates.MARKED, "<|im_end|>"),
        (templates.PLAIN.replace("<|im_end|>", ""), None),
        ("{{ raise_exception('tools alone') }}", None),
    ],
)
def test_the_token_that_ends_a_turn(tmp_path, template, ends):
    tokenizer = AutoTokenizer.from_pretrained(train_bytes_tokenizer(["words"], 300, str(tmp_path)))
    tokenizer.chat_template = template
    found = turn_end(tokenizer)
    assert found == (None if ends is None else tokenizer.convert_tokens_to_ids(ends))


def test_what_a_type_cannot_hold_and_what_the_library_keeps():
    sizes = {"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5Model(T5Config(**sizes, decoder_start_token_id=0))
    exact = {name: value.clone() for name, value in model.state_dict().items()}
    _round(model, torch.float16)
    kept = {name for name, value in model.state_dict().items() if value.dtype == torch.float32}
    assert kept == {name for name in exact if ".wo." in name}
    assert all(torch.equal(model.state_dict()[name], exact[name]) for name in kept)
    model = T5Model(T5Config(**sizes, decoder_start_token_id=0))
    model.shared.weight.data[0, 0] = -70_000
    with pytest.raises(UserError, match=r"--dtype: got torch.float16.*shared.weight.*70,000, expected bf16"):
        _round(model, torch.float16)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--dtype", "int8"], "--dtype: got 'int8', expected fp32 or "),
        (["--max-shard-size", "5"], "--max-shard-size: got '5', expected a size such as 5GB"),
        (["--max-shard-size", "0.5MB"], "--max-shard-size: got '0.5MB', expected a size such as 5GB"),
    ],
)
def test_bad_options(monkeypatch, capsys, tmp_path, options, told):
    monkeypatch.setattr(sys, "argv", ["dsdistill", "export", "run", "--out", str(tmp_path / "out"), *options])
    assert cli.run() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dsdistill: {told}") and not (tmp_path / "out").exists()
