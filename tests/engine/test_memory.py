"""Memory stays flat: no step, evaluation, checkpoint or change of stage leaves memory behind."""

import json
from pathlib import Path
from statistics import median

import pytest
import yaml

from tests.engine.launch import launch

WORKER = Path(__file__).with_name("soak_worker.py")
STEPS, WARM = 2000, 300


@pytest.mark.soak
def test_memory_stays_flat(settings, tmp_path):
    """Train 2,000 steps on two ranks over real texts, with 20 evaluations, 10 checkpoints and two changes of stage."""
    settings["data"] = {
        "source": "docstrings",
        "max_length": 32,
        "max_train": 1600,
        "max_dev": 80,
        "train_tokenizer": 2000,
        "cache": str(tmp_path / "cache"),
    }
    model = {
        "model_type": "bert",
        "vocab_size": 2000,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    settings["teacher"] = {
        "config": model | {"hidden_size": 96, "num_hidden_layers": 4, "intermediate_size": 256},
        "zero_stage": 3,
    }
    settings["student"] = {
        "config": model | {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128},
        "zero_stage": 2,
    }
    settings["train"] |= {"steps": STEPS}
    settings["run"] |= {"evaluate_every": 100, "save_every": 200}
    settings["stages"] = [{"name": "first"}, {"name": "second", "terms": {"smooth": {}}}, {"name": "third"}]
    path, out = tmp_path / "config.yaml", tmp_path / "memory.json"
    path.write_text(yaml.safe_dump(settings))
    done = launch(WORKER, path, out, timeout=7200)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank, seen in enumerate(json.loads(out.read_text())):
        assert len(seen) == STEPS
        # Medians of 100 steps, since the memory of a step and of a save comes and goes.
        curve = [round(median(seen[at : at + 100]) / 2**20, 1) for at in range(0, STEPS, 100)]
        print(f"rank {rank}, MiB by hundreds of steps: {curve}")
        start = median(seen[WARM - 50 : WARM + 50])
        assert max(median(seen[at : at + 100]) for at in range(WARM, STEPS, 100)) < 1.01 * start, curve
