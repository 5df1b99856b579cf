"""`dsdistill plan` is compared with resident memory of real runs, with counts by hand, and in its words."""

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from dsdistill import cli
from dsdistill.config import load
from dsdistill.config.load import make_config
from dsdistill.planner import rehearsal, zero_memory
from dsdistill.planner.ledger import Ledger
from dsdistill.planner.listing import refusal
from dsdistill.planner.plan import Forecast, Plan, _largest, make_plan, peak
from tests.conftest import WORDS
from tests.engine.launch import launch

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("plan_worker.py")
# This makes glibc return freed memory, so that resident memory is memory in use.
EXACT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}

BERT = {"model_type": "bert", "vocab_size": 8000, "max_position_embeddings": 512}
TEACHER = BERT | {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
}
STUDENT = BERT | {
    "hidden_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "attention_probs_dropout_prob": 0.0,
}
ALL = {"task": {}, "soft_label": {}, "hidden": {}, "attention": {"heads": "mean"}, "pairwise": {}}

# Changes of a run with micro-batches of 4 × 128 tokens, teacher at stage 3, student at stage 2, float32.
MORE = {
    "long, checkpointing, stage 3": {
        "data.max_length": 320,
        "student.gradient_checkpointing": True,
        "student.zero_stage": 3,
    },
    "stage 1, accumulating, bf16, whole teacher, fewer terms": {
        "student.zero_stage": 1,
        "teacher.zero_stage": 0,
        "train.dtype": "bf16",
        "train.batch_size": 8,
        "terms": {"task": {}, "soft_label": {}, "hidden": {}},
    },
    "plain": {},
    "deep": {"student.config": STUDENT | {"num_hidden_layers": 8}, "data.max_length": 256},
    "stage 2, accumulating": {"train.batch_size": 8, "data.max_length": 256},
    "sgd, checkpointing": {"train.optimizer": "sgd", "student.gradient_checkpointing": True},
    "cut from its teacher": {
        "student.config": {"attention_probs_dropout_prob": 0.0},
        "student.from_teacher": [2, 4, 6, 8],
    },
}
TWO = {
    "stage 2": {"train.micro_batch_size": 8, "train.batch_size": 16},
    "stage 3, long, checkpointing": {
        "student.zero_stage": 3,
        "student.gradient_checkpointing": True,
        "data.max_length": 320,
        "train.batch_size": 8,
    },
}
OWNERS = {
    *(rehearsal.TEACHER, rehearsal.RESIDENT, rehearsal.TEACHER_CAPTURED, rehearsal.CAPTURED),
    *(rehearsal.ACTIVATIONS, rehearsal.OPERATORS),
    *(zero_memory.WEIGHTS, zero_memory.GRADIENTS, zero_memory.MASTER, zero_memory.MOMENTS),
}
MORE_OF_TWO = {
    "stage 3": {"student.zero_stage": 3, "train.batch_size": 8},
    "stage 1, bf16": {"student.zero_stage": 1, "train.batch_size": 8, "train.dtype": "bf16"},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict:
    """Return texts longer than any sequence of the tests."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    for name, count in (("train", 48), ("dev", 2)):
        lines = [f"{' '.join(rng.choices(WORDS, k=600))}\t{'ab'[i % 2]}" for i in range(count)]
        (folder / f"{name}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n", encoding="utf-8")
    return {"source": "files", "train": str(folder / "train.tsv"), "dev": str(folder / "dev.tsv")}


def settings_of(changes: dict, data: dict) -> dict:
    found = {
        "data": data | {"max_length": 128},
        "teacher": {"config": TEACHER, "zero_stage": 3},
        "student": {"config": STUDENT, "zero_stage": 2},
        "terms": ALL,
        "train": {"steps": 2, "batch_size": 4, "micro_batch_size": 4},
    }
    for dotted, value in changes.items():
        *parents, key = dotted.split(".")
        section = found
        for parent in parents:
            section[parent] = dict(section[parent])
            section = section[parent]
        section[key] = value
    return found


@pytest.mark.parametrize(
    ("ranks", "runs"),
    [
        pytest.param(2, TWO, id="two ranks"),
        pytest.param(1, MORE, id="one rank", marks=pytest.mark.soak),
        pytest.param(2, MORE_OF_TWO, id="more on two ranks", marks=pytest.mark.soak),
    ],
)
def test_measured_peaks(ranks, runs, texts, tokenizer_dir, tmp_path, monkeypatch):
    for name, value in EXACT.items():
        monkeypatch.setenv(name, value)
    data = texts | {"tokenizer": str(tokenizer_dir), "cache": str(tmp_path / "cache")}
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    warm = {f"{model}.config": BERT | small for model in ("teacher", "student")}
    paths, plans = [], []
    for index, changes in enumerate(
        [warm | {"data.max_length": 16, "train.batch_size": 4 * ranks}, *runs.values()]
    ):
        settings = settings_of(changes, data) | {"run": {"dir": str(tmp_path / f"run{index}")}}
        paths.append(tmp_path / f"{index}.yaml")
        paths[-1].write_text(yaml.safe_dump(settings))
        plans.append(settings)
    out = tmp_path / "peaks.json"
    done = launch(WORKER, *paths, out, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    ratios = {}
    for index, (name, settings) in enumerate(zip(runs, plans[1:], strict=True)):
        (phases,) = (
            Forecast(make_config(settings), ranks, gpu=False)
            .stages(settings["train"]["micro_batch_size"])
            .values()
        )
        planned = peak(phases)
        for rank, measured in enumerate(peaks[index] for peaks in json.loads(out.read_text())):
            assert measured > 100 * 2**20, "too small to tell"
            ratios[name, rank] = planned / measured
            print(f"{name}, rank {rank}: {planned / 2**20:.0f} MiB planned, {measured / 2**20:.0f} measured")
    assert all(abs(ratio - 1) <= 0.15 for ratio in ratios.values()), ratios


class TestLedger:
    def test_a_layer_by_hand(self):
        """(8, 16) × (16, 32) and its ReLU: 8·32·4 = 1024 bytes each; ReLU keeps its own output for backward."""
        ledger = Ledger((8, 16))
        with ledger.fake:
            weight, x = torch.zeros(16, 32, requires_grad=True), torch.zeros(8, 16)
        with ledger.running():
            ledger.enter("forward", "made")
            y = (x @ weight).relu()
            assert ledger.held["made"] == 1024  # the product is freed
            loss = y.sum()
            ledger.enter("backward", "passing")
            del y
            assert ledger.held["made"] == 1024 + 4  # but for autograd
            loss.backward()
            del loss
        assert ledger.peaks["forward"]["made"] == 2048
        assert ledger.held["made"] == 0
        assert ledger.held["passing"] == 16 * 32 * 4  # the weight's gradient

    def test_views_and_what_was_there_count_nothing(self):
        ledger = Ledger((1, 1))
        with ledger.fake:
            weight = torch.zeros(64, 64)
        with ledger.running():
            ledger.enter("forward", "made")
            part = weight.t()[:2]
            assert ledger.held["made"] == 0
            copy = part.clone()
            view = copy[0]
            del copy
            assert ledger.held["made"] == 2 * 64 * 4
            del view
        assert ledger.held["made"] == 0

    def test_contents_that_nobody_knows(self):
        ledger = Ledger((3, 7))
        with ledger.running():
            mask = torch.ones(3, 7, dtype=torch.bool)
            assert mask.nonzero().shape == (21, 2)
            assert torch.zeros(3, 7, 5)[mask].shape == (21, 5)
            assert int(torch.tensor([1, 2]).max()) == 7 and bool(mask.any())


class TestZero:
    """Two parameters of 600 and 400 elements in one group, on two ranks, in bfloat16 under AdamW."""

    def held(self, stage: int, **changes) -> tuple[Ledger, dict]:
        options = {"offloaded": False, "accumulates": False, "lazy": False, "bucket": 5000, "buffers": 1}
        settings = zero_memory.Settings(stage, 2, 2, "adamw", live=10**9, prefetch=10**9, **options | changes)
        ledger = Ledger((1, 1))
        with ledger.fake:
            parameters = [nn.Parameter(torch.zeros(n, dtype=torch.bfloat16)) for n in (600, 400)]
        student = zero_memory.StudentZero(ledger, settings, [parameters], frozen=100)
        rest = dict(ledger.held)
        student.follow(parameters)
        with ledger.running():
            ledger.enter("backward", "passing")
            sum(p.sum() for p in parameters).backward()
            ledger.enter("reduce", "passing")
            student.reduce(parameters)
            ledger.enter("step", "passing")
            student.step()
        return ledger, rest

    @pytest.mark.parametrize(
        ("stage", "weights", "gradients"),
        # Rank 0 owns elements 0 to 499 and so touches 600 of them; rank 1 touches both parameters.
        [(1, 2200, 2000), (2, 2200, 2000), (3, 1100, 1000)],
    )
    def test_what_stays(self, stage, weights, gradients):
        ledger, rest = self.held(stage)
        assert rest[zero_memory.WEIGHTS] == weights
        assert rest[zero_memory.MASTER] == 4 * 500 and rest[zero_memory.MOMENTS] == 8 * 500
        assert ledger.held[zero_memory.GRADIENTS] == gradients
        assert ledger.held[zero_memory.BUCKETS] == (
            2000 if stage == 3 else 0
        )  # 5000 elements would never be filled

    def test_a_bucket_is_whole_on_a_gpu_and_as_filled_on_a_cpu(self):
        for lazy, bucket in ((False, 1600), (True, 1200)):  # 800 elements; the larger gradient is sent alone
            ledger, _ = self.held(2, lazy=lazy, bucket=800)
            assert ledger.peaks["reduce"][zero_memory.BUCKETS] == bucket + 1200  # and its flat copy

    def test_a_small_bucket_is_sent_twice(self):
        """It is sent once for each gradient.

        What the first leaves stays while the second waits and is sent from a copy.
        """
        ledger, _ = self.held(2, lazy=True, bucket=700)
        assert ledger.peaks["backward"][zero_memory.BUCKETS] == 2 * 600
        assert ledger.peaks["backward"][zero_memory.GRADIENTS] == 2000
        assert ledger.peaks["reduce"][zero_memory.BUCKETS] == 2 * 2 * 600
        assert ledger.peaks["reduce"][zero_memory.GRADIENTS] == 2000

    def test_the_step_and_offload(self):
        # A flat copy in bfloat16 and one in float32; norms in float64 would take 8 · 500 for the larger parameter.
        ledger, _ = self.held(2)
        assert ledger.peaks["step"][zero_memory.STEP] == 8 * 500
        ledger, rest = self.held(2, offloaded=True)
        assert zero_memory.MASTER not in rest and ledger.held[zero_memory.GRADIENTS] == 0


def test_the_largest_micro_batch(texts, tokenizer_dir):
    """In a rehearsal memory fits at the size found, but not with one more."""
    settings = settings_of({"train.batch_size": 4096, "data.max_length": 64}, texts)
    config, memory = make_config(settings), 700 * 2**20
    found = make_plan(config, 1, memory, gpu=False)
    assert found.largest > 4
    forecast, stage = Forecast(config, 1, gpu=False), config.run_stages[0]
    sizes = [peak(forecast.phases(stage, size, False)) for size in (found.largest, found.largest + 1)]
    assert sizes[0] <= memory < sizes[1]


def test_the_largest_micro_batch_fits_every_stage(texts, tokenizer_dir):
    """With all weights trained, the stage that needs most with small micro-batches needs least with large ones."""
    small = BERT | {
        "vocab_size": 30000,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    }
    changes = {
        "teacher": {"config": small | {"num_hidden_layers": 4}, "zero_stage": 0},
        "student.config": small | {"num_hidden_layers": 2},
        "train.batch_size": 4096,
        "train.micro_batch_size": 1,
        "data.max_length": 64,
        "terms": {"task": {}},
    }
    levels = {"hidden": {}, "attention": {}, "pairwise": {"layers": "uniform"}}
    stages = [{"name": "whole"}, {"name": "frozen", "freeze": ["*embeddings*"], "terms": levels}]
    config, memory = make_config(settings_of(changes, texts) | {"stages": stages}), 300 * 2**20
    forecast = Forecast(config, 1, gpu=False)
    found = make_plan(config, 1, memory, gpu=False)

    def needed(size: int) -> dict[str, int]:
        return {name: peak(phases) for name, phases in forecast.stages(size).items()}

    small, large, larger = (needed(size) for size in (1, found.largest, found.largest + 1))
    assert small["whole"] > small["frozen"] and large["whole"] < large["frozen"]
    assert max(large.values()) <= memory < max(larger.values())


def test_the_largest_beyond_what_is_rehearsed_fits_every_stage():
    """Each stage and phase has a line: one that is lower at first may rise faster."""
    room = 10_000_000

    def need(batch: int) -> dict[tuple[str, str], Counter]:
        return {
            ("one", "step"): Counter(all=100_000 + batch),
            ("two", "forward"): Counter(all=10 * batch),
        }

    found = _largest(need, 1, room, 16)
    assert peak(need(found)) <= room and found > 900_000


class TestCommand:
    def run(self, monkeypatch, capsys, *arguments):
        monkeypatch.setattr(sys, "argv", ["dsdistill", "plan", *map(str, arguments)])
        return cli.run(), capsys.readouterr()

    @pytest.fixture
    def config(self, texts, tmp_path):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings_of({}, texts)))
        return path

    def test_what_fits(self, config, tmp_path, monkeypatch, capsys, caplog):
        caplog.set_level("INFO", "dsdistill")
        out = tmp_path / "plan.json"
        options = ["train.micro_batch_size=2", "--world-size", 2, "--gpu-memory", "6GiB", "--json", out]
        options += ["--host-memory", "64GiB", "--peak-flops", "1e12", "--utilisation", "0.5"]
        code, printed = self.run(monkeypatch, capsys, config, *options)
        assert code == 0, printed.err
        assert "largest micro-batch that fits:" in printed.out and "does not" not in printed.out
        assert "rehearsing a step of stage all with micro-batches of 2" in caplog.text
        found = json.loads(out.read_text())
        assert found["peak"] == max(sum(phase.values()) for phase in found["phases"].values())
        assert f"peak: {found['peak'] / 2**30:.2f} GiB" in printed.out
        assert f"host memory: {found['host'] / 2**30:.2f} GiB per node" in printed.out
        assert (
            "of 64.00 GiB" in printed.out
            and f"{found['disk']['at most'] / 2**30:.2f} GiB at most" in printed.out
        )
        assert found["time"]["tokens"] == pytest.approx(1e12 / sum(found["time"]["operations"].values()))
        assert f"{found['time']['step']:.1f} s per step" in printed.out
        owners = {owner for phase in found["phases"].values() for owner, size in phase.items() if size}
        assert owners >= OWNERS
        # 2 × 128 tokens, float32: maps of 4 layers of 6 heads and of 4 layers of 8.
        assert found["instead"]["attention maps of the mapped layers"] == 4 * 2 * 128**2 * (4 * 6 + 4 * 8)
        less, more = (
            found["instead"][f"student, activations {how} checkpointing"] for how in ("with", "without")
        )
        assert less < 0.5 * more

    def test_a_clear_no(self, config, monkeypatch, capsys):
        code, printed = self.run(monkeypatch, capsys, config, "--cpu", "--gpu-memory", "300MiB")
        assert code == 1
        line = printed.err.splitlines()[-1]
        assert "does not fit, not even with micro-batches of 1: 0.4" in line and "teacher, weights" in line

    def test_less_would_fit(self, config, monkeypatch, capsys):
        """The config does not fit as it is: the table is printed all the same, and the exit code is 1."""
        options = ["train.batch_size=64", "train.micro_batch_size=64", "--cpu", "--gpu-memory", "700MiB"]
        code, printed = self.run(monkeypatch, capsys, config, *options)
        assert code == 1
        line, largest = printed.err.splitlines()[-1], re.search(r"that fits: (\d+)", printed.out)[1]
        assert 1 <= int(largest) < 64 and f"does not fit (micro-batches of at most {largest} would): " in line
        found = [float(size) for size in re.findall(r"\d+\.\d+", line.partition("): ")[2])]
        assert found[0] - found[1] == pytest.approx(700 / 1024, abs=0.011)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--gpu-memory", "80"], "--gpu-memory: got '80', expected a size such as 80GiB"),
            (["--host-memory", "much"], "--host-memory: got 'much', expected a size such as"),
            (["--ranks-per-node", 2], "--ranks-per-node: got 2, expected 1 to 1"),
            (["--utilisation", 2], "--utilisation: got 2.0, expected a share above 0 and at most 1"),
            (["--world-size", 0], "--world-size: got 0, expected 1 or more"),
            (["--world-size", 3], "train.batch_size: got 4, expected a multiple"),
            (["terms.attention.heads=match"], "terms.attention.heads: got match for 6 student and 8"),
        ],
    )
    def test_refused(self, config, monkeypatch, capsys, arguments, message):
        code, printed = self.run(monkeypatch, capsys, config, *arguments)
        assert code == 2 and message in printed.err and not printed.out


def test_a_host_without_room():
    """A rank's memory comes first; if that fits, the node's host is named, with what takes most of its memory."""
    node = {"training": Counter(a=3 * 2**30), "saving": Counter(a=3 * 2**30, b=5 * 2**30)}
    plan = Plan("all", {"step": Counter(x=2**30)}, {}, 0, 1, 2**30, node, {}, None)
    assert refusal(plan, 2**30) is None and refusal(plan, 2**30, 8 * 2**30) is None
    line = refusal(plan, 2**30, 6 * 2**30)
    assert line == (
        "does not fit into the host memory of a node (saving): 8.00 GiB are needed, 2.00 more than available; "
        "b takes the most (5.00 GiB)"
    )
    assert "host" not in refusal(plan, 2**29, 6 * 2**30)


SHIPPED = [
    path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name in ("configs", "recipes")
]


@pytest.mark.soak
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_has_a_plan(path, monkeypatch):
    """Each config is planned offline and unchanged."""
    monkeypatch.chdir(ROOT)
    laptop = any(name in path.stem for name in ("small", "quickstart", "docstrings"))
    found = make_plan(load([str(path)]), 1 if laptop else 8, 80 * 2**30, gpu=not laptop)
    assert 0 < found.peak < 80 * 2**30 and found.largest > 0
    print(f"{path.stem}: {found.peak / 2**30:.2f} GiB, micro-batches to {found.largest}")
