"""A loader mixes examples with others of their step."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dsdistill.config import UserError
from dsdistill.config.load import make_config
from dsdistill.data import Loader
from tests.data.rig import made

SIZE, STEP = 24, 8


def examples():
    """Return examples of unequal lengths; example i holds only the token i + 1 and has the label i."""
    return replace(made([[i + 1] * (2 + i % 4) for i in range(SIZE)]), labels=torch.arange(SIZE))


def rows(ranks: int, micro: int, step: int) -> dict[int, tuple]:
    """Return by example its partner, the partner's label and share, and its own tokens and mask, over all ranks."""
    found = {}
    for rank in range(ranks):
        for batch in Loader(examples(), STEP, micro, ranks, rank, 3, 0, mixup=0.4).step(1, step):
            assert batch.partner_ids.shape == batch.mask.shape == batch.input_ids.shape
            for row, own in enumerate(batch.index.tolist()):
                partner = batch.partner_ids[row]
                assert set(partner.tolist()) <= {0, int(partner[0])}
                assert batch.input_ids[row, 0] == own + 1 and batch.labels[row] == own
                label, share = int(batch.partner_labels[row]), float(batch.share[row])
                assert partner[0] == label + 1
                longest = max(2 + own % 4, 2 + label % 4 if share < 1 else 0)
                assert batch.mask[row].sum() == longest
                found[own] = label, share
    return found


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (1, 2), (2, 4), (2, 1)])
def test_partners_depend_on_the_step_alone(ranks, micro):
    found, expected = rows(ranks, micro, 1), rows(1, 4, 1)
    assert found == expected
    assert {label for label, _ in found.values()} == set(found)  # each is the partner of exactly one
    shares = np.array([share for _, share in found.values()])
    assert (shares == 1).sum() == STEP / 2 and ((shares > 0) & (shares <= 1)).all()
    assert rows(1, 4, 0).keys() != found.keys()


def test_without_it_nothing_is_mixed():
    (batch,) = Loader(examples(), STEP, STEP, 1, 0, 3, 0).step(1, 1)
    assert batch.share is None and batch.partner_ids is None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"task": "causal_lm"},
            "data.mixup: got 0.4 with task causal_lm, expected classification or regression",
        ),
        ({"terms": {"trajectory": {"word_layers": [[1, 1]]}}}, "data.mixup: got 0.4 with a term over spans"),
    ],
)
def test_where_it_cannot_be(changes, line):
    config = {
        "teacher": {"path": "t"},
        "student": {"path": "s"},
        "terms": {"task": {}},
        "data": {"mixup": 0.4},
    }
    make_config(config, "x")
    with pytest.raises(UserError, match=line):
        make_config(config | changes, "x")
