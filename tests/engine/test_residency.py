"""A sharded teacher is never whole on a rank."""

import json
from pathlib import Path

import pytest
import yaml

from tests.engine.launch import launch

WORKER = Path(__file__).with_name("residency_worker.py")


@pytest.mark.parametrize(("residency", "layers"), [("tight", 1), ("overlap", 2)])
def test_resident_parameters(settings, tmp_path, residency, layers):
    settings["teacher"] = {
        "config": {
            "model_type": "bert",
            "vocab_size": 64,
            "hidden_size": 48,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "max_position_embeddings": 64,
        },
        "zero_stage": 3,
        "residency": residency,
    }
    path, out = tmp_path / "config.yaml", tmp_path / "found.json"
    path.write_text(yaml.safe_dump(settings))
    done = launch(WORKER, path, out)
    assert done.returncode == 0, done.stderr[-3000:]
    everyone = json.loads(out.read_text())
    assert len(everyone) == 2
    for found in everyone:
        assert found["shard"] < 0.52 * found["all"]
        assert found["layer"] < found["all"] / 6, "the test's teacher must dwarf one layer"
        assert 0 < found["most"] <= layers * max(found["layer"], found["largest"])
        assert found["after"] == 0
