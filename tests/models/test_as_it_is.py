"""Every model computes what plain transformers computes with it; models that would differ are refused."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from dsdistill.alignment.probing import check_pair
from dsdistill.config import UserError
from dsdistill.config.load import make_config
from dsdistill.data.batch import Batch
from dsdistill.engine.prepare import objective_layers
from dsdistill.models.build import architecture, build_model, check_attention, for_task
from dsdistill.models.capture import Capture
from dsdistill.models.cut import check_cut, cut_architecture
from dsdistill.models.positions import check_length, check_padding
from dsdistill.models.probe import probe
from dsdistill.models.tracer import Tracer, callee
from tests.models import tiny
from tests.models.families import inputs, peaked

CLASSES = {
    "classification": AutoModelForSequenceClassification,
    "masked_lm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
}
SETTINGS = tiny.MASKED | tiny.CAUSAL
CASES = [(family, "masked_lm") for family in tiny.MASKED] + [(family, "causal_lm") for family in tiny.CAUSAL]
# Transformers has no class for classification for these.
_NO_CLASSIFIER = {
    "granite",
    "cohere",
    "cohere2",
    "lfm2",
    "granitemoehybrid",
    "bamba",
    "falcon_h1",
    "nemotron_h",
}
CASES += [(family, "classification") for family in SETTINGS if family not in _NO_CLASSIFIER | {"smollm3"}]


def batch(padded: bool) -> Batch:
    given = inputs(padded)
    return Batch(given["input_ids"], given["attention_mask"].bool(), None)


def config_of(family: str, task: str):
    return for_task(AutoConfig.for_model(family, **SETTINGS[family]), task, ("a", "b", "c"), 0)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_a_run_computes_what_the_library_computes(family, task, tmp_path):
    """Logits equal the library's eager ones: with and without padding, from a folder, without attention terms."""
    torch.manual_seed(3)
    truth = CLASSES[task].from_config(config_of(family, task), attn_implementation="eager")
    truth = peaked(truth, 3.0).float().eval()
    truth.save_pretrained(tmp_path)
    config = for_task(architecture(str(tmp_path), None, "teacher"), task, ("a", "b", "c"), 0)
    probe(config, task, "teacher", attention=False, hidden=False)
    model = build_model(config, str(tmp_path), task, "teacher", needs_head=True).eval()
    tracer = Tracer(callee(model, task, "teacher"))
    for padded in (True, False):
        given = batch(padded)
        with torch.no_grad():
            trace = tracer(given)
            expected = truth(**inputs(padded)).logits
        if task == "classification":
            found = trace.logits
        else:
            valid = given.mask
            found = torch.nn.functional.linear(trace.output, trace.head, trace.head_bias)[valid]
            if trace.softcap is not None:
                found = trace.softcap * torch.tanh(found / trace.softcap)
            expected = expected[valid]
        scale = expected.abs().max().item()
        assert scale > 0.05
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("family", "implementation", "reason"),
    [
        ("gpt_oss", "sdpa", "does not support"),
        ("gemma2", "sdpa", "does not support"),
        ("gpt_neo", "flex_attention", "does not support"),
    ],
)
def test_an_implementation_that_a_class_lacks_is_refused(family, implementation, reason):
    with pytest.raises(UserError) as caught:
        probe(
            config_of(family, "classification"),
            "classification",
            "teacher",
            attention=False,
            hidden=False,
            implementation=implementation,
        )
    message = str(caught.value)
    assert message.startswith(f"teacher.attn_implementation: got {implementation} for model type {family}")
    assert reason in message and "\n" not in message


def test_an_implementation_that_computes_something_else_is_refused(monkeypatch):
    """The library's SDPA would do this for sinks or soft caps, if a class claimed to support it."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssPreTrainedModel

    monkeypatch.setattr(GptOssPreTrainedModel, "_supports_sdpa", True)
    changed = AutoConfig.for_model("gpt_oss", **tiny.CAUSAL["gpt_oss"], rms_norm_eps=2e-5)  # not yet tried
    with pytest.raises(UserError, match="computes something else under sdpa than under eager"):
        probe(changed, "causal_lm", "student", attention=False, hidden=False)


def test_flash_attention_is_planned_for_anywhere_and_refused_where_it_cannot_run():
    config = config_of("qwen3", "causal_lm")
    probe(config, "causal_lm", "s", attention=False, hidden=False, implementation="flash_attention_2")
    if not torch.cuda.is_available():
        with pytest.raises(
            UserError, match=r"^student.attn_implementation: got flash_attention_2 on a machine"
        ):
            check_attention("flash_attention_2", "student")
    check_attention("sdpa", "student")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_capture_wraps_whichever_implementation_runs(implementation):
    config = config_of("qwen3", "causal_lm")
    torch.manual_seed(0)
    model = build_model(
        config, None, "causal_lm", "student", needs_head=False, attention=implementation
    ).eval()
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        before = model(**inputs()).logits
        with Capture(model, attention=(2, 4)).recording() as trace:
            after = model(**inputs()).logits
    assert torch.equal(before, after) and sorted(trace.attention) == [2, 4]


HYBRIDS = ("qwen3_next", "qwen3_5_text", "lfm2", "granitemoehybrid", "jamba", "bamba", "nemotron_h")


@pytest.mark.parametrize("family", HYBRIDS)
def test_attention_of_a_hybrid_is_that_of_its_attention_layers(family):
    """Layers keep the model's numbers; the maps are the library's eager ones."""
    torch.manual_seed(3)
    eager = CLASSES["causal_lm"].from_config(config_of(family, "causal_lm"), attn_implementation="eager")
    eager = peaked(eager, 6.0).float().eval()
    model = build_model(config_of(family, "causal_lm"), None, "causal_lm", "student", needs_head=False).eval()
    model.load_state_dict(eager.state_dict())
    given = inputs()
    with torch.no_grad():
        with Capture(model, attention=(1, 2, 3, 4)).recording() as trace:
            model(**given)
        maps = eager(**given, output_attentions=True).attentions
    maps = [found for found in maps if found is not None]
    assert sorted(trace.attention) == [2, 4] and len(maps) == 2
    valid = given["attention_mask"].bool()
    later = torch.ones(14, 14, dtype=torch.bool).triu(1)
    for layer, expected in zip((2, 4), maps, strict=True):
        found = trace.attention[layer]
        key = found.key.repeat_interleave(found.query.shape[1] // found.key.shape[1], 1)
        scores = found.scale * found.query @ key.transpose(-1, -2)
        scores = scores.masked_fill(later | ~valid[:, None, None, :], -1e30)
        rows = valid[:, None, :, None]
        torch.testing.assert_close(scores.softmax(-1) * rows, expected * rows, rtol=1e-4, atol=1e-5)


def _hybrids(layers, student: str = "lfm2", teacher: str = "qwen3_next"):
    """Prepare a config of two hybrids, up to the point where weights would load."""
    models = {
        place: {"config": {"model_type": family, **SETTINGS[family]}}
        for place, family in (("student", student), ("teacher", teacher))
    }
    config = make_config({"task": "causal_lm", **models, "terms": {"attention": {"layers": layers}}})
    architectures = [config_of(family, "causal_lm") for family in (student, teacher)]
    objectives = objective_layers(config, *architectures)
    check_pair("causal_lm", *architectures, objectives)
    return objectives[0].terms["attention"].layers


def test_maps_of_hybrids_are_of_layers_with_attention():
    assert _hybrids("uniform") == ((2, 2), (4, 4)) and _hybrids("last") == ((4, 4),)
    assert _hybrids([[2, 4]]) == ((2, 4),)
    assert _hybrids("emd") == ((2, 2), (2, 4), (4, 2), (4, 4))
    with pytest.raises(
        UserError, match=r"layers: got student layer 3, which has no attention, expected one of 2, 4"
    ):
        _hybrids([[3, 4]])
    with pytest.raises(
        UserError, match=r"layers: got teacher layer 1, which has no attention, expected one of 2, 4"
    ):
        _hybrids([[2, 1]])
    with pytest.raises(UserError, match=r"teacher layer 9, expected 1 to 4"):
        _hybrids([[2, 9]])


def test_a_student_that_leaves_out_layers_is_refused_where_terms_read_them():
    dropped = {"model_type": "opt", **tiny.CAUSAL["opt"], "layerdrop": 0.5}
    student, teacher = architecture(None, dropped, "student"), config_of("opt", "causal_lm")

    def check(terms):
        settings = {"task": "causal_lm", "student": {"config": dropped}, "teacher": {"config": dropped}}
        config = make_config(settings | {"terms": terms})
        return check_pair("causal_lm", student, teacher, objective_layers(config, student, teacher))

    for terms in ({"attention": {"layers": [[1, 1]]}}, {"hidden": {}}):
        with pytest.raises(UserError, match=r"^student.config.layerdrop: got 0.5, expected 0"):
            check(terms)
    check({"soft_label": {}})


def test_an_attention_call_belongs_to_its_layer_whatever_was_skipped():
    """Calls are not counted: if the first layer is skipped, the second does not become the first."""
    model = build_model(config_of("opt", "causal_lm"), None, "causal_lm", "student", needs_head=False).eval()
    layers = model.model.decoder.layers
    with Capture(model, attention=(1, 2, 3)).recording() as whole, torch.no_grad():
        model(**inputs())
    layers[0].forward = lambda hidden_states, *_, **__: hidden_states
    with Capture(model, attention=(1, 2, 3)).recording() as trace, torch.no_grad():
        model(**inputs())
    assert sorted(whole.attention) == [1, 2, 3] and sorted(trace.attention) == [2, 3]


AFTER_PADDING = {
    "roberta": {},
    "xmod": {"default_language": "en_XX"},
    "luke": {},
    "ibert": {},
    "markuplm": {"hidden_size": 48},
    "lilt": {"hidden_size": 48},
    "esm": {"position_embedding_type": "absolute", "mask_token_id": 2},
}


@pytest.mark.parametrize("family", AFTER_PADDING)
def test_positions_that_start_after_padding_are_found_by_trying(family):
    """The longest allowed length is the longest that plain transformers runs."""
    settings = tiny._ENCODER | {"pad_token_id": 1, **AFTER_PADDING[family]}
    config = AutoConfig.for_model(family, **settings)
    with pytest.raises(
        UserError,
        match=r"^data.max_length: got 40, expected at most 38, the number of the teacher's positions",
    ):
        check_length(config, "classification", 40, None, "teacher")
    check_length(config, "classification", 38, None, "teacher")
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        model(input_ids=torch.full((1, 38), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 39), 5))


@pytest.mark.parametrize(("family", "most"), [("bert", 40), ("albert", 40), ("gpt2", 64), ("opt", 64)])
def test_positions_that_start_at_the_front(family, most):
    config = config_of(family, "classification")
    check_length(config, "classification", most, 0, "student")
    with pytest.raises(
        UserError, match=f"got {most + 1}, expected at most {most}, the number of the student's"
    ):
        check_length(config, "classification", most + 1, 0, "student")


def test_another_padding_token_would_move_positions():
    settings = tiny._ENCODER | {"pad_token_id": 1}
    roberta, bert = (AutoConfig.for_model(family, **settings) for family in ("roberta", "bert"))
    with pytest.raises(
        UserError, match=r"^teacher.config.pad_token_id: got 1, .*, expected 0, as in the tokenizer"
    ):
        check_padding(roberta, "masked_lm", 0, "teacher")
    check_padding(roberta, "masked_lm", 1, "teacher")
    check_padding(bert, "masked_lm", 0, "teacher")


def cut(family: str, layers: tuple[int, ...], changes: dict | None = None, **settings):
    teacher = AutoConfig.for_model(family, **SETTINGS.get(family, tiny._DECODER) | settings)
    student = cut_architecture(teacher, layers, changes, "student")
    check_cut(student, teacher, layers, "causal_lm", "student")
    return student


@pytest.mark.parametrize(
    ("family", "layers", "named"),
    [
        (
            "minicpm3",
            (1, 2),
            r"teacher layer 1 as student layer 1, but the two differ in residual_scale \(0.7 and 0.9899\)",
        ),
        (
            "diffllama",
            (2, 4),
            r"layer 2 as student layer 1, but the two differ in self_attn.lambda_init \(0.3555 and 0.2\)",
        ),
        ("jamba", (2, 4), "layer 2 as student layer 1, but the two differ in "),
        ("deepseek_v3", (2, 4), "layer 2 as student layer 1, but the two differ in mlp"),
    ],
)
def test_layers_that_compute_by_their_place_are_refused_by_name(family, layers, named):
    with pytest.raises(
        UserError, match=f"^student.from_teacher: got {'teacher ' * (named[0] == 'l')}{named}"
    ):
        cut(family, layers)


def test_layers_that_a_config_keeps_as_they_were_are_cut():
    """MiniCPM3 scales what a layer adds by scale_depth / √layers.

    With half the scale a quarter of the layers is as before.
    """
    scale = AutoConfig.for_model("minicpm3", **tiny.CAUSAL["minicpm3"]).scale_depth
    cut("minicpm3", (2,), {"scale_depth": scale / 2})
    cut("diffllama", (1, 2))
    assert cut("gpt_neo", (1, 4)).attention_layers == ["global", "local"]
    assert cut("bamba", (1, 4)).attn_layer_indices == [1]
    cut("llama", (2, 4), {"attention_dropout": 0.2})


def test_a_composite_is_cut_in_its_text_part():
    parts = {
        "text_config": tiny.CAUSAL["gemma3_text"],
        "vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    }
    teacher = AutoConfig.for_model("gemma3", **parts)
    student = cut_architecture(teacher, (2, 4), None, "student")
    assert student.model_type == "gemma3" and student.text_config.num_hidden_layers == 2
    assert student.text_config.layer_types == [teacher.text_config.layer_types[place] for place in (1, 3)]
    check_cut(student, teacher, (2, 4), "causal_lm", "student")
    probe(student, "causal_lm", "student", attention=True, hidden=True)


def test_states_of_several_streams_are_refused():
    """Gemma 3n passes (4, B, N, D) from layer to layer; terms that read only its outputs are fine."""
    settings = tiny.CAUSAL["gemma3_text"] | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8}
    settings |= {"laurel_rank": 8, "vocab_size_per_layer_input": 99, "activation_sparsity_pattern": [0.0] * 4}
    config = AutoConfig.for_model("gemma3n_text", **settings)
    with pytest.raises(UserError, match="gemma3n_text, whose layers do not pass on hidden states"):
        probe(config, "causal_lm", "teacher", attention=False, hidden=True)
    probe(config, "causal_lm", "teacher", attention=False, hidden=False)
