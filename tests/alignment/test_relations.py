"""Relations of queries, keys and values: acceptance cases, causal masks, grouped heads, and what is refused."""

import pytest
import torch
from transformers import AutoConfig

from dsdistill.alignment.probing import check_pair
from dsdistill.config import UserError
from dsdistill.config.load import make_config
from dsdistill.engine.prepare import objective_layers
from dsdistill.models.probe import probe
from tests.alignment.rig import Rig, make_batch, padded, rows
from tests.models.families import CAUSAL, FAMILIES, architecture

V2 = {"relations": ["query_query", "key_key", "value_value"], "relation_heads": 8}
ROTATING = {"modernbert", "llama", "qwen2", "qwen3", "mistral"}


def attention(options: dict) -> dict:
    return {"attention": {"layers": [[2, 3]], **options}}


@pytest.mark.parametrize("divergence", ["kl", "mse", "score_mse"])
def test_as_many_relation_heads_as_heads_are_the_attention_itself(divergence):
    """With A_r = h, MiniLMv2's query-key relation equals the attention probabilities (no RoPE, scale 1/√d)."""
    batch = make_batch("classification")
    found = [
        Rig("bert", terms=attention({"divergence": divergence, **options})).step(batch)[1]["attention"]
        for options in ({}, {"relation_heads": 4}, {"relation_heads": 8})
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] != pytest.approx(found[2], rel=1e-2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_relations_of_a_causal_model_look_back_alone(family):
    """Value relations are written out with a triangular mask; grouped heads have one relation per key head."""
    rig = Rig(family, "causal_lm", attention({"relations": ["value_value"]}))
    batch = make_batch("causal_lm")
    mine, other = rig.module.trace(batch).attention[2].value, rig.teacher_trace(batch).attention[3].value
    assert mine.shape[1] == {"gpt2": 4, "llama": 2}[family]
    total = 0.0
    for s, t, valid in zip(mine, other, batch.mask, strict=True):
        n = int(valid.sum())
        later = torch.ones(n, n, dtype=torch.bool).triu(1)
        log_q, log_p = (
            (x[:, :n] @ x[:, :n].transpose(-1, -2) / x.shape[-1] ** 0.5)
            .masked_fill(later, -1e9)
            .log_softmax(-1)
            for x in (s, t)
        )
        total += (log_p.exp() * (log_p - log_q)).sum().item()
    assert rig.step(batch)[1]["attention"] == pytest.approx(
        total / (mine.shape[1] * int(batch.mask.sum())), rel=1e-4
    )


def test_relations_add_up():
    """The sum over relations equals the sum of runs with one relation each, also if their head counts differ."""
    batch = make_batch("causal_lm")

    def value(*relations):
        return Rig("llama", "causal_lm", attention({"relations": list(relations)})).step(batch)[1][
            "attention"
        ]

    apart = value("query_key"), value("value_value")
    assert value("query_key", "value_value") == pytest.approx(sum(apart), rel=1e-5)
    assert value("value_value", "query_key") == pytest.approx(sum(apart), rel=1e-5)


@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_invariant(divergence):
    """Padding and the split into micro-batches change neither the value nor the gradient."""
    student = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2}
    rig = Rig("bert", terms=attention(V2 | {"divergence": divergence}), student=student)
    batch = make_batch("classification")
    total, _, gradients = rig.step(batch)
    for other in ([padded(batch, 4)], [rows(batch, [3]), rows(batch, [0, 5]), rows(batch, [1, 2, 4])]):
        again, _, found = rig.step(*other)
        assert again == pytest.approx(total, rel=1e-5)
        key = "body.bert.encoder.layer.1.attention.self.value.weight"
        assert torch.allclose(found[key], gradients[key], rtol=1e-4, atol=1e-6) and gradients[key].any()


def test_a_perfect_student_has_nothing_to_learn():
    rig = Rig("bert", terms={"attention": {"layers": [[3, 3]], **V2}})
    batch = make_batch("classification")
    far = rig.step(batch)[1]["attention"]
    rig.student.load_state_dict(rig.teacher.state_dict())
    assert far > 1e-2 and rig.step(batch)[1]["attention"] < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_which_families_rotate(family):
    task = "causal_lm" if family in CAUSAL else "classification"
    seen = probe(architecture(family), task, "teacher", attention=True, hidden=False)
    assert seen.rotation == ("seen" if family in ROTATING else "none")


def prepared(family: str, options: dict):
    """Prepare a config of two such models, up to the point where weights would load."""
    model = {"config": {"model_type": family, **FAMILIES[family]}}
    config = make_config(
        {"task": "causal_lm", "teacher": model, "student": model, "terms": {"attention": options}}
    )
    architectures = architecture(family), architecture(family)
    return check_pair(config.task, *architectures, objective_layers(config, *architectures))


def before_rotation(model, batch, layer: int) -> dict[str, torch.Tensor]:
    """Return a layer's input to the rotation, (B, heads, N, width), by hooks on plain transformers."""
    made, hooks = {}, []
    attention = model.base_model.layers[layer - 1].self_attn
    for name in ("query", "key", "value"):
        module = getattr(attention, f"{name[0]}_norm", None) or getattr(attention, f"{name[0]}_proj")

        def note(_, args, output, name=name):
            made[name] = output.unflatten(-1, (-1, attention.head_dim)) if output.dim() == 3 else output

        hooks.append(module.register_forward_hook(note))
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.mask.long())
    for hook in hooks:
        hook.remove()
    return {name: value.transpose(1, 2) for name, value in made.items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "qwen3"])
@pytest.mark.parametrize("wanted", [4, "auto", {"query": 8, "key": 2, "value": 4}], ids=str)
def test_relations_of_models_that_rotate_are_those_from_before(family, wanted):
    """Q-Q, K-K and V-V of MiniLMv2 between models of unequal heads and widths, by definition in plain PyTorch."""
    student = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 2}
    windows = {"sliding_window": None, "use_sliding_window": False} if family != "mistral" else {}
    windows |= {"layer_types": ["full_attention"] * 3} if family == "qwen2" else {}
    plain = {"layer_types": ["full_attention"] * 2} if family == "qwen2" else {}
    options = V2 | {"relation_heads": wanted}
    rig = Rig(family, "causal_lm", attention(options), student=student | windows | plain, teacher=windows)
    batch = make_batch("causal_lm")
    models = before_rotation(rig.student.eval(), batch, 2), before_rotation(rig.teacher, batch, 3)
    rig.student.train()
    window = getattr(rig.student.config, "sliding_window", None) or 99
    total = 0.0
    for name in ("query", "key", "value"):
        mine, other = (model[name] for model in models)
        width = mine.shape[1] * mine.shape[-1], other.shape[1] * other.shape[-1]
        fits = [n for n in range(1, mine.shape[1] + 1) if width[0] % n == 0 == width[1] % n]
        heads = max(fits) if wanted == "auto" else wanted[name] if isinstance(wanted, dict) else wanted
        part = 0.0
        for s, t, valid in zip(mine, other, batch.mask, strict=True):
            n = int(valid.sum())
            far = torch.ones(n, n, dtype=torch.bool).triu(1) | torch.ones(n, n, dtype=torch.bool).tril(
                -window
            )
            log_q, log_p = (
                (y @ y.transpose(-1, -2) / y.shape[-1] ** 0.5).masked_fill(far, -1e9).log_softmax(-1)
                for x in (s, t)
                for y in [x.transpose(0, 1).flatten(1)[:n].unflatten(-1, (heads, -1)).transpose(0, 1)]
            )
            part += (log_p.exp() * (log_p - log_q)).sum().item()
        total += part / (heads * int(batch.mask.sum()))
    assert rig.step(batch)[1]["attention"] == pytest.approx(total, rel=1e-4) and total > 1e-3


def test_a_rotation_of_another_kind_is_refused_by_name():
    """Phi rotates only a part of each head, so its input to the rotation is not the whole query."""
    settings = {key: value for key, value in FAMILIES["llama"].items() if key != "head_dim"}
    student = teacher = AutoConfig.for_model("phi", **settings)
    config = make_config(
        {
            "task": "causal_lm",
            "teacher": {"config": {"model_type": "phi", **settings}},
            "student": {"config": {"model_type": "phi", **settings}},
            "terms": {"attention": {"relations": ["key_key", "query_query"]}},
        }
    )
    named = "key_key, query_query for a student of model type phi, which rotates"
    with pytest.raises(UserError, match=f"^terms.attention.relations: got {named}"):
        check_pair("causal_lm", student, teacher, objective_layers(config, student, teacher))


def test_values_and_attention_itself_go_with_rotated_models():
    prepared("llama", {"relations": ["query_key", "value_value"]})
    prepared("llama", {"relations": ["value_value"], "relation_heads": 4})
    prepared("llama", {"relation_heads": 4})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relations": ["key_key", "key_key"]}, "each relation once"),
        ({"heads": "mean", "relation_heads": 4}, "mean with relation_heads"),
        ({"relation_heads": {"key": 4}}, "none for query, expected a number, which query_key needs"),
        ({"relation_heads": 5}, r"5 for query_key, expected a divisor of the student's 4 heads × 8"),
    ],
)
def test_refused(options, message):
    with pytest.raises(UserError, match=message):
        Rig("bert", terms={"attention": options})


def test_unequal_key_heads_are_refused_by_relation():
    student = {"num_key_value_heads": 4}
    with pytest.raises(UserError, match="match for 4 student and 2 teacher heads in value_value"):
        Rig("llama", terms={"attention": {"relations": ["value_value"]}}, student=student)
    Rig("llama", terms={"attention": {"relations": ["value_value"], "relation_heads": 8}}, student=student)
