"""Two sharded ranks must train exactly as one plain process."""

import itertools
import json
from pathlib import Path

import pytest
import yaml

from dsdistill.config.load import make_config
from dsdistill.data import Loader
from dsdistill.engine.prepare import prepare
from tests.engine.launch import launch, run_configs
from tests.engine.plain import plain_run

CASES = list(itertools.product((1, 2, 3), (1, 2), (False, True)))


def history(run_dir: str) -> list[dict]:
    lines = (json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def module_tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def losses(module_tmp, models_dir, data_dir):
    """Return the losses of the plain loop and of every case on two ranks, and what the plain loop was prepared from."""
    base = {
        "data": {
            "source": "files",
            "train": str(data_dir / "train.tsv"),
            "dev": str(data_dir / "dev.tsv"),
            "max_length": 32,
            "cache": str(module_tmp / "cache"),
        },
        "teacher": {"path": str(models_dir / "teacher"), "zero_stage": 3},
        "student": {"path": str(models_dir / "student")},
        "terms": {
            "task": {},
            "soft_label": {},
            "hidden": {},
            "attention": {},
            "pairwise": {"layers": "uniform"},
        },
        "train": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3},
    }
    paths, found = [], {}
    for stage, accumulation, checkpointing in CASES:
        name = f"zero{stage}-accumulation{accumulation}-checkpointing{checkpointing}"
        case = base | {
            "run": {"name": name, "dir": str(module_tmp / name), "log_every": 1},
            "student": base["student"] | {"zero_stage": stage, "gradient_checkpointing": checkpointing},
            "train": base["train"] | {"micro_batch_size": 4 // accumulation},
        }
        path = module_tmp / f"{name}.yaml"
        path.write_text(yaml.safe_dump(case))
        paths.append(path)
    run_configs(paths)
    for case, path in zip(CASES, paths, strict=True):
        found[case] = history(module_tmp / path.stem)

    one = base | {"train": base["train"] | {"micro_batch_size": 8}}
    prepared = prepare(make_config(one), world_size=1)
    loader = Loader(prepared.data.train, 8, 8, 1, 0, seed=0, pad_id=0)
    batches = [loader.step(*divmod(step, loader.steps_per_epoch))[0] for step in range(10)]
    assert {len(batch.mask) for batch in batches} == {8, 5}, "the last batch of an epoch must be ragged"
    projectors = [p.weight.detach() for p in prepared.objectives[0].terms["hidden"].projectors.values()]
    (module_tmp / "one.yaml").write_text(yaml.safe_dump(one))
    return plain_run(one, projectors, batches), found, prepared


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"zero{c[0]}-accumulation{c[1]}-checkpointing{c[2]}")
def test_losses_equal_a_plain_loop(losses, case):
    plain, found, _ = losses
    assert len(found[case]) == 10
    for expected, line in zip(plain, found[case], strict=True):
        got = {name: term["raw"] for name, term in line["terms"].items()}
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-7), f"step {line['step']}"
        assert line["loss"] == pytest.approx(sum(expected.values()), rel=1e-5)


def test_training_moves_the_losses(losses):
    """Otherwise equal losses would say nothing about gradients and updates."""
    plain, _, _ = losses
    for name in plain[0]:
        assert abs(plain[-1][name] - plain[0][name]) > 1e-3 * abs(plain[0][name]), name


def test_ranks_have_unequal_token_counts(losses):
    """Otherwise a mean over each rank's own tokens would equal the mean over all."""
    _, _, prepared = losses
    loaders = [Loader(prepared.data.train, 8, 4, 2, rank, seed=0, pad_id=0) for rank in (0, 1)]
    unequal = 0
    for step in range(10):
        at = divmod(step, loaders[0].steps_per_epoch)
        left, right = (sum(int(batch.mask.sum()) for batch in loader.step(*at)) for loader in loaders)
        unequal += left != right
    assert unequal > 5


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_trainer_has_the_same_losses(losses, module_tmp, ranks):
    """Compare a run on two ranks under ZeRO-2 with DistillTrainer on the same rows, in micro-batches of two."""
    _, found, _ = losses
    worker, out = Path(__file__).with_name("trainer_worker.py"), module_tmp / f"trainer-{ranks}.json"
    done = launch(worker, module_tmp / "one.yaml", out, ranks=ranks)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = json.loads(out.read_text())
    assert len(lines) == 4
    for expected, line in zip(found[2, 2, False], lines, strict=False):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        for name, term in expected["terms"].items():
            assert line[name] == pytest.approx(term["raw"], rel=1e-5, abs=1e-7), (name, expected["step"])
