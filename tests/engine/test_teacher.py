"""A teacher is tested alone, in this process."""

import pytest
import torch
from transformers import AutoConfig

from dsdistill.config.load import make_config
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.prepare import prepare
from dsdistill.engine.teacher import LazyTeacher, largest_layer
from dsdistill.models.build import skeleton
from tests.conftest import BERT

DECODER = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def test_a_replicated_teacher_keeps_its_rotary_frequencies(settings, data_dir, tokenizer_dir):
    """In bfloat16 the weights are rounded; rounded frequencies would turn far positions by radians."""
    settings |= {
        "task": "causal_lm",
        "teacher": {"config": DECODER, "zero_stage": 0},
        "student": {"config": DECODER},
    }
    settings["data"] |= {
        "train": str(data_dir / "train.txt"),
        "dev": str(data_dir / "dev.txt"),
        "tokenizer": str(tokenizer_dir),
    }
    settings["train"]["dtype"] = "bf16"
    prepared = prepare(make_config(settings), world_size=1)
    ranks = Ranks(0, 1, torch.device("cpu"))
    teacher = LazyTeacher(prepared.config, prepared.teacher, prepared.objectives, ranks).callee
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.bfloat16}
    frequencies = teacher.model.model.rotary_emb.inv_freq
    expected = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["bert", "albert"])
def test_largest_layer(kind):
    """A model that shares one layer has no list of layers; then the whole model counts."""
    model = AutoConfig.for_model(kind, **{key: value for key, value in BERT.items() if key != "model_type"})
    width, inner = 48, 64
    layer = 4 * (width**2 + width) + 2 * width * inner + width + inner + 4 * width
    found = largest_layer(skeleton(model, "classification", "teacher"))
    assert found == layer if kind == "bert" else found > layer
