"""Ranks read parts of what plain transformers reads whole, in every dtype of files and training."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dsdistill.config import make_config
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.teacher import LazyTeacher
from dsdistill.models.build import architecture
from dsdistill.models.weights import mapped_dtype
from tests.engine.launch import launch
from tests.models import tiny

WORKER = Path(__file__).with_name("loading_worker.py")
# Files store experts one by one, the model stacks them: the library computes what it reads.
CASES = {
    "llama-bf16@bf16": True,
    "llama-bf16@fp32": True,
    "llama-fp32@bf16": True,
    "tied-bf16@bf16": True,
    "mixed@bf16": False,
    "qwen3_moe-bf16@bf16": False,
    "qwen3_moe-fp32@bf16": False,
}


def save(folder: Path, name: str) -> None:
    """Save the model that a name of CASES stands for, in several files."""
    family, _, stored = name.partition("-")
    settings = tiny.CAUSAL[family if family in tiny.CAUSAL else "llama"] | {"vocab_size": 101}
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        family if family in tiny.CAUSAL else "llama", **settings, tie_word_embeddings=family == "tied"
    )
    model = AutoModelForCausalLM.from_config(config)
    if stored != "fp32":
        model.bfloat16()
    if family == "mixed":
        model.model.norm.float()
    model.save_pretrained(folder / name, max_shard_size="100KB")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    for name in dict.fromkeys(case.partition("@")[0] for case in CASES):
        save(folder, name)
    done = launch(WORKER, folder, *CASES)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    assert done.returncode == 0 and len(lines) == len(CASES), done.stdout[-2000:] + done.stderr[-5000:]
    return folder, {case: ranks for line in lines for case, ranks in line.items()}


@pytest.mark.parametrize("case", CASES)
def test_sharded_teachers_and_students(found, case):
    folder, by_case = found
    name = case.partition("@")[0]
    made = architecture(str(folder / name), None, "student")
    mapped = mapped_dtype(str(folder / name), made, "causal_lm", "student")
    assert (mapped is not None) == CASES[case], "the case tries another way of reading than it should"
    for rank in by_case[case]:
        assert not rank["teacher"] and not rank["weights"] and not rank["masters"]
        assert rank["logits"] < (1e-5 if case.endswith("fp32") else 0.02)
        assert rank["sharded"] and rank["decays"] == [0.1, 0.0]


def test_a_teacher_is_loaded_once_in_its_own_type(tmp_path, monkeypatch):
    save(tmp_path, "llama-fp32")
    path = str(tmp_path / "llama-fp32")
    loads, read = [], AutoModelForCausalLM.from_pretrained

    def counting(*arguments, **options):
        loads.append(options["dtype"])
        return read(*arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counting)
    settings = {"task": "causal_lm", "teacher": {"path": path, "dtype": "bf16", "zero_stage": 0}}
    config = make_config(settings | {"student": {"path": path}})
    teacher = LazyTeacher(
        config, architecture(path, None, "teacher"), (), Ranks(0, 1, torch.device("cpu")), judged=True
    )
    first, second = teacher.tracer(()), teacher.tracer((), [2])
    assert first.model is second.model and loads == [torch.bfloat16]
    assert {parameter.dtype for parameter in first.model.parameters()} == {torch.bfloat16}
