"""MTA's term against its definition, written out with whole matrices and loops over spans."""

import math

import pytest
import torch
import torch.nn.functional as F

from dsdistill.alignment import span_grid as module
from dsdistill.alignment.span_grid import SpanGrid, token_weights
from dsdistill.alignment.terms import TERMS, Pair, Shape
from dsdistill.config import UserError
from dsdistill.config.terms import Trajectory
from dsdistill.data.batch import PHRASE, WORD, Batch
from dsdistill.models.trace import Trace
from tests.alignment.rig import Rig, make_batch

STUDENT = {"hidden_size": 24, "num_hidden_layers": 2}
LAYERS = {"word_layers": [[1, 2]], "phrase_layers": [[2, 3]]}


def plain_weights(states, valid):
    """Return (n,) the token weights of one sequence, from its valid tokens alone."""
    states = states[valid].double()
    n, width = states.shape
    if n < 2:
        return torch.zeros(n, dtype=torch.float64)
    states = states / states.std(-1, keepdim=True, correction=0)
    scores = states @ states.T / math.sqrt(width)
    return scores.masked_fill(torch.eye(n, dtype=torch.bool), -math.inf).softmax(-1).mean(0)


def plain_term(student, teacher, spans, batch, projection, weighted=True):
    """Return DSA over ordered pairs and Hid of one layer, both as means over sequences."""
    structure = hidden = 0.0
    for row, valid in enumerate(batch.mask):
        weights = plain_weights(teacher[row], valid) if weighted else torch.ones(len(valid)) / valid.sum()
        own = [(first, past) for r, first, past in spans if r == row]
        if not own or not weights.any():
            continue
        covered = sorted({t for first, past in own for t in range(first, past)})
        cosines = F.cosine_similarity(student[row] @ projection.T, teacher[row], dim=-1)
        hidden = hidden + sum(weights[t] * (1 - cosines[t]) for t in covered)
        shares = torch.stack([weights[first:past].sum() for first, past in own])
        shares = shares / shares.sum()
        units = [
            [(weights[a:b, None] * x[row, a:b]).sum(0) / weights[a:b].sum() for a, b in own]
            for x in (student, teacher)
        ]
        for i in range(len(own)):
            for j in range(len(own)):
                if i != j:
                    apart = [1 - F.cosine_similarity(of[i], of[j], dim=0) for of in units]
                    structure = structure + shares[i] * shares[j] * (apart[0] - apart[1]) ** 2
    return structure / len(batch.mask), hidden / len(batch.mask)


class TestTokenWeights:
    def test_by_hand(self):
        """Tokens (3, 1), (1, 3), (2, 0), all of spread 1; the scores are 6/√2, 6/√2 … as in the comment."""
        states = torch.tensor([[[3.0, 1.0], [1.0, 3.0], [2.0, 0.0]]])
        # Products 01: 6, 02: 6, 12: 2. So 0 attends to both equally; 1 and 2 attend to 0 with σ(4/√2) and to each other
        # with the rest.
        share = 1 / (1 + math.exp(-4 / math.sqrt(2)))
        expected = torch.tensor([2 * share, 1 / 2 + 1 - share, 1 / 2 + 1 - share]) / 3
        found = token_weights(states, torch.ones(1, 3, dtype=torch.bool))
        assert torch.allclose(found[0], expected, atol=1e-6) and found.sum().item() == pytest.approx(1)

    @pytest.mark.parametrize("block", [1, 40, 1 << 21])
    def test_blocks_and_padding(self, block, monkeypatch):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(5, 9, 6, generator=generator, dtype=torch.float64)
        mask = torch.arange(9) < torch.tensor([9, 4, 2, 1, 0])[:, None]
        states[~mask] = torch.nan
        found = token_weights(states, mask)
        for row, valid in enumerate(mask):
            assert torch.allclose(found[row, valid], plain_weights(states[row], valid), atol=1e-12)
        assert not found[~mask].any()
        assert found.sum(1).tolist() == pytest.approx([1, 1, 1, 0, 0])

    def test_large_half_precision(self):
        states = (1e4 * torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))).half()
        assert token_weights(states, torch.ones(2, 7, dtype=torch.bool)).isfinite().all()


class TestGrid:
    def test_by_hand(self):
        """The first row has two spans (one of two tokens), the second none, the third one; spans may overlap."""
        spans = torch.tensor([[0, 0, 2, WORD], [0, 1, 2, WORD], [2, 2, 3, WORD]])
        grid = SpanGrid(spans, 3, 3)
        assert grid.mask.tolist() == [[True, True], [False, False], [True, False]]
        assert grid.covered.tolist() == [[True, True, False], [False] * 3, [False, False, True]]
        weights = torch.tensor([[1.0, 3.0, 9.0], [1.0, 1.0, 1.0], [0.0, 0.0, 2.0]])
        assert grid.weights(weights).tolist() == [
            [pytest.approx(4 / 7), pytest.approx(3 / 7)],
            [0, 0],
            [1, 0],
        ]
        hidden = torch.arange(9.0).reshape(3, 3, 1)
        assert grid.vectors(hidden, weights)[..., 0].tolist() == [[0.75, 1], [0, 0], [8, 0]]

    def test_no_span(self):
        grid = SpanGrid(torch.empty(0, 4, dtype=torch.int64), 2, 3)
        assert grid.mask.shape == (2, 0) and not grid.covered.any()


@pytest.mark.parametrize(("pairs", "expected"), [("ordered", 1 / 2), ("upper", 1 / 4)])
def test_structure_by_hand(pairs, expected):
    """Two spans of a token each, of weight 1/2: at right angles in the student (δ = 1), parallel in the teacher (0)."""
    shape = Shape(depth=1, width=2, heads=1, key_heads=1, head_width=2, vocabulary=9)
    config = Trajectory(word_layers=[[1, 1]], hidden=0.0, pairs=pairs)
    term = TERMS["trajectory"](config, Pair(shape, shape, "classification", "auto"))
    student, teacher = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]]), torch.tensor([[[1.0, 2.0], [2.0, 4.0]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert token_weights(teacher, mask).tolist() == [[0.5, 0.5]]  # each attends only to the other
    batch = Batch(mask.long(), mask, None, spans=torch.tensor([[0, 0, 1, WORD], [0, 1, 2, WORD]]))
    found = term.sums(Trace(hidden={1: student}), Trace(hidden={1: teacher}), batch)
    assert found.tolist() == pytest.approx([expected]) and term.counts(batch, {}).tolist() == [1]


@pytest.mark.parametrize(("pairs", "weighted"), [("ordered", True), ("upper", True), ("ordered", False)])
def test_definition(pairs, weighted):
    """Value and gradients are compared in float64."""
    options = LAYERS | {"pairs": pairs, "weighted": weighted, "structure": 3.0, "hidden": 0.5}
    rig = Rig("bert", terms={"trajectory": options}, student=STUDENT)
    rig.module.double(), rig.teacher.double()
    batch = make_batch("classification")
    total, raw, gradients = rig.step(batch)

    rig.module.zero_grad()
    mine, other = rig.module.trace(batch).hidden, rig.teacher_trace(batch).hidden
    projectors = rig.objective.terms["trajectory"].projectors
    expected = 0.0
    for kind, name, s, t in ((WORD, "word-1-2", 1, 2), (PHRASE, "phrase-2-3", 2, 3)):
        spans = [tuple(span[:3]) for span in batch.spans.tolist() if span[3] == kind]
        structure, hidden = plain_term(mine[s], other[t], spans, batch, projectors[name].weight, weighted)
        assert structure > 1e-3 and hidden > 1e-2
        expected = expected + 3.0 * (structure / 2 if pairs == "upper" else structure) / 2 + 0.5 * hidden
    expected.backward()
    assert total == pytest.approx(expected.item(), rel=1e-6) and raw["trajectory"] == pytest.approx(total)
    for name, parameter in rig.module.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-5, atol=1e-9), name


@pytest.mark.parametrize(("options", "parts"), [({"structure": 0.0}, 2), ({"hidden": 0.0}, 2), ({}, 4)])
def test_ablations(options, parts):
    rig = Rig("bert", terms={"trajectory": LAYERS | options}, student=STUDENT)
    term = rig.objective.terms["trajectory"]
    assert term.parts == parts and bool(len(term.projectors)) == (options.get("hidden", 1) > 0)
    assert rig.step(make_batch("classification"))[0] > 0


def test_a_perfect_student_has_nothing_to_learn():
    rig = Rig("bert", terms={"trajectory": {"word_layers": [[1, 1]], "phrase_layers": [[3, 3]]}})
    batch = make_batch("classification")
    far = rig.step(batch)[0]
    rig.student.load_state_dict(rig.teacher.state_dict())
    with torch.no_grad():
        for projector in rig.objective.terms["trajectory"].projectors.values():
            torch.nn.init.eye_(projector.weight)
    assert far > 1e-2 and rig.step(batch)[0] < 1e-6


def test_structure_does_not_see_a_rotation():
    """Rotating the student's space changes nothing, since only cosines are compared."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 9, w, generator=generator, dtype=torch.float64) for w in (5, 6))
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    rig = Rig("bert", terms={"trajectory": LAYERS}, student=STUDENT)
    batch = make_batch("classification", (9, 9), width=9)
    grid = SpanGrid(batch.spans[batch.spans[:, 3] == WORD], 2, 9)
    weights = token_weights(teacher, batch.mask)
    found = [
        rig.objective.terms["trajectory"]._structure(x, teacher, grid, weights).item()
        for x in (student, student @ turn)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-9) and found[0] > 1e-2


def test_fewer_than_two_spans():
    """One span, no span or one token has no structure; gradients are finite."""
    rig = Rig("bert", terms={"trajectory": LAYERS | {"hidden": 0.0}}, student=STUDENT)
    total, _, gradients = rig.step(
        make_batch("classification", (4, 3, 2, 1), width=4)
    )  # phrases: one in the first
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert total > 0  # of the words of the first two
    rig = Rig("bert", terms={"trajectory": {"phrase_layers": [[2, 3]], "hidden": 0.0}}, student=STUDENT)
    assert rig.step(make_batch("classification", (4, 3, 2, 1), width=4))[0] == pytest.approx(0, abs=1e-12)
    assert rig.step(make_batch("classification", (1, 1), width=2))[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither word_layers nor phrase_layers"),
        (LAYERS | {"structure": 0.0, "hidden": 0.0}, "structure 0 and hidden 0"),
        ({"word_layers": [[9, 1]]}, r"terms.trajectory.word_layers: got student layer 9"),
    ],
)
def test_refused(options, message):
    with pytest.raises(UserError, match=message):
        Rig("bert", terms={"trajectory": options})
