"""Samplers that ask the teacher are tested in whole runs."""

import math

import numpy as np
import pytest
import torch
import yaml

from dsdistill.config import UserError
from dsdistill.config.load import make_config
from dsdistill.data.batch import NO_LABEL, Batch
from dsdistill.engine.passes.teacher_scores import entropy
from dsdistill.models.trace import Trace
from tests.engine.launch import run_configs
from tests.engine.test_resume import losses


def test_entropy_is_relative_to_the_most_possible():
    logits = torch.tensor([[0.0, 0, 0, 0], [50.0, 0, 0, 0]])
    batch = Batch(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2))
    assert entropy(Trace(logits=logits), batch, "classification").tolist() == pytest.approx([1, 0], abs=1e-6)
    # For tokens: the mean over predicted tokens; the first row has one of each kind, the second none.
    labels = torch.full((2, 3), NO_LABEL)
    labels[0, :2] = 1
    states = torch.tensor([[[0.0], [50.0], [7.0]], [[3.0], [0.0], [0.0]]])
    batch = Batch(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), labels)
    trace = Trace(output=states, head=torch.tensor([[1.0], [0.0], [0.0]]))
    assert entropy(trace, batch, "masked_lm").tolist() == pytest.approx([0.5, 0], abs=1e-6)
    assert math.isfinite(float(entropy(trace, batch, "causal_lm").sum()))


def test_every_sampler_trains_on_any_number_of_ranks(mapping, tmp_path):
    mapping |= {"evaluation": {}, "terms": {"task": {}, "contrastive": {}}}
    mapping["student"] = {"config": mapping["student"]["config"] | {"hidden_dropout_prob": 0.0}}
    mapping["train"] |= {"epochs": 1}
    paths = {}
    for ranks in (1, 2):
        for sampler in ("entropy", "random_masked", "hard_negative", "domain_aware"):
            name = f"{sampler}-{ranks}"
            case = mapping | {
                "run": mapping["run"] | {"dir": str(tmp_path / name)},
                "data": mapping["data"] | {"sampler": sampler},
                "train": mapping["train"] | {"micro_batch_size": 8 // ranks},
            }
            paths[name] = tmp_path / f"{name}.yaml"
            paths[name].write_text(yaml.safe_dump(case))
    for ranks in (1, 2):
        run_configs([path for name, path in paths.items() if name.endswith(str(ranks))], ranks=ranks)
    for sampler in ("entropy", "random_masked", "hard_negative", "domain_aware"):
        alone, shared = (losses(tmp_path / f"{sampler}-{ranks}") for ranks in (1, 2))
        assert len(alone) == 5
        for want, line in zip(alone, shared, strict=True):
            assert line["loss"] == pytest.approx(want["loss"], rel=1e-4), sampler
    assert np.load(tmp_path / "entropy-1" / "sampling.npy").shape == (37,)
    neighbours = np.load(tmp_path / "hard_negative-1" / "sampling.npy")
    assert neighbours.shape == (37, 3) and not (neighbours == np.arange(37)[:, None]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"sampler": "hard_negative"}}, "data.sampler: got hard_negative without terms.contrastive"),
        ({"data": {"sampler": "domain_aware", "domain": None, "general": None}}, "domain_aware without"),
        (
            {"data": {"sampler_temperature": 0.5}},
            "data.sampler_temperature: got a value with sampler uniform",
        ),
    ],
    ids=["no contrast", "no domain", "no use"],
)
def test_refusals(mapping, changes, message):
    for section, values in changes.items():
        mapping[section] = mapping[section] | values
    with pytest.raises(UserError, match=message):
        make_config(mapping)
