"""Count what a step sends on real ranks, and compare it with the formulas of dsdistill/distributed/README.md."""

import json
from pathlib import Path

import pytest
import yaml

from dsdistill.distributed import stopping
from tests.engine.launch import launch

WORKER = Path(__file__).with_name("traffic_worker.py")
BYTES = 4  # per parameter and per gradient: float32
MICRO_BATCHES = 2
# One student is gathered anew in backward, as one of over 10⁹ parameters is; one stays gathered from forward.
RELEASED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
KEPT = {"stage3_param_persistence_threshold": 0}
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}


def expected(stage: int, gathers: int, sizes: dict[str, int], parts: int) -> dict[str, float]:
    """Return the bytes of the whole tensors that one step's collectives gather, scatter or reduce, by caller."""
    teacher, student = sizes["teacher"] * BYTES, sizes["student"] * BYTES
    found = {
        "teacher all_gather_into_tensor": MICRO_BATCHES * (teacher + sizes["head"] * BYTES),
        # Before the step counts; after it values and the ranks' messages to each other.
        "ours all_reduce": (
            2 * parts + len(("tokens", "documents", "due", "written")) + len(stopping.votes())
        )
        * 8,
    }
    if stage == 3:
        found["student all_gather_into_tensor"] = MICRO_BATCHES * gathers * student
        found["student reduce_scatter_tensor"] = MICRO_BATCHES * student
    else:
        found["student all_reduce"] = (MICRO_BATCHES if stage == 2 else 1) * student
        found["student all_gather_into_tensor"] = student
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_of_a_step(settings, data_dir, models_dir, tmp_path, ranks):
    settings["train"] |= {"batch_size": 8, "micro_batch_size": 8 // ranks // MICRO_BATCHES}
    cases = [(1, 1, {}), (2, 1, {}), (3, 1, KEPT), (3, 2, RELEASED)]
    paths = []
    for stage, _, zero in cases:
        settings["student"] |= {"zero_stage": stage, "deepspeed": {"zero_optimization": zero}}
        paths.append(tmp_path / f"{len(paths)}.yaml")
        paths[-1].write_text(yaml.safe_dump(settings))
    # A tied head is needed again once the forward pass has let go of the embeddings.
    files = {"train": str(data_dir / "train.txt"), "dev": str(data_dir / "dev.txt")}
    language = {"task": "causal_lm", "terms": {"task": {}, "soft_label": {}}}
    language["data"] = settings["data"] | files | {"tokenizer": str(models_dir / "teacher")}
    language["teacher"] = {"config": GPT2, "zero_stage": 3}
    language["student"] = {"config": GPT2 | {"n_layer": 1}, "zero_stage": 2}
    paths.append(tmp_path / "language.yaml")
    paths[-1].write_text(yaml.safe_dump(settings | language))
    cases.append((2, 1, {}))

    out = tmp_path / "sent.json"
    done = launch(WORKER, out, *paths, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    for (stage, gathers, _), found in zip(cases, json.loads(out.read_text()), strict=True):
        wanted = expected(stage, gathers, found["sizes"], found["parts"])
        # DeepSpeed's own flags and norms are a few bytes each; parts are padded to the number of ranks.
        sent = {
            name: sum(size for size in sizes if size > 64 or not name.startswith("student"))
            for name, sizes in found["sent"].items()
        }
        sent = {name: size for name, size in sent.items() if size}
        assert sent == pytest.approx(wanted, rel=5e-3), (stage, gathers)
        # The teacher runs while nothing of a sharded student is gathered.
        assert found["beside"] == [0] * (2 * MICRO_BATCHES if stage == 3 else 0)
