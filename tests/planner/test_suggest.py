"""Proposals of `plan --suggest` are compared with rehearsals of the same settings."""

import re

import pytest

from dsdistill.config.load import make_config
from dsdistill.planner.plan import Forecast, peak
from dsdistill.planner.suggest import proposals, suggest
from tests.planner.test_plan import settings_of

MIB = 2**20
DATA = {"source": "files", "train": "x.tsv", "dev": "x.tsv", "tokenizer": "x"}
BASE = {
    "train.batch_size": 16,
    "train.micro_batch_size": 16,
    "data.max_length": 512,
    "teacher.zero_stage": 0,
    "student.zero_stage": 1,
    "terms": {"task": {}, "hidden": {}},
}


def config_of(overrides=()):
    changes = dict(BASE)
    for override in overrides:
        key, _, value = override.partition("=")
        if "offload" in key:
            key, value = "student.deepspeed", {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
        elif value.isdecimal():
            value = int(value)
        changes[key] = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
    return make_config(settings_of(changes, DATA))


def needs(*overrides: str) -> int:
    config = config_of(overrides)
    phases = Forecast(config, 1, gpu=False).stages(config.train.micro_batch_size)
    return max(map(peak, phases.values()))


@pytest.fixture(scope="module")
def between() -> int:
    """Return a memory that holds micro-batches of 4 if their layers run again, but not of 1 with kept layers."""
    kept, again = needs("train.micro_batch_size=1"), needs(
        "train.micro_batch_size=1", "student.gradient_checkpointing=true"
    )  # fmt: skip
    assert again < kept - 20 * MIB
    return (kept + again) // 2


def test_what_is_proposed_fits(between):
    *before, found = suggest(config_of, 1, between, gpu=False, ranks=1)
    assert found.fits and [one.fits for one in before] == [False]
    overrides = dict(override.split("=", 1) for override in found.overrides)
    assert overrides["student.gradient_checkpointing"] == "true"
    size = int(overrides["train.micro_batch_size"])
    assert needs(*found.overrides) == found.needs <= between
    assert 16 % size == 0 and needs(*found.overrides, f"train.micro_batch_size={2 * size}") > between


def test_words_that_can_be_typed():
    memory = 64 * 1024 * MIB
    text = proposals(suggest(config_of, 1, memory, gpu=False, ranks=1), memory)
    assert re.match(
        r"\nproposed: train\.micro_batch_size=16 teacher\.zero_stage=0 student\.zero_stage=1 "
        r"student\.gradient_checkpointing=false\n  \d+\.\d\d of 64\.00 GiB per rank, \d+\.\d\d GiB of host",
        text,
    ), text


def test_nothing_fits():
    """Nothing is rehearsed if the weights alone are too large."""
    tried = suggest(config_of, 8, 16 * MIB, gpu=False, ranks=8)
    assert len(tried) == 24 and not any(one.fits for one in tried)
    text = proposals(tried, 16 * MIB)
    assert "proposed: nothing, as none of these fits" in text and text.count("more than") == 24
    assert "'student.deepspeed.zero_optimization.offload_optimizer={device: cpu, pin_memory: true}'" in text


def test_a_host_that_is_too_small():
    tried = suggest(config_of, 8, 10_000 * MIB, gpu=False, ranks=8, host_memory=500 * MIB)
    assert len(tried) == 24 and not any(one.fits for one in tried)
