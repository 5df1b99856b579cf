"""Sources drawn by how far the student is behind its teacher in each (data.sampler ddk)."""

import itertools
import json
import math

import pytest
import yaml

from dsdistill.config import UserError
from dsdistill.config.schema import Data
from dsdistill.engine.refusals import check_domains
from dsdistill.engine.reweighing import next_shares
from tests.engine.launch import run_configs
from tests.engine.test_corpora import home, lines, settings  # noqa: F401  # one of these is a fixture
from tests.engine.test_resume import losses


def test_by_hand():
    """Liu et al. 2024, equations 1 and 2, with α = 0.5."""
    student, teacher = (6.0, 12.0, 20.0), (3.0, 10.0, 20.0)
    powers = [math.exp(s / t) for s, t in zip(student, teacher, strict=True)]  # e², e^1.2, e
    first = [power / sum(powers) for power in powers]
    assert next_shares(None, student, teacher) == pytest.approx(first)
    weighted = [share * power for share, power in zip(first, powers, strict=True)]
    second = [0.5 * x / sum(weighted) + 0.5 / 3 for x in weighted]
    assert next_shares(first, student, teacher) == pytest.approx(second)
    assert sum(second) == pytest.approx(1) and min(second) > 1 / 6
    far = next_shares(None, (1e6, 2.0), (2.0, 2.0))
    assert far == pytest.approx([1, 0])


def test_a_run_draws_by_what_it_finds_and_a_resume_draws_the_same(home, tmp_path):  # noqa: F811
    """Shares follow the logged perplexities, on one rank or two, and after a resume from a checkpoint."""
    parts = [
        {"train": "chats.jsonl", "name": "chat"},
        {"train": "pairs.jsonl", "text": ["question", "answer"], "layout": "template", "name": "quiz"},
    ]
    dev = {"chat": "dev.jsonl", "quiz": "chats.jsonl"}
    paths = []
    for name in ("one", "two"):
        path = settings(home, tmp_path, name, train=parts, packing=False, sampler="ddk", dev=dev)
        made = yaml.safe_load(path.read_text())
        made["run"]["evaluate_every"] = 2
        made["terms"] = {"task": {}, "soft_label": {"weight": 0.2, "temperature": 1.0}}
        made["train"]["learning_rate"] = 1e-2
        path.write_text(yaml.safe_dump(made))
        paths.append(path)
    run_configs(paths[:1], ranks=1)
    run_configs(paths[1:], ranks=2)
    kept, shared = (json.loads((tmp_path / name / "shares.json").read_text()) for name in ("one", "two"))
    assert [step for step, _ in kept] == [0, 2, 4, 6]
    assert kept[0][1] != pytest.approx([0.5, 0.5], abs=1e-4)
    for (_, mine), (_, other) in zip(kept, shared, strict=True):
        assert mine == pytest.approx(other, rel=1e-3)
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())["models"]
    theirs = [summary["teacher"][f"{name}/perplexity"] for name in dev]
    logged = {line["step"]: line["evaluation"] for line in lines(tmp_path / "one") if "evaluation" in line}
    for (_, before), (step, shares) in itertools.pairwise(kept):
        ours = [logged[step][f"{name}/perplexity"] for name in dev]
        assert shares == pytest.approx(next_shares(before, ours, theirs), rel=1e-6)

    before = losses(tmp_path / "one")
    assert before[-1]["loss"] != before[0]["loss"] and len(before) == 6
    run_configs([f"{paths[0]}@3"], ranks=1)
    assert losses(tmp_path / "one") == before
    again = json.loads((tmp_path / "one" / "shares.json").read_text())
    assert [shares for _, shares in again] == [shares for _, shares in kept]


def test_a_source_without_a_dev_set_is_refused():
    with pytest.raises(
        UserError, match=r"^data\.dev: got no set named b, expected one for each source: a, b$"
    ):
        check_domains(Data(sampler="ddk"), ("a", "b"), {"a": None, "": None})
    check_domains(Data(), ("a", "b"), {"": None})
