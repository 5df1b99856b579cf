"""A global batch has one loss and one gradient, however it is padded, ordered, split or filled up."""

import pytest
import torch

from tests.alignment.rig import ALL_TERMS, Rig, make_batch, padded, rows, with_filler
from tests.models.test_domain_fusion import fitted

REGRESSION = {name: term for name, term in ALL_TERMS.items() if name != "soft_label"}
SMALL_BERT = {"hidden_size": 24, "num_hidden_layers": 2}
SMALL_LLAMA = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3}
CASES = {
    "bert": ("bert", "classification", ALL_TERMS, SMALL_BERT),
    "bert-cosine": (
        "bert",
        "classification",
        ALL_TERMS
        | {
            "hidden": {"divergence": "cosine", "layer_agg": "sum"},
            "attention": {"divergence": "score_mse"},
            "pairwise": {"relation": "distance"},
        },
        SMALL_BERT,
    ),
    "bert-values": (
        "bert",
        "classification",
        ALL_TERMS
        | {
            "feature": {"positions": "first"},
            "trajectory": {"word_layers": [[1, 2]], "phrase_layers": [[2, 3], [1, 1]]},
            "attention": {"relations": ["query_key", "value_value"]},
            "pairwise": {"center": True},
            "smooth": {},
        },
        SMALL_BERT,
    ),
    "bert-masked": (
        "bert",
        "masked_lm",
        ALL_TERMS | {"soft_label": {"positions": "valid", "divergence": "akl"}},
        SMALL_BERT,
    ),
    "bert-domain": (
        "bert",
        "masked_lm",
        {"task": {}, "domain": {"sequences": 0.0}},  # that part depends on the micro-batch
        SMALL_BERT,
    ),
    "bert-rows": (
        "bert",
        "classification",
        ALL_TERMS
        | {
            "attention": {"rows": 4, "heads": "mean"},
            "pairwise": {"rows": 5, "layers": "uniform"},
        },
        SMALL_BERT,
    ),
    "modernbert-rows": (
        "modernbert",
        "classification",
        ALL_TERMS | {"attention": {"rows": 5, "divergence": "mse", "layers": [[1, 1], [2, 2]]}},
        {"hidden_size": 24, "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "modernbert-mse": (
        "modernbert",
        "classification",
        ALL_TERMS | {"attention": {"divergence": "mse", "layers": [[1, 1], [2, 2]]}},
        {"hidden_size": 24, "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "llama-classifier": (
        "llama",
        "classification",
        ALL_TERMS | {"feature_map": {"layers": [[1, 2]]}, "ckd": {"window": 5}},
        SMALL_LLAMA,
    ),
    "roberta-regression": ("roberta", "regression", REGRESSION, SMALL_BERT),
    "gpt2-language": ("gpt2", "causal_lm", ALL_TERMS, {"n_embd": 24, "n_layer": 2}),
    "llama-groups": (
        "llama",
        "classification",
        ALL_TERMS | {"attention": {"heads": "group"}},
        {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    "qwen2-groups-mse": (
        "qwen2",
        "causal_lm",
        ALL_TERMS | {"attention": {"heads": "group", "divergence": "mse", "layers": [[1, 1], [2, 2]]}},
        {
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
    ),
    "llama-language": ("llama", "causal_lm", ALL_TERMS | {"fdd": {}}, SMALL_LLAMA),
    "qwen2-language-mse": (
        "qwen2",
        "causal_lm",
        ALL_TERMS
        | {
            "attention": {"divergence": "mse", "layers": [[1, 1], [2, 2]]},
            "soft_label": {"divergence": "jsd"},
        },
        {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    family, task, terms, student = CASES[request.param]
    fusion = None
    if "domain" in terms:
        fusion = fitted(student_width=student["hidden_size"], layers=(2, 3))
        torch.nn.init.normal_(fusion.lift.weight)  # at 0, its initial value, the gate gets no gradient
    rig = Rig(family, task, terms, student, domain=fusion)
    rig.module.train()
    batch = make_batch(task)
    return rig, batch, rig.step(batch)


def assert_same(found, expected):
    total, raw, gradients = expected
    assert found[0] == pytest.approx(total, rel=1e-5)
    assert found[1] == pytest.approx(raw, rel=1e-5, abs=1e-8)
    assert found[2].keys() == gradients.keys()
    whole = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():
        # Gradients of key biases are 0 except for rounding, so a share of the largest gradient is allowed.
        error, size = (found[2][name] - gradient).norm(), gradient.norm()
        assert error <= 1e-5 * size + 1e-6 * whole, f"{name}: {error} of {size}, all {whole}"


def test_the_case_says_something(case):
    """Every term and nearly every parameter takes part; otherwise invariance would prove nothing."""
    rig, _, (total, raw, gradients) = case
    assert set(raw) == set(rig.objective.terms)
    assert all(value > 1e-3 for value in raw.values()), raw
    assert total == pytest.approx(
        sum(weight * raw[name] for name, weight in rig.objective.weights.items()), rel=1e-5
    )
    silent = [name for name, gradient in gradients.items() if not gradient.any()]
    assert not [name for name in silent if "position" not in name], silent
    assert {
        name for name in gradients if "projectors" in name
    } or rig.pair.student.width == rig.pair.teacher.width


def test_extra_padding(case):
    rig, batch, expected = case
    assert_same(rig.step(padded(batch, 5)), expected)


def test_order(case):
    rig, batch, expected = case
    order = [4, 0, 5, 3, 1, 2]
    assert_same(rig.step(rows(batch, order)), expected)


@pytest.mark.parametrize(
    "split", [[[0, 1, 2], [3, 4, 5]], [[3], [2, 5], [0, 1, 4]], [[i] for i in range(6)]], ids=len
)
def test_micro_batches(case, split):
    rig, batch, expected = case
    assert_same(rig.step(*(rows(batch, chosen) for chosen in split)), expected)


def test_filler_rows(case):
    rig, batch, expected = case
    assert_same(rig.step(with_filler(batch, 2)), expected)


def test_a_micro_batch_of_filler_alone(case):
    """A rank gets such a micro-batch if there are fewer rows than ranks."""
    rig, batch, expected = case
    filler = rows(with_filler(batch, 1), [0])
    assert not filler.rows.any()
    assert_same(rig.step(filler, batch), expected)
    counts = rig.counts([batch])
    loss, raw = rig.loss(filler, counts)
    loss.backward()
    assert loss.item() == 0 and not raw.any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in rig.module.parameters())


def test_nothing_valid_at_all(case):
    rig, batch, _ = case
    filler = rows(with_filler(batch, 1), [0])
    total, raw, gradients = rig.step(filler)
    assert total == 0 and not any(raw.values())
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_wrong_count_is_seen(case):
    """The same check must fail if each micro-batch divides by its own count, since then the split matters."""
    rig, batch, (total, _, _) = case
    halves = [rows(batch, [0, 1, 2]), rows(batch, [3, 4, 5])]
    losses = [rig.step(half)[0] for half in halves]
    assert sum(losses) / 2 != pytest.approx(total, rel=1e-4)
