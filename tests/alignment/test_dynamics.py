"""The logit lens (predictions of middle layers and their changes) is compared with whole logits."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from dsdistill.alignment.lens import change_alignment
from dsdistill.config import UserError
from dsdistill.models import probe as probe_module
from dsdistill.models.capture import Capture, final_norm
from dsdistill.models.probe import probe
from tests.alignment.rig import Rig, make_batch, padded, rows
from tests.models.families import CAUSAL, FAMILIES, architecture

STUDENT = {
    "gpt2": {"n_embd": 24, "n_layer": 2},
    "llama": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3},
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_changes(student, head, teacher, other_head, mask, caps=(None, None)):
    changes = []
    for states, matrix, cap in zip((student, teacher), (head, other_head), caps, strict=True):
        logits = [state @ matrix.T for state in states]
        if cap is not None:
            logits = [cap * torch.tanh(z / cap) for z in logits]
        lower, upper = (z.log_softmax(-1) for z in logits)
        changes.append(upper - lower)
    return (1 - F.cosine_similarity(*changes, dim=-1))[mask].sum()


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
def test_changes(blocks, monkeypatch):
    if blocks:
        for name in ("MIN_TOKENS", "MAX_TOKENS"):
            monkeypatch.setattr(f"dsdistill.ops.soft_label.head.{name}", 3)
    student = tuple(draw(2, 5, 4, seed=i).requires_grad_() for i in range(2))
    teacher = tuple(draw(2, 5, 6, seed=i) for i in (2, 3))
    heads = draw(11, 4, seed=4).requires_grad_(), draw(11, 6, seed=5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    found = change_alignment(student, heads[0], teacher, heads[1], mask=mask)
    gradients = torch.autograd.grad(found, student)
    expected = plain_changes(student, heads[0], teacher, heads[1], mask)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12) and found > 1
    for mine, true in zip(gradients, torch.autograd.grad(expected, student), strict=True):
        assert torch.allclose(mine, true, atol=1e-12) and true.any()
    index = mask.flatten().nonzero()[:, 0]
    same = change_alignment(student, heads[0], teacher, heads[1], index=index)
    assert torch.equal(same, found)
    for mine, true in zip(torch.autograd.grad(same, student), gradients, strict=True):
        assert torch.equal(mine, true)
    assert change_alignment(student, heads[0], student, heads[0], mask=mask).abs() < 1e-12
    again = change_alignment(student, heads[0], teacher, heads[1], mask=mask & False)
    assert again.item() == 0 and not torch.autograd.grad(again, student)[0].any()


@pytest.mark.parametrize("caps", [(1.5, 0.7), (2.0, None), (None, 2.0)], ids=str)
@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
def test_changes_of_capped_logits(caps, blocks, monkeypatch):
    if blocks:
        for name in ("MIN_TOKENS", "MAX_TOKENS"):
            monkeypatch.setattr(f"dsdistill.ops.soft_label.head.{name}", 3)
    student = tuple(draw(2, 5, 4, seed=i).requires_grad_() for i in range(2))
    teacher = tuple(draw(2, 5, 6, seed=i) for i in (2, 3))
    heads = draw(11, 4, seed=4), draw(11, 6, seed=5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()

    def changes(*states):
        options = {"student_softcap": caps[0], "teacher_softcap": caps[1]}
        return change_alignment(states, heads[0], teacher, heads[1], mask=mask, **options)

    found = changes(*student)
    expected = plain_changes(student, heads[0], teacher, heads[1], mask, caps)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12) and found > 1
    assert abs(found - plain_changes(student, heads[0], teacher, heads[1], mask)) > 1e-3
    for mine, true in zip(
        torch.autograd.grad(found, student), torch.autograd.grad(expected, student), strict=True
    ):
        assert torch.allclose(mine, true, atol=1e-12) and true.any()
    assert torch.autograd.gradcheck(changes, student)


def test_no_change_at_all():
    """If a layer changes nothing, the cosine is 0, and there is no gradient and no NaN."""
    state = draw(1, 3, 4).requires_grad_()
    teacher = draw(1, 3, 4, seed=1), draw(1, 3, 4, seed=2)
    found = change_alignment((state, state), draw(7, 4), teacher, draw(7, 4), mask=torch.ones(1, 3).bool())
    assert found.item() == pytest.approx(3) and not torch.autograd.grad(found, state)[0].any()


@pytest.mark.parametrize("family", STUDENT)
def test_definition(family):
    """The logit lens uses the library's own norm and head; gradients reach layers but not the head."""
    terms = {"fdd": {"layers": [[1, 2], [2, 3]], "levels": 0.5, "changes": 2.0}}
    rig = Rig(family, "causal_lm", terms, STUDENT[family])
    rig.module.double(), rig.teacher.double()
    batch = make_batch("causal_lm")
    total, _, gradients = rig.step(batch)
    rig.module.zero_grad()
    predictions = []
    for trace, model in ((rig.module.trace(batch), rig.student), (rig.teacher_trace(batch), rig.teacher)):
        norm, head = final_norm(model), model.get_output_embeddings().weight.detach()
        layers = [(1, 2), (2, 3)]
        index = 0 if model is rig.student else 1
        predictions.append(
            [(norm(trace.hidden[pair[index]]) @ head.T).log_softmax(-1)[:, :-1] for pair in layers]
        )
    counted = batch.mask[:, 1:]
    expected = 0.0
    for mine, other in zip(*predictions, strict=True):
        expected = expected + 0.5 * (other.exp() * (other - mine)).sum(-1)[counted].mean()
    changes = [upper - lower for lower, upper in predictions]
    expected = expected + 2 * (1 - F.cosine_similarity(*changes, dim=-1))[counted].mean()
    expected.backward()
    assert total == pytest.approx(expected.item(), rel=1e-6) and total > 0.1
    for name, parameter in rig.module.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-5, atol=1e-9), name
    head = [gradient for name, gradient in gradients.items() if "lm_head" in name]
    assert not any(gradient.any() for gradient in head)


def test_invariant():
    rig = Rig("llama", "causal_lm", {"fdd": {}}, STUDENT["llama"])
    batch = make_batch("causal_lm")
    total = rig.step(batch)[0]
    assert rig.step(padded(batch, 4))[0] == pytest.approx(total, rel=1e-5)
    parts = [rows(batch, chosen) for chosen in ([3], [0, 5], [1, 2, 4])]
    assert rig.step(*parts)[0] == pytest.approx(total, rel=1e-5)


def test_a_perfect_student_has_nothing_to_learn():
    rig = Rig("gpt2", "causal_lm", {"fdd": {}})
    batch = make_batch("causal_lm")
    far = rig.step(batch)[0]
    rig.student.load_state_dict(rig.teacher.state_dict())
    assert far > 0.1 and abs(rig.step(batch)[0]) < 1e-5


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_the_final_norm_is_found(family):
    probe(architecture(family), "causal_lm", "student", attention=False, hidden=True, lens=True)


def test_opt_and_a_model_without_a_final_norm():
    settings = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    for extra in ({}, {"do_layer_norm_before": False}):
        config = AutoConfig.for_model("opt", **settings, ffn_dim=48, word_embed_proj_dim=32, **extra)
        probe(config, "causal_lm", "student", attention=False, hidden=True, lens=True)


def test_another_way_to_the_head_is_refused(monkeypatch):
    monkeypatch.setattr("dsdistill.models.probe.final_norm", lambda model: None)
    probe_module._probe.cache_clear()
    with pytest.raises(
        UserError,
        match=r"^student: got model type gpt2, which has more than a norm between its last layer and",
    ):
        probe(architecture("gpt2"), "causal_lm", "student", attention=False, hidden=True, lens=True)


def test_the_trace_of_a_language_model_holds_its_norm():
    rig = Rig("gpt2", "causal_lm", {"fdd": {}})
    trace = rig.module.trace(make_batch("causal_lm"))
    assert torch.allclose(trace.norm(trace.hidden[3]), trace.output, atol=1e-6)
    assert isinstance(rig.module.student.capture, Capture) and "gpt2" in FAMILIES


@pytest.mark.parametrize(
    ("family", "task", "options", "message"),
    [
        ("bert", "classification", {}, "task classification, expected causal_lm"),
        ("gpt2", "causal_lm", {"layers": [[1, 1]]}, "one layer, expected two"),
        ("gpt2", "causal_lm", {"levels": 0.0, "changes": 0.0}, "levels 0 and changes 0"),
    ],
)
def test_refused(family, task, options, message):
    with pytest.raises(UserError, match=message):
        Rig(family, task, {"fdd": options})
