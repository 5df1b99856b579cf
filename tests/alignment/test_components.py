"""Hidden states are compared with principal components of the teacher's states; checked by hand."""

import pytest
import torch
import torch.nn.functional as F

from dsdistill.config import UserError
from tests.alignment.rig import Rig, make_batch


def test_by_hand():
    """The map is fitted to the states of one batch; an SVD in float64 must give the same components."""
    terms = {"feature": {"components": 3, "divergence": "mse", "layers": [[2, 2]]}}
    rig = Rig("bert", terms=terms, student={"num_hidden_layers": 2})
    term, batch = rig.objective.terms["feature"], make_batch("classification")
    teacher = rig.teacher_trace(batch).hidden[2][batch.mask].double()
    normed = F.layer_norm(teacher, teacher.shape[-1:])
    (made,) = term.teacher_maps.values()
    made.fit(len(normed), normed.sum(0), normed.T @ normed)
    with torch.no_grad():
        student = rig.module.trace(batch).hidden[2][batch.mask].double()
    centred = normed - normed.mean(0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    scores = left[:, :3] * values[:3]
    scores = scores / scores.square().mean().sqrt()
    mine = student @ term.projectors["2-2"].weight.double().T
    target = made(teacher.float()[None])[0].double()
    # A component's sign is arbitrary.
    torch.testing.assert_close(target.abs(), scores.abs(), rtol=1e-3, atol=1e-4)
    total, raw, gradients = rig.step(batch)
    assert total == raw["feature"] == pytest.approx((mine - target).square().mean().item(), rel=1e-4)
    assert gradients["objective.terms.feature.projectors.2-2.weight"].any()
    assert not any(".maps." in name for name in gradients)


def test_more_components_than_values_are_refused():
    with pytest.raises(
        UserError, match=r"^terms\.hidden\.components: got 33, expected at most the teacher's width, 32"
    ):
        Rig("bert", terms={"hidden": {"components": 33}})
