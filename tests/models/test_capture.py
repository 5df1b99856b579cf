"""Captured values are the model's own attention maps and hidden states, with their gradients."""

import pytest
import torch
from transformers.integrations.sdpa_attention import repeat_kv

from dsdistill.models import capture as module
from dsdistill.models.capture import Capture
from tests.models.families import CAUSAL, FAMILIES, FINAL_NORM, inputs, pair

LAYERS = (1, 2, 3)
TIGHT = {"rtol": 1e-4, "atol": 1e-5}  # for values around 1


def probabilities(layer, valid):
    """Return (B, H, N, N) attention from a trace, by the definition; 0 in rows of padding."""
    groups = layer.query.shape[1] // layer.key.shape[1]
    scores = layer.scale * layer.query @ repeat_kv(layer.key, groups).transpose(-1, -2)
    position = torch.arange(valid.shape[1])
    distance = position[:, None] - position
    seen = valid[:, None, None, :].expand_as(scores)
    if layer.geometry.causal:
        seen = seen & (distance >= 0)
    if layer.geometry.window is not None:
        seen = seen & (distance.abs() < layer.geometry.window)
    return scores.masked_fill(~seen, -1e30).softmax(-1) * valid[:, None, :, None]


def traced(model, given, hidden=(0, *LAYERS), attention=LAYERS):
    with Capture(model, hidden, attention).recording() as trace:
        output = model(**given).last_hidden_state
    return trace, output


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
def test_probabilities_equal_the_eager_maps(family, padded):
    ours, eager = pair(family)
    given = inputs(padded)
    valid = given["attention_mask"].bool()
    with torch.no_grad():
        trace, _ = traced(ours, given)
        maps = eager(**given, output_attentions=True).attentions
    assert len(maps) == 3 and list(trace.attention) == list(LAYERS)
    for layer in LAYERS:
        expected = maps[layer - 1] * valid[:, None, :, None]
        assert expected[0].amax(-1).mean() > 2 / 14, "maps near 1/N would hide errors"
        torch.testing.assert_close(probabilities(trace.attention[layer], valid), expected, **TIGHT)


def test_hidden_states_equal_the_librarys(family):
    ours, eager = pair(family)
    given = inputs()
    valid = given["attention_mask"].bool()
    with torch.no_grad():
        trace, output = traced(ours, given)
        states = eager(**given, output_hidden_states=True).hidden_states
        last = trace.hidden[3]
        if family in FINAL_NORM:
            assert not torch.allclose(last, states[3], atol=1e-2), "hidden[L] comes before the final norm"
            last = FINAL_NORM[family](ours)(last)
    assert sorted(trace.hidden) == [0, *LAYERS] and len(states) == 4
    for layer in (0, 1, 2):
        torch.testing.assert_close(trace.hidden[layer][valid], states[layer][valid], **TIGHT)
    torch.testing.assert_close(last[valid], states[3][valid], **TIGHT)
    torch.testing.assert_close(output[valid], states[3][valid], **TIGHT)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_forward_equals_plain_sdpa(family, mode):
    ours, eager = pair(family)
    given = inputs()
    eager.set_attn_implementation("sdpa")
    for model in (ours, eager):
        model.train(mode == "train")
    with torch.no_grad():
        _, output = traced(ours, given)
        expected = eager(**given).last_hidden_state
        outside = ours(**given).last_hidden_state
    assert torch.equal(output, expected) and torch.equal(outside, expected)


def test_padding_reaches_attention(family):
    """An unregistered mask function would silently drop the padding mask."""
    ours, _ = pair(family)
    given = inputs()
    valid = given["attention_mask"].bool()
    other = {**given, "input_ids": given["input_ids"].masked_fill(~valid, 7)}
    with torch.no_grad():
        first, second = ours(**given).last_hidden_state, ours(**other).last_hidden_state
        unmasked = ours(input_ids=other["input_ids"]).last_hidden_state
    torch.testing.assert_close(first[valid], second[valid], **TIGHT)
    if family not in CAUSAL:  # causal models never see padding on the right
        assert not torch.allclose(first[valid], unmasked[valid], atol=1e-2)


def loss(maps, states, valid):
    """Return a loss with a different weight for every entry, so that errors cannot cancel."""
    generator = torch.Generator().manual_seed(11)
    total = 0.0
    for values in (*maps, *states):
        total = total + (values * torch.randn(values.shape, generator=generator)).square().sum()
    return total


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_gradients_equal_the_eager_ones(family, checkpointing):
    ours, eager = pair(family)
    given = inputs()
    valid = given["attention_mask"].bool()
    rows, tokens = valid[:, None, :, None], valid[:, :, None]
    found = eager(**given, output_attentions=True, output_hidden_states=True)
    states = [state * tokens for state in found.hidden_states[:3]]
    expected = gradients(eager, loss([m * rows for m in found.attentions], states, valid))

    ours.train()  # dropout is 0; the library checkpoints in training only
    if checkpointing:
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    watch = Capture(ours, (0, 1, 2), LAYERS)
    with watch.recording() as trace:
        ours(**given)
    assert watch.calls.total() == 3 and list(trace.attention) == list(LAYERS)
    before = {layer: trace.attention[layer].query for layer in LAYERS}
    states = [trace.hidden[layer] * tokens for layer in (0, 1, 2)]
    got = gradients(
        ours, loss([probabilities(trace.attention[layer], valid) for layer in LAYERS], states, valid)
    )
    assert watch.calls.total() == 3, "what backward runs again is not captured again"
    assert all(trace.attention[layer].query is before[layer] for layer in LAYERS)

    # The end of the last layer is in no loss, so some parameters have no gradient in either model.
    assert {name for name, g in got.items() if g.any()} == {name for name, g in expected.items() if g.any()}
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_only_the_chosen_layers_are_kept():
    ours, _ = pair("bert")
    trace, _ = traced(ours, inputs(), hidden=(2,), attention=(1, 3))
    assert list(trace.hidden) == [2] and list(trace.attention) == [1, 3]


def test_nothing_is_captured_outside_recording():
    ours, _ = pair("bert")
    watch = Capture(ours, (0, 1), (1,))
    with watch.recording() as trace:
        ours(**inputs())
    kept = (trace.hidden[1], trace.attention[1].query)
    ours(**inputs(padded=False))
    assert trace.hidden[1] is kept[0] and trace.attention[1].query is kept[1]
    assert watch._trace is None and module._recording is None

    with watch.recording() as second:
        ours(**inputs())
    assert second is not trace and list(second.attention) == [1], "calls are counted anew"


def test_two_models_do_not_mix():
    student, teacher = pair("bert")[0], pair("bert", num_hidden_layers=5)[0]
    mine, other = Capture(student, (1,), (1,)), Capture(teacher, (5,), (5,))
    with other.recording() as first:
        teacher(**inputs())
    with mine.recording() as second:
        student(**inputs())
    assert (list(first.attention), list(first.hidden)) == ([5], [5])
    assert (list(second.attention), list(second.hidden)) == ([1], [1])
    with other.recording(), pytest.raises(RuntimeError, match="another forward pass"), mine.recording():
        pass
    assert module._recording is None


def test_an_error_in_forward_ends_the_recording():
    ours, _ = pair("bert")
    watch = Capture(ours, (1,), (1,))
    with pytest.raises(ZeroDivisionError), watch.recording():
        _ = 1 / 0
    assert module._recording is None
    with watch.recording() as trace:
        ours(**inputs())
    assert 1 in trace.hidden


def test_layers_that_cannot_be_hooked_are_refused():
    ours, _ = pair("bert")
    ours.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="got no list of layers, expected one of 7 layers"):
        Capture(ours, (1,))


@pytest.mark.parametrize(
    ("family", "windows"),
    [
        ("qwen2", (None, 4, None)),
        ("mistral", (4, 4, 4)),
        ("modernbert", (None, 5, None)),
        ("llama", (None,) * 3),
    ],
)
def test_windows_by_layer(family, windows):
    """A key counts at distance < window: ModernBERT's 8 means 4 to either side and the token itself."""
    ours, _ = pair(family)
    watch = Capture(ours, attention=LAYERS)
    with watch.recording():
        ours(**inputs())
    assert tuple(watch.geometry[layer].window for layer in LAYERS) == windows
    assert all(geometry.causal == (family in CAUSAL) for geometry in watch.geometry.values())


def test_values_are_kept_only_where_asked_for():
    ours, _ = pair("bert")
    for values in (True, False):
        with Capture(ours, attention=(1,), values=values).recording() as trace:
            ours(**inputs())
        assert (trace.attention[1].value is not None) is values and trace.attention[1].key is not None
