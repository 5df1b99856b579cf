"""Layers are matched before training, by how alike they are."""

import json
from itertools import combinations

import numpy as np
import pytest

from dsdistill.engine.passes.layer_similarity import most_similar
from tests.engine.launch import run_configs
from tests.engine.test_resume import losses, write


def test_by_hand():
    assert most_similar(np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.4]])) == ((1, 1), (2, 3))
    # Each layer's argmax is layer 1; in increasing order, the second layer loses least at 2.
    assert most_similar(np.array([[0.5, 0.4, 0.4], [0.9, 0.8, 0.1]])) == ((1, 1), (2, 2))


@pytest.mark.parametrize("seed", range(20))
def test_no_other_order_is_better(seed):
    similarity = np.random.default_rng(seed).uniform(-0.2, 1, (3, 6))
    totals = {
        choice: sum(similarity[s, t] for s, t in enumerate(choice)) for choice in combinations(range(6), 3)
    }
    best = max(totals, key=totals.get)
    assert most_similar(similarity) == tuple((s + 1, t + 1) for s, t in enumerate(best))


def test_a_student_finds_the_layers_it_was_cut_from(settings, tmp_path):
    """On two ranks, the teacher sharded; a second run reads what the first found."""
    settings["student"] = {"from_teacher": [1, 4]}
    settings["terms"] = {"task": {}, "hidden": {"layers": "cka_offline"}}
    settings["train"] |= {"steps": 2}
    path = write(settings, tmp_path, "run")
    log = run_configs([path])
    # The first layer is identical; later layers are other functions of other states.
    pairs = json.loads((tmp_path / "run" / "layers.json").read_text())
    assert pairs[0] == [1, 1] and pairs[1][1] > 1
    assert "layers by CKA: 1 from 1, 2 from" in log
    first = losses(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    settings["terms"]["hidden"]["layers"] = pairs
    run_configs([write(settings, tmp_path, "given")])
    assert losses(tmp_path / "given") == first
