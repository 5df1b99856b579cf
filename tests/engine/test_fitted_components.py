"""Principal components of the teacher's states that terms need, fitted before training."""

import torch
from safetensors.torch import load_file

from tests.engine.launch import run_configs
from tests.engine.test_resume import losses, write


def test_ranks_fit_the_same_and_stages_share_it(settings, tmp_path):
    """The run has two stages, on one rank or on two with the teacher sharded."""
    term = {"components": 4, "divergence": "mse", "layers": "last", "embedding": False}
    settings["terms"] = {"feature": term}
    settings["stages"] = [{"name": "one"}, {"name": "two", "terms": {"task": {}}}]
    settings["train"] |= {"steps": 4}
    found = []
    for name, ranks in (("apart", 2), ("alone", 1)):
        run_configs([write(settings, tmp_path, name)], ranks=ranks)
        found.append(load_file(tmp_path / name / "domain_maps.safetensors"))
    assert {name.rsplit(".", 1)[1] for name in found[0]} == {"components", "mean", "scale"}
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)
        if name.endswith("components"):
            torch.testing.assert_close(value @ value.T, torch.eye(4), rtol=1e-4, atol=1e-5)
    first = losses(tmp_path / "alone")
    assert all(line["terms"]["feature"]["raw"] > 0.1 for line in first)
    assert first[-1]["terms"]["feature"]["raw"] < first[0]["terms"]["feature"]["raw"]
