"""Relations of queries, keys and values: acceptance cases, causal masks, grouped heads, and what is refused."""

import pytest
import torch

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
    """MiniLMv2's query-key relation with A_r = h equals the attention probabilities (no RoPE, scale 1/√d)."""
    batch = make_batch("classification")
    found = [
        Rig("bert", terms=attention({"divergence": divergence, **options})).step(batch)[1]["attention"]
        for options in ({}, {"relation_heads": 4}, {"relation_heads": 8})
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] != pytest.approx(found[2], rel=1e-2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_relations_of_a_causal_model_look_back_alone(family):
    """Value relations, written out with the triangle; with grouped heads there are as many as key heads."""
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
    """The sum over relations is that of runs with one each, also where their head counts differ."""
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
    """What happens to a config of two such models before any weight loads."""
    model = {"config": {"model_type": family, **FAMILIES[family]}}
    config = make_config(
        {"task": "causal_lm", "teacher": model, "student": model, "terms": {"attention": options}}
    )
    architectures = architecture(family), architecture(family)
    return check_pair(config.task, *architectures, objective_layers(config, *architectures))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"relations": ["query_query", "value_value"]}, "query_query for a student of model type llama"),
        ({"relations": ["key_key", "query_query"]}, "key_key, query_query for a student of model type llama"),
        ({"relation_heads": 4}, "query_key with relation_heads for a student of model type llama"),
    ],
)
def test_query_and_key_relations_of_rotated_models_are_refused_by_name(options, named):
    with pytest.raises(UserError, match=f"^terms.attention.relations: got {named}, which rotates"):
        prepared("llama", options)
    prepared("gpt2", options)


def test_values_and_attention_itself_go_with_rotated_models():
    prepared("llama", {"relations": ["query_key", "value_value"]})
    prepared("llama", {"relations": ["value_value"], "relation_heads": 4})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relations": ["key_key", "key_key"]}, "each relation once"),
        ({"heads": "mean", "relation_heads": 4}, "mean with relation_heads"),
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
