"""A plan also covers the host's memory, the disk, and time."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from dsdistill.config import UserError
from dsdistill.config.load import make_config
from dsdistill.engine.prepare import objective_layers
from dsdistill.models.build import architecture, build_model
from dsdistill.planner import host, rehearsal, zero_memory
from dsdistill.planner.duration import check_rate, duration, operations
from dsdistill.planner.plan import Forecast
from dsdistill.planner.sizes import Size, attention_operations, size_of
from tests.conftest import WORDS

SMALL = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", "num_key_value_heads": 2, **SMALL}
# A teacher of 1000 values, 300 of them in one tensor; a student of 400 values, 360 of them trained.
TEACHER = Size((("a", 300), ("b", 300), ("c", 200), ("d", 200)), 500.0, 100)
STUDENT = Size((("a", 40), ("b", 360)), 300.0, 60)
PARTS = host.Parts(TEACHER, STUDENT, 360)


def settings(**changes) -> dict:
    found = {
        "task": "causal_lm",
        "data": {"source": "files", "train": "x", "dev": "x", "text": ["x"], "label": None, "tokenizer": "x"},
        "run": {},
        "teacher": {"config": LLAMA | {"num_hidden_layers": 3}, "zero_stage": 3},
        "student": {"config": LLAMA | {"num_hidden_layers": 2}, "zero_stage": 2},
        "train": {"steps": 10, "batch_size": 8, "micro_batch_size": 1, "dtype": "bf16"},
    }
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        found[section] = found[section] | {key: value}
    return found


def zero(stage: int = 2, offloaded: bool = False) -> zero_memory.Settings:
    return zero_memory.Settings(
        stage, 4, 2, "adamw", bucket=1, buffers=1, live=1, prefetch=1,
        offloaded=offloaded, accumulates=False, lazy=False,
    )  # fmt: skip


class TestHost:
    """By hand: four ranks, two on a node."""

    def memory(self, config: dict, stage: int = 2, gpu: bool = True) -> dict[str, Counter]:
        made = make_config(config)
        return host.node_memory(made, PARTS, zero(stage), 10_000, 2, gpu=gpu)

    def test_a_sharded_teacher(self):
        held = self.memory(settings())
        # 2 · 1000 / 4 bytes are on each device; while they are read, a quarter more and the largest tensor.
        assert held[host.READING_TEACHER][host.TEACHER] == 2 * (125 + 2 * 300)
        assert held[host.TRAINING][host.TEACHER] == 0
        assert held[host.READING_STUDENT][host.UNROUNDED] == 2 * 4 * 400
        assert self.memory(settings(), stage=3)[host.READING_STUDENT][host.UNROUNDED] == 2 * 400

    def test_a_whole_teacher_in_its_own_type(self):
        held = self.memory(settings(teacher__zero_stage=0, teacher__dtype="fp32"))
        assert held[host.READING_TEACHER][host.TEACHER] == 2 * (4400 + 4 * 300)
        assert host.loading(make_config(settings(teacher__zero_stage=0)), PARTS, 4, gpu=True) == Counter(
            {host.TEACHER: 2000}
        )

    def test_a_student_that_is_cut(self):
        config = settings(student__from_teacher=[1, 3], student__config=None, teacher__path="org/model")
        assert self.memory(config, stage=3)[host.READING_STUDENT][host.CUT] == int(1.3 * 2 * 400)

    def test_offload(self):
        offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}
        held = self.memory(settings(student__deepspeed=offload))[host.TRAINING]
        assert held[host.OFFLOADED] == 2 * 3 * 360 and held[host.GRADIENTS] == 2 * 360
        offload["zero_optimization"]["offload_optimizer"]["pin_memory"] = True
        held = self.memory(settings(student__deepspeed=offload))[host.TRAINING]
        assert held[host.OFFLOADED] == 2 * 3 * 512  # the next power of two after 360 bytes
        offload = {"zero_optimization": {"offload_param": {"device": "cpu", "pin_memory": False}}}
        held = self.memory(settings(teacher__deepspeed=offload))[host.TRAINING]
        assert held[host.TEACHER] == 2 * 500

    def test_ranks_on_cpus(self):
        held = self.memory(settings(), gpu=False)
        assert held[host.TRAINING] == Counter({"a step": 20_000, host.PROCESSES: 2 * host.PROCESS[False]})
        assert held[host.READING_TEACHER][host.TEACHER] == 2 * (625 + 600)

    def test_a_save(self):
        config = make_config(settings())
        held = host.node_memory(config, PARTS, zero(), 0, 2, gpu=True)
        assert held["saving"][host.SAVING] == 2 * 360

    def test_a_save_while_training_goes_on(self):
        """Two ranks hold a quarter each of 4 · 3 · 360 bytes; rank 0 also writes bf16 weights, except under ZeRO-3."""
        held = self.memory(settings(run__save_async=True))
        assert held["saving"][host.SAVING] == 2 * 3 * 360 + 2 * 400
        held = self.memory(settings(run__save_async=True), stage=3)
        assert held["saving"][host.SAVING] == 2 * 3 * 360 + 2 * 40


@pytest.mark.parametrize("gpu", [False, True])
def test_a_teacher_that_runs_ahead(gpu):
    """There are two traces; on a GPU the teacher's activations are in memory beside the student's, too."""
    phases = []
    for overlap in (False, True):
        config = make_config(settings(teacher__overlap=overlap) | {"terms": {"soft_label": {}, "hidden": {}}})
        ((_, found),) = Forecast(config, 2, gpu=gpu).stages(1).items()
        phases.append(found["backward"])
    waits, ahead = phases
    captured = rehearsal.TEACHER_CAPTURED
    states = 2 * 256 * 64 * 2  # one layer's states and the head's input, of another micro-batch
    assert ahead[captured] - waits[captured] == states
    assert (ahead[rehearsal.TEACHER_ACTIVATIONS] > waits[rehearsal.TEACHER_ACTIVATIONS]) == gpu


def test_the_disk_by_hand():
    """In bf16 under Adam: 12 bytes per trained value and, except under ZeRO-3, 2 per weight, as in an export."""
    config = make_config(settings())  # keeps two checkpoints
    one = 2 * 400 + 12 * 360
    assert host.disk_space(config, PARTS, zero(2)) == {
        "a checkpoint": one, "first weights": 0, "an export": 800, "at most": 3 * one + 800,
    }  # fmt: skip
    assert host.disk_space(config, PARTS, zero(3))["a checkpoint"] == 12 * 360 + 2 * 40


@pytest.mark.soak
@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_on_disk(stage, tokenizer_dir, tmp_path):
    """Compare with the folder that a run of one step leaves."""
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text(f"text\tlabel\n{' '.join(WORDS[:5])}\ta\n{WORDS[1]}\tb\n" * 4)
    bert = {"model_type": "bert", **SMALL, "vocab_size": 8000, "hidden_size": 256, "num_hidden_layers": 2}
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "data": {
            "source": "files", "train": str(tmp_path / "train.tsv"), "dev": str(tmp_path / "dev.tsv"),
            "tokenizer": str(tokenizer_dir), "max_length": 16, "cache": str(tmp_path / "cache"),
        },
        "student": {"config": bert, "zero_stage": stage},
        "train": {"steps": 1, "batch_size": 4, "micro_batch_size": 4, "dtype": "bf16"},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "dsdistill", "train", path], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    forecast = Forecast(make_config(config), 1, gpu=False)
    planned = host.disk_space(forecast.config, forecast.parts, forecast.rank.zero)["a checkpoint"]
    print(f"stage {stage}: {planned:,} bytes planned, {there:,} there")
    assert planned == pytest.approx(there, rel=0.05)


class TestDuration:
    def test_a_model_against_the_products_that_run(self):
        """Compare with PyTorch's own counter for a BERT; it sees every key, so nothing is halved."""
        given = {"model_type": "bert", **SMALL, "num_hidden_layers": 2}
        config = architecture(None, given, "teacher")
        model = build_model(config, None, "masked_lm", "teacher", needs_head=False, attention="eager")
        ids = torch.randint(5, 1000, (2, 32))
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids)
        size = size_of(config, "masked_lm")
        ours = 2 * (size.multiplied + size.head) + sum(attention_operations(config, "masked_lm", 32))
        assert counter.get_total_flops() == pytest.approx(64 * ours)

    def test_a_token_by_hand(self):
        config = make_config(
            settings(data__max_length=128)
            | {"terms": {"task": {}, "soft_label": {}, "hidden": {"projector": "linear"}, "attention": {}}}
        )
        teacher, student = (
            architecture(None, section.config, "x") for section in (config.teacher, config.student)
        )
        (objective,) = objective_layers(config, student, teacher)
        layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128  # queries and output, keys and values, three maps
        keys = 4 * 64 * 64  # two products of 64 features with half of 128 keys
        sizes = [(model, size_of(model, "causal_lm")) for model in (teacher, student)]
        found = operations(config, *sizes, objective)
        assert found == {
            "student": 6 * 2 * layer + 3 * 2 * keys,
            "teacher": 2 * 3 * layer + 3 * keys,
            "heads": 6 * 64_000 + 2 * 64_000,
            "terms": 6 * 3 * 64 * 64 + 2 * 2 * keys,
        }
        again = config.model_copy(
            update={"student": config.student.model_copy(update={"gradient_checkpointing": True})}
        )
        assert operations(again, *sizes, objective)["student"] == 8 * 2 * layer + 4 * 2 * keys
        time = duration(config, found, 4, 1e12)
        assert time.tokens == pytest.approx(4e12 / sum(found.values()))
        assert time.seconds == 10 * time.step == pytest.approx(10 * 8 * 128 / time.tokens)

    def test_windows_and_experts(self):
        sliding = LLAMA | {
            "model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 16, "head_dim": 16,
        }  # fmt: skip
        config = architecture(None, sliding, "x")
        assert attention_operations(config, "causal_lm", 128) == [4 * 64 * 16.0] * 5 + [4 * 64 * 64.0]
        mixture = LLAMA | {
            "model_type": "qwen3_moe", "num_hidden_layers": 1, "head_dim": 16, "num_experts": 8,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        }  # fmt: skip
        size = size_of(architecture(None, mixture, "x"), "causal_lm")
        attention, router = 64 * 64 * 2 + 2 * 64 * 32, 8 * 64
        assert size.multiplied == attention + router + 2 * 3 * 64 * 32

    def test_rates(self):
        assert check_rate(None, 0.5, "bf16", gpu=True) == 156e12
        assert check_rate(None, 0.5, "bf16", gpu=False) is None
        for peak, share in ((0.0, 0.4), (float("inf"), 0.4), (1e12, 0.0), (1e12, 1.5)):
            with pytest.raises(UserError, match=r"--(peak-flops|utilisation)"):
                check_rate(peak, share, "bf16", gpu=True)


def test_sizes_are_those_of_the_model():
    config = architecture(None, LLAMA | {"num_hidden_layers": 2}, "x")
    model = build_model(config, None, "causal_lm", "x", needs_head=False)
    size = size_of(config, "causal_lm")
    assert size.total == sum(p.numel() for p in model.parameters()) and size.largest == 64_000
    assert size.head == 64_000
    tied = architecture(None, LLAMA | {"num_hidden_layers": 2, "tie_word_embeddings": True}, "x")
    assert size_of(tied, "causal_lm").total == size.total - 64_000
    assert size_of(tied, "causal_lm").multiplied == size.multiplied
