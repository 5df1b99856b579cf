"""The map of teacher states, the fusion and the aggregate are tested."""

import pytest
import torch
import torch.nn.functional as F

from dsdistill.config import UserError
from dsdistill.data.batch import NO_LABEL, PHRASE
from dsdistill.models.domain_fusion import Aggregate, DomainFusion, TeacherMap, normed
from dsdistill.models.trace import DomainTrace, Trace
from tests.alignment.rig import Rig, make_batch, padded, rows, with_filler

TERMS = {"domain": {}}


def fitted(width=4, teacher_width=32, layers=(3,), student_width=32) -> DomainFusion:
    torch.manual_seed(1)
    fusion = DomainFusion(width, student_width, teacher_width, layers)
    for found in fusion.maps.values():
        states = normed(torch.randn(500, teacher_width) * torch.linspace(3, 0.1, teacher_width)).double()
        found.fit(500, states.sum(0), states.T @ states)
    return fusion


def test_the_map_is_the_principal_components():
    torch.manual_seed(0)
    states = torch.randn(400, 8) * torch.tensor([5.0, 3, 1, 1, 1, 1, 1, 1])
    found, rows_ = TeacherMap(8, 3), normed(states).double()
    found.fit(400, rows_.sum(0), rows_.T @ rows_)
    z = found(states[None])[0].double()
    assert z.mean(0).abs().max() < 1e-5
    assert z.var(0, correction=0).mean().item() == pytest.approx(1, rel=1e-4)
    covariance = z.T @ z / 400
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-5
    _, _, right = torch.linalg.svd(rows_ - rows_.mean(0), full_matrices=False)
    assert (found.components.double() @ right[:3].T).abs().diag().min() > 1 - 1e-5
    assert not list(found.parameters())  # there is nothing that training could make collapse


def test_the_student_begins_as_it_was_and_hands_over():
    fusion = fitted().train()
    embedded = torch.randn(2, 5, 32)
    x, _ = fusion(embedded)
    torch.testing.assert_close(x, embedded)
    torch.nn.init.normal_(fusion.lift.weight)
    teacher = Trace(hidden={3: torch.randn(2, 5, 32)})
    fusion.share = 0.5
    targets = fusion.prepare(
        teacher, torch.tensor([[0.4], [0.6]])
    )  # the first takes Z, the second its prediction
    mixed, predicted = fusion(embedded)
    known = torch.stack([targets[3][0], predicted[1]])
    gate = torch.sigmoid(F.linear(torch.cat([embedded, known], -1), fusion.gate.weight, fusion.gate.bias))
    torch.testing.assert_close(mixed, embedded + gate * (known @ fusion.lift.weight.T))
    assert not fusion.eval().prepare(
        teacher, torch.tensor([[0.0], [0.0]])
    )  # evaluation never looks at the teacher
    alone, _ = fusion(embedded)
    torch.testing.assert_close(alone[1], mixed[1])
    assert not torch.allclose(alone[0], mixed[0])


def test_the_aggregate_gates_three_granularities():
    torch.manual_seed(0)
    aggregate = Aggregate(6)
    mean, phrases, end = torch.randn(2, 6), torch.randn(2, 3, 6), torch.randn(2, 6)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    found = aggregate(mean, phrases, mask, end)
    gates = [
        torch.sigmoid(gate(v)) for gate, v in zip(aggregate.gates, (mean, phrases[:, 0], end), strict=True)
    ]
    torch.testing.assert_close(found[1], (gates[0] * mean + gates[2] * end)[1])  # no phrase
    shares = aggregate.attend(phrases[0, :2])[:, 0].softmax(0)
    pooled = shares @ phrases[0, :2]
    want = gates[0][0] * mean[0] + torch.sigmoid(aggregate.gates[1](pooled)) * pooled + gates[2][0] * end[0]
    torch.testing.assert_close(found[0], want)
    assert aggregate(mean, phrases[:, :0], mask[:, :0], end).isfinite().all()


def rig(task="masked_lm", terms=None, layers=(2, 3)) -> Rig:
    """Return a rig whose student has a fusion."""
    found = Rig(
        "llama" if task == "causal_lm" else "bert",
        task,
        terms or TERMS,
        student={"num_hidden_layers": 2},
        domain=fitted(layers=layers),
    )
    found.module.train()
    return found


@pytest.mark.parametrize(
    ("task", "decoder"), [("masked_lm", 0.0), ("masked_lm", 0.7), ("causal_lm", 0.0), ("classification", 0.0)]
)
def test_padding_fillers_and_splits_change_nothing(task, decoder):
    found = rig(
        task, {"domain": {"sequences": 0.0, "decoder": decoder}}
    )  # sequences depend on the micro-batch
    batch = make_batch(task)
    total, raw, gradients = found.step(batch)
    assert total > 0 and all(value.isfinite().all() for value in gradients.values())
    assert gradients["domain.predictor.0.weight"].abs().sum() > 0
    for other in (
        [padded(batch, 3)],
        [with_filler(batch, 2)],
        [rows(batch, [0, 2]), rows(batch, [1, 3, 4, 5])],
    ):
        again, found_raw, _ = found.step(*other)
        assert again == pytest.approx(total, rel=1e-4)
        assert found_raw == pytest.approx(raw, rel=1e-4)


def test_sequences_do_not_see_padding_order_or_fillers():
    """Every part is on. All examples are in one micro-batch, so gradients are the same too."""
    found = rig()
    torch.nn.init.normal_(found.module.domain.lift.weight)
    batch = make_batch("masked_lm")
    total, raw, gradients = found.step(batch)
    names = [name for name, gradient in gradients.items() if gradient.any()]
    assert {"domain.gate.weight", "objective.terms.domain.aggregate.attend.weight"} <= set(names)
    whole = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    for other in (padded(batch, 3), rows(batch, [4, 0, 5, 3, 1, 2]), with_filler(batch, 2)):
        again, found_raw, found_gradients = found.step(other)
        assert again == pytest.approx(total, rel=1e-5) and found_raw == pytest.approx(raw, rel=1e-5)
        for name in names:
            error = (found_gradients[name] - gradients[name]).norm()
            assert error <= 1e-5 * gradients[name].norm() + 1e-6 * whole, name


def test_a_perfect_student_has_nothing_to_learn():
    """If the student is the teacher, ψ its map, the aggregate its mean, and the prediction right, each part is 0."""
    found = Rig("bert", "masked_lm", TERMS, domain=fitted(layers=(1, 2, 3)))
    found.module.train()
    term, fusion, batch = found.objective.terms["domain"], found.module.domain, make_batch("masked_lm")
    assert term.parts == 7  # three layers, tokens, phrases, sequences, predictor

    def parts(right: bool):
        teacher, student = found.teacher_trace(batch), found.module.trace(batch)
        targets = fusion.targets(teacher)
        predicted = student.domain.predicted
        student.domain = DomainTrace(targets, targets[3] if right else predicted)
        return term.sums(student, teacher, batch)

    far = parts(right=False)
    found.student.load_state_dict(found.teacher.state_dict())
    with torch.no_grad():
        for layer in (1, 2, 3):  # BERT's states are layer-normed already: without a mean the map is linear
            fusion.maps[str(layer)].mean.zero_()
            scaled = fusion.maps[str(layer)].components / fusion.maps[str(layer)].scale
            term.projectors[f"{layer}-{layer}"].weight.copy_(scaled)
        for gate, bias in zip(term.aggregate.gates, (0.0, -100.0, -100.0), strict=True):
            gate.weight.zero_(), gate.bias.fill_(bias)
    near = parts(right=True)
    assert (far > 1e-4).all() and (near < 1e-6 * far.clamp(min=1)).all(), (far, near)


def test_the_parts_by_hand():
    found = rig(
        terms={"domain": {"layers": [[2, 3]], "tokens": 2.0, "phrases": 0.0, "sequences": 0.0}}, layers=(3,)
    )
    batch = make_batch("masked_lm")
    total, _, _ = found.step(batch)
    with torch.no_grad():
        teacher = found.teacher_trace(batch)
        targets = found.module.domain.targets(teacher)[3]
        student = found.module.trace(batch)
        predicted = student.domain.predicted
        psi = found.objective.terms["domain"].projectors["2-3"]
        mine, other = student.hidden[2], teacher.hidden[3]
        hidden = F.mse_loss(F.linear(mine, psi.weight)[batch.mask], targets[batch.mask])
        predictor = F.mse_loss(predicted[batch.mask], targets[batch.mask])
        tokens = 0.0
        for row, mask in enumerate(batch.mask):
            a, b = (F.normalize(x[row, mask], dim=-1) for x in (mine, other))
            tokens += (a @ a.T - b @ b.T).square().mean() / len(batch.mask)
    assert total == pytest.approx(float(hidden + 2 * tokens + predictor), rel=1e-4)


def test_the_light_decoder_by_hand():
    """Hidden tokens are predicted from Y and their places alone: by gated sums, sines and cosines written out here."""
    parts = {
        "hidden": 0.0,
        "tokens": 0.0,
        "phrases": 0.0,
        "sequences": 0.0,
        "predictor": 1e-9,
        "decoder": 3.0,
    }
    found = rig(terms={"domain": parts | {"layers": [[2, 3]]}}, layers=(3,))
    batch = make_batch("masked_lm")
    total, _, gradients = found.step(batch)
    term = found.objective.terms["domain"]
    with torch.no_grad():
        student = found.module.trace(batch)
        states, losses = student.hidden[2], []
        for row, mask in enumerate(batch.mask):
            spans = [(a, b) for at, a, b, kind in batch.spans.tolist() if at == row and kind == PHRASE]
            phrases = [states[row, a:b].mean(0) for a, b in spans]
            shares = torch.tensor([float(term.aggregate.attend(v)) for v in phrases]).softmax(0)
            pooled = sum(
                (share * v for share, v in zip(shares, phrases, strict=True)), torch.zeros_like(states[0, 0])
            )
            granularities = states[row, mask].mean(0), pooled, states[row, 0]
            vector = sum(
                torch.sigmoid(gate(v)) * v
                for gate, v in zip(term.aggregate.gates, granularities, strict=True)
            )
            half = states.shape[-1] // 2
            for place in range(batch.mask.shape[1]):
                if batch.labels[row, place] == NO_LABEL:
                    continue
                angles = torch.tensor([place / 10000 ** (i / half) for i in range(half)])
                encoded = torch.cat([angles.sin(), angles.cos()])
                state = F.gelu(term.decoder.vector(vector) + term.decoder.place(encoded))
                logits = F.linear(term.decoder.norm(state), student.head, student.head_bias)
                losses.append(-logits.log_softmax(-1)[batch.labels[row, place]])
    assert total == pytest.approx(3 * float(torch.stack(losses).mean()), rel=1e-4)
    for name in (
        "decoder.vector.weight",
        "decoder.place.weight",
        "decoder.norm.weight",
        "aggregate.attend.weight",
    ):
        assert gradients[f"objective.terms.domain.{name}"].any(), name
    with pytest.raises(UserError, match="decoder: got task causal_lm"):
        rig("causal_lm", {"domain": {"decoder": 1.0}})


def test_maps_trained_with_what_matches_them_collapse():
    """This is why student.domain.teacher_map: trained is refused: the loss falls to 0, and so do the features."""
    torch.manual_seed(0)
    teacher, student = torch.randn(256, 16), torch.randn(256, 8)  # unrelated spaces
    phi, psi = torch.nn.Linear(16, 4, bias=False), torch.nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.Adam([*phi.parameters(), *psi.parameters()], lr=0.05)
    before = phi(teacher).var().item()
    for _ in range(300):
        optimizer.zero_grad()
        loss = F.mse_loss(psi(student), phi(teacher))
        loss.backward()
        optimizer.step()
    assert loss < 1e-3 and phi(teacher).var() < 1e-3 * before


def test_labels_of_masked_batches_are_elsewhere_none():
    batch = make_batch("masked_lm")
    assert ((batch.labels != NO_LABEL) <= batch.mask).all()
