"""The probe lets models pass, or refuses them by name before any weight is loaded."""

import time

import pytest
import torch
from transformers import AutoConfig

from dsdistill.config import UserError
from dsdistill.models import probe as module
from dsdistill.models.probe import probe
from dsdistill.models.trace import Geometry
from tests.models.families import CAUSAL, FAMILIES, architecture

ENCODER = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4} | {
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
DECODER = ENCODER | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}


def refusal(family: str, settings: dict, task: str = "classification", attention=True, hidden=True) -> str:
    with pytest.raises(UserError) as caught:
        probe(AutoConfig.for_model(family, **settings), task, "teacher", attention=attention, hidden=hidden)
    message = str(caught.value)
    assert message.startswith("teacher: got ") and "\n" not in message and len(message) < 300
    return message


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_families_that_pass(family, task):
    probe(architecture(family), task, "teacher", attention=True, hidden=True)


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_language_models_that_pass(family):
    probe(architecture(family), "causal_lm", "teacher", attention=True, hidden=True)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("xlm-roberta", ENCODER),
        ("electra", ENCODER | {"embedding_size": 16}),
        ("gemma", DECODER),
        ("gemma3_text", DECODER | {"sliding_window": 6}),
        ("phi3", DECODER),
        ("starcoder2", DECODER),
    ],
)
def test_more_families_pass(family, settings):
    probe(AutoConfig.for_model(family, **settings), "classification", "student", attention=True, hidden=True)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("deberta", ENCODER | RELATIVE, "0 of 2 attention layers captured"),
        ("deberta-v2", ENCODER | RELATIVE, "0 of 2 attention layers captured"),
        ("mpnet", ENCODER, "0 of 2 attention layers captured"),
        (
            "bloom",
            {"vocab_size": 64, "hidden_size": 32, "n_layer": 3, "n_head": 4},
            "0 of 2 attention layers",
        ),
        ("gemma2", DECODER, "the further input softcap"),
        ("gpt_oss", DECODER | {"num_local_experts": 2, "num_experts_per_tok": 1}, "the further input s_aux"),
        ("doge", DECODER, "attention is more than softmax"),  # its bias is 0 as initialised
        ("diffllama", DECODER, "4 of 2 attention layers captured"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attention_that_would_be_misread_is_refused(family, settings, reason):
    assert f"model type {family}" in refusal(family, settings) and reason in refusal(family, settings)
    # Such a model is fine if no term needs its attention.
    probe(AutoConfig.for_model(family, **settings), "classification", "teacher", attention=False, hidden=True)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("albert", ENCODER | {"embedding_size": 16}, "has no list of its layers"),
        (
            "xlnet",
            {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
            "do not pass on hidden",
        ),
        ("longformer", ENCODER | {"attention_window": 8}, "do not pass on hidden"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_cannot_be_hooked_are_refused(family, settings, reason):
    assert reason in refusal(family, settings, attention=False)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("t5", {"vocab_size": 64, "d_model": 32, "num_layers": 2, "num_heads": 4}, "t5, an encoder-decoder"),
        ("mamba", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}, "model type mamba ("),
        ("funnel", {}, "model type funnel ("),
        ("bert", ENCODER | {"hidden_size": 30}, "hidden size (30) is not a multiple"),
        ("vit", {}, "model type vit (Unrecognized configuration class"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_do_not_even_run_are_refused(family, settings, reason):
    assert reason in refusal(family, settings, attention=False, hidden=False)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("bert", ENCODER | {"is_decoder": True}, "head is more than one linear map"),
        (
            "xlnet",
            {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
            "which sees the tokens",
        ),
        ("distilbert", FAMILIES["distilbert"], "Unrecognized configuration class"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_language_models_that_would_be_misread_are_refused(family, settings, reason):
    assert reason in refusal(family, settings, task="causal_lm", attention=False, hidden=False)


def test_llama4_chunks_are_refused():
    """Its local layers see only the keys of their own chunk, which no window expresses."""
    settings = DECODER | {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8192}
    config = AutoConfig.for_model("llama4_text", **settings)
    with pytest.raises(UserError, match="llama4_text"):
        probe(config, "causal_lm", "teacher", attention=True, hidden=False)


@pytest.mark.parametrize(
    ("family", "windows"),
    [
        ("qwen2", [None, 4, None]),
        ("mistral", [4] * 3),
        ("modernbert", [None, 5, None]),
        ("llama", [None] * 3),
    ],
)
def test_geometry_of_every_layer(family, windows):
    """The geometry has the model's own windows, though the probe shrinks them so that they take effect."""
    found = probe(architecture(family), "classification", "teacher", attention=True, hidden=False).geometry
    assert found == {n: Geometry(family in CAUSAL, window) for n, window in enumerate(windows, start=1)}
    long = architecture("mistral", sliding_window=4096)
    assert probe(long, "classification", "teacher", attention=True, hidden=False).geometry[3].window == 4096


def test_the_place_is_named():
    with pytest.raises(UserError, match=r"^student: got model type mpnet"):
        probe(
            AutoConfig.for_model("mpnet", **ENCODER), "classification", "student", attention=True, hidden=True
        )


def test_random_state_and_architecture_are_left_alone():
    config = architecture("qwen2")
    before, state = config.to_dict(), torch.get_rng_state()
    probe(config, "classification", "teacher", attention=True, hidden=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert config.to_dict() == before


def test_a_large_model_is_cheap():
    """BERT-large with 24 layers has 340 million parameters; the probe builds small layers instead."""
    config = AutoConfig.for_model(
        "bert", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    module._probe.cache_clear()
    built = []
    original = torch.nn.Module.register_parameter

    def count(module, name, parameter):
        memory = parameter is not None and parameter.device.type != "meta"
        built.append(parameter.numel() if memory else 0)
        return original(module, name, parameter)

    started = time.process_time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "register_parameter", count)
        probe(config, "classification", "teacher", attention=True, hidden=True)
    assert 1e6 < sum(built) < 25e6
    assert time.process_time() - started < 5
