"""The rules of layer weights are checked by hand, and the weights must come back from a checkpoint."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from dsdistill.alignment.objective import Objective
from dsdistill.alignment.terms import Pair, Shape
from dsdistill.alignment.weighting import Dynamic, EarthMover, transport
from dsdistill.config import UserError
from dsdistill.config.terms import Terms
from tests.alignment.rig import Rig, make_batch


class TestDynamic:
    def test_by_hand(self):
        rule = Dynamic(2)
        rule.begin(20)  # the reference is step 2
        rule.update([4.0, 1.0])
        assert rule.values == [1, 1]
        rule.update([2.0, 1.0])  # averages 3.98 and 1: the reference
        assert rule.values == pytest.approx([1, 1])
        rule.update([0.0, 1.0])  # 3.9402 and 1: relative 0.99 and 1
        first = 2 / (1 + math.exp(1 - 3.9402 / 3.98))
        assert rule.values == pytest.approx([first, 2 - first])
        assert rule.values[1] > 1  # the layer that lags behind gains

    def test_scale_of_a_layers_loss_does_not_matter(self):
        rules = [Dynamic(2), Dynamic(2)]
        for step in range(1, 20):
            rules[0].update([1 / step, 1.0])
            rules[1].update([1000 / step, 0.001])
        assert rules[0].values == pytest.approx(rules[1].values)

    def test_nothing_finite_changes_nothing(self):
        rule = Dynamic(2)
        rule.begin(10)
        for losses in ([1.0, 2.0], [0.5, 2.0]):
            rule.update(losses)
        before = rule.state()
        rule.update([math.nan, 1.0])
        assert rule.state() == before


class TestEarthMover:
    def test_transport_by_hand(self):
        flow = transport(np.array([[1.0, 4.0], [2.0, 1.0]]), [0.5, 0.5], [0.25, 0.75])
        # Row 2 fills column 2 (cost 1); row 1 takes column 1 whole and what column 2 still lacks.
        assert flow.flatten().tolist() == pytest.approx([0.25, 0.25, 0, 0.5])

    def test_by_hand(self):
        rule = EarthMover(1, 2, before=1)
        assert rule.values == [1, 0.5, 0.5]
        rule.update([9.0, 1.0, 3.0])  # one row must feed both columns alike
        assert rule.values == pytest.approx([1, 0.5, 0.5])
        # The columns' unit costs are 1 and 3: weights 4/1 and 4/3, normalised 3/4 and 1/4.
        assert rule.masses[0] == pytest.approx([1]) and rule.masses[1] == pytest.approx([0.75, 0.25])
        rule.update([9.0, 1.0, 3.0])
        assert rule.values == pytest.approx([1, 0.75, 0.25])

    def test_flow_goes_where_it_is_cheap(self):
        rule = EarthMover(2, 4)
        cheap = [1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 1.0, 1.0]
        rule.update(cheap)
        assert rule.values == pytest.approx([0.25, 0.25, 0, 0, 0, 0, 0.25, 0.25], abs=1e-9)
        assert sum(rule.values) == pytest.approx(1)


@pytest.mark.parametrize("make", [lambda: Dynamic(3), lambda: EarthMover(1, 3)])
def test_state_comes_back(make):
    rule, other = make(), make()
    rule.begin(10), other.begin(10)
    for step in range(5):
        rule.update([1.0, 2.0 / (step + 1), 3.0])
    other.load(rule.state())
    for each in (rule, other):
        each.update([1.0, 1.0, 1.0])
    assert other.state() == rule.state()
    assert rule.moves


class TestInAnObjective:
    """A bert student has 2 layers, its teacher 3; the same batch is used step after step."""

    def step(self, rig, batch):
        counts = rig.counts([batch])
        loss, raw = rig.loss(batch, counts)
        return loss, raw.double()

    def test_emd(self):
        terms = {
            "hidden": {"layers": "emd", "projector": "linear"},
            "attention": {"layers": "emd", "heads": "mean"},
        }
        rig, batch = Rig("bert", terms=terms, student={"num_hidden_layers": 2}), make_batch("classification")
        hidden, attention = rig.objective.terms.values()
        assert hidden.layers == ((0, 0), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3))
        # A student layer has one projector, whatever it is compared with.
        assert sorted(hidden.projectors) == ["0", "1", "2"]
        loss, raw = self.step(rig, batch)
        expected = raw[0] + raw[1:7].mean() + raw[7:].mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        rig.objective.update(raw)
        flow = torch.tensor(transport(raw[1:7].reshape(2, 3).numpy(), [0.5] * 2, [1 / 3] * 3)).flatten()
        loss, again = self.step(rig, batch)
        torch.testing.assert_close(again, raw, rtol=1e-6, atol=0)
        other = torch.tensor(attention.weighting.values, dtype=torch.float64)
        expected = raw[0] + (flow * raw[1:7]).sum() + (other * raw[7:]).sum()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert expected < raw[0] + raw[1:7].mean() + raw[7:].mean()  # the flow is the cheapest one
        report = rig.objective.report(raw)
        assert report["hidden"]["layer_weights"] == hidden.weighting.values
        assert sum(term["weighted"] for term in report.values()) == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        assert all(p.weight.grad.isfinite().all() for p in hidden.projectors.values())

    def test_shared_masses(self):
        """Both terms go on with the mean of the masses that each would have alone, and with a flow of this mean."""
        settings = {"layers": "emd", "layer_masses": "shared"}
        terms = {"hidden": settings | {"embedding": False}, "attention": settings | {"heads": "mean"}}
        batch, masses = make_batch("classification"), []
        for kept in (["hidden"], ["attention"], ["hidden", "attention"]):
            given = {name: terms[name] for name in kept}
            rig = Rig("bert", terms=given, student={"num_hidden_layers": 2})
            _, raw = self.step(rig, batch)
            rig.objective.update(raw)
            masses.append([term.weighting.masses for term in rig.objective.terms.values()])
        (alone,), (other,), together = masses
        for side in range(2):
            mean = (np.array(alone[side]) + np.array(other[side])) / 2
            assert together[0][side] == together[1][side] == pytest.approx(mean.tolist(), rel=1e-9)
        assert alone[0] != pytest.approx(other[0], rel=1e-3)
        rig.objective.update(raw)
        for term, costs in zip(rig.objective.terms.values(), raw.split(6), strict=True):
            flow = transport(costs.reshape(2, 3).numpy(), *together[0]).flatten()
            assert term.weighting.values == pytest.approx(flow.tolist(), abs=1e-9)

    def test_masses_are_shared_by_terms_of_the_same_layers(self):
        settings = {"layers": "emd", "layer_masses": "shared"}
        terms = Terms(hidden=settings, attention=settings)
        shape = Shape(depth=4, width=8, heads=2, key_heads=2, head_width=4, vocabulary=9)
        hybrid = dataclasses.replace(shape, attention_layers=(2, 4))
        with pytest.raises(UserError, match=r"hidden 4 × 4, attention 2 × 4\), expected own"):
            Objective(terms, Pair(hybrid, shape, "causal_lm", "auto"))

    def test_dynamic(self):
        terms = {"hidden": {"layer_weights": "dynamic", "layer_agg": "sum", "weight": 2.0}}
        rig, batch = Rig("bert", terms=terms, student={"num_hidden_layers": 2}), make_batch("classification")
        _, raw = self.step(rig, batch)
        rig.objective.restore({"hidden": Dynamic(3).state() | {"values": [0.5, 1.0, 1.5]}})
        loss, _ = self.step(rig, batch)
        expected = 2 * (0.5 * raw[0] + raw[1] + 1.5 * raw[2])
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert rig.objective.state()["hidden"]["values"] == [0.5, 1.0, 1.5]
