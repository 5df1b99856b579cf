"""In packed rows nothing leaks from document to document; models in which something would leak are found."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Model

from dsdistill.config import UserError
from dsdistill.data.packing import Document, packed_batch
from dsdistill.models import isolation, one_row, tracer
from dsdistill.models.isolation import leak
from dsdistill.models.tracer import Tracer, callee, model_inputs
from tests.models.families import architecture, peaked
from tests.models.tiny import CAUSAL, COMPOSITES

LENGTHS = ((9, 12, 1), (13, 5))  # two rows; longer than windows; the second row is filled up
SEES = "in which a document sees those before it in its row"
# Why each family that may not be packed may not: no positions in its masks, none at all (ALiBi), or recurrent layers.
LEAKS = dict.fromkeys(
    "bloom falcon opt gpt_oss qwen3_next qwen3_5_text lfm2 granitemoehybrid jamba bamba falcon_h1 nemotron_h".split(),
    SEES,
)


def rows(change: int = 0, rest: int = 0):
    """Return two packed rows. `change` is added to tokens of each row's first document, `rest` to the other tokens."""
    chance = np.random.default_rng(0)
    return packed_batch(
        [
            [
                Document((chance.integers(0, 60, length) + (rest if place else change)) % 60 + 2)
                for place, length in enumerate(lengths)
            ]
            for lengths in LENGTHS
        ],
        0,
    )


def model(family: str, implementation: str):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(architecture(family), attn_implementation=implementation)
    return peaked(made).eval()


def states(made, batch):
    """Return everything that a trace keeps of each token, as (B, N, all values)."""
    depth = made.config.num_hidden_layers
    every = Tracer(callee(made, "causal_lm", "student"), range(depth + 1), range(1, depth + 1))
    with every.frozen(batch) as trace:
        assert len(trace.hidden) == depth + 1 and len(trace.attention) == depth
        heads = [x for layer in trace.attention.values() for x in (layer.query, layer.key, layer.value)]
        parts = [*trace.hidden.values(), trace.output, *(x.transpose(1, 2).flatten(2) for x in heads)]
        return torch.cat(parts, dim=-1)


CASES = [(family, name) for family in ("llama", "qwen2", "qwen3", "gpt2") for name in ("sdpa", "eager")]


def test_no_bit_under_flex_attention():
    """It is compiled, which takes a while; it does not run if nothing can be compiled for the CPU."""
    made, batch = model("llama", "flex_attention"), rows()
    later = batch.mask & (batch.segments > 0)
    try:
        with torch.no_grad():
            made(input_ids=batch.input_ids)  # the library alone; a failure after this is our mistake
    except Exception as error:
        pytest.skip(f"flex attention does not run here: {str(error)[:100]}")
    before = states(made, batch)
    after = states(made, rows(change=7))
    assert torch.equal(after[later], before[later]) and not torch.equal(after, before)


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_no_bit_of_a_document_depends_on_another(family, implementation):
    made, batch = model(family, implementation), rows()
    first = batch.segments == 0
    before = states(made, batch)
    after = states(made, rows(change=7))
    assert torch.equal(after[~first & batch.mask], before[~first & batch.mask])
    assert not torch.equal(after[first], before[first])
    later = states(made, rows(rest=7))
    assert torch.equal(later[first], before[first])
    # And each document is the same as alone, without positions and with a mask.
    alone = states(made, batch.unpacked)
    packed = before.flatten(0, 1)[batch.places[batch.places >= 0]]
    torch.testing.assert_close(packed, alone[batch.unpacked.mask], rtol=1e-3, atol=1e-4)


def test_the_library_gets_positions_and_no_mask():
    batch = rows()
    given = model_inputs(model("llama", "sdpa"), batch, pad=0)
    assert set(given) == {"input_ids", "position_ids"}
    assert set(model_inputs(model("llama", "sdpa"), batch.unpacked, pad=0)) == {"input_ids", "attention_mask"}


def test_one_row_keeps_every_state(monkeypatch):
    """Rows are run as one row, as flash attention needs them: states and places must stay the same."""
    made, batch = model("qwen3", "sdpa"), rows()
    expected = states(made, batch)
    monkeypatch.setattr(tracer, "wants_one_row", lambda _: True)
    torch.testing.assert_close(states(made, batch), expected, rtol=1e-4, atol=1e-5)
    # A batch that is not packed runs as it is.
    monkeypatch.setattr(tracer, "one_row", lambda _: pytest.fail("rows of one document each were joined"))
    states(made, batch.unpacked)


def test_flash_attention_wants_one_row():
    made = model("llama", "sdpa")
    assert not one_row.wants_one_row(made)
    made.config._attn_implementation = "flash_attention_2"
    assert one_row.wants_one_row(made)


@pytest.mark.parametrize("family", [*CAUSAL, *COMPOSITES])
def test_families(family):
    """Every family of the tables is classified; those that are not named here may be packed."""
    config = AutoConfig.for_model(family, **(CAUSAL | COMPOSITES)[family])
    found = leak(config, "student")
    expected = LEAKS.get(family, LEAKS.get(f"{family}_text"))
    if family == "llama4":  # before transformers 5.18 chunks are counted from the row's start
        assert found in (None, "which computes something else of a document in a packed row than of it alone")
    else:
        assert found == expected


def test_falcon_with_alibi():
    assert leak(AutoConfig.for_model("falcon", **CAUSAL["falcon"], alibi=True), "teacher", "eager") == SEES


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_implementation_is_tried(implementation):
    assert leak(architecture("qwen2"), "student", implementation) is None
    with pytest.raises(UserError, match=r"^student\.attn_implementation: got sdpa for model type gpt_neo"):
        leak(AutoConfig.for_model("gpt_neo", **CAUSAL["gpt_neo"]), "student", "sdpa")


def test_positions_that_are_ignored_are_found(monkeypatch):
    """The model keeps documents apart but counts positions through the row."""
    inputs = tracer.model_inputs

    def shifted(made, batch, pad=None):
        given = inputs(made, batch, pad)
        if "position_ids" in given:
            given["position_ids"] = given["position_ids"] + 3 * batch.segments
        return given

    monkeypatch.setattr(tracer, "model_inputs", shifted)
    isolation._leak.cache_clear()
    found = leak(architecture("gpt2"), "student")
    isolation._leak.cache_clear()
    assert found == "which computes something else of a document in a packed row than of it alone"


def test_a_model_that_cannot_run_without_a_mask_is_found(monkeypatch):
    forward = Qwen3Model.forward

    def masked(self, *given, attention_mask=None, **more):
        return forward(self, *given, attention_mask=attention_mask.clone(), **more)

    monkeypatch.setattr(Qwen3Model, "forward", masked)
    isolation._leak.cache_clear()
    found = leak(architecture("qwen3"), "student")
    isolation._leak.cache_clear()
    assert found == "which cannot run packed rows ('NoneType' object has no attribute 'clone')"


def test_random_state_and_architecture_are_left_alone():
    config, state = architecture("qwen2"), torch.get_rng_state()
    before = config.to_dict()
    leak(config, "student")
    assert torch.equal(torch.get_rng_state(), state) and config.to_dict() == before
