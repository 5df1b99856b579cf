"""With backend "auto", measurements on GPUs choose the backend."""

import json
import logging
from pathlib import Path

import pytest
import torch

from dsdistill.ops import attention_alignment, hidden_alignment, pairwise_alignment, records
from dsdistill.ops.soft_label import joint, op

WANTED = {"operator": "attention_alignment", "variant": "kl", "dtype": "bfloat16"}


def record(capability, *rows):
    return {"gpu": "some", "capability": capability, "rows": [WANTED | row for row in rows]}


def row(backend, ratio, tokens=4096, checked=True):
    return {"backend": backend, "vs_chunked": ratio, "tokens": tokens, "checked": checked}


def choose(known, capability=(9, 0), tokens=4096, agrees=True, **changes):
    asked = []
    found = records.fastest(
        known,
        capability,
        **(WANTED | changes),
        tokens=tokens,
        candidates=["cuda", "triton"],
        check=lambda backend: (asked.append(backend), agrees)[1],
    )
    return found, asked


def test_without_a_record_there_is_no_choice():
    assert choose([]) == (None, [])


def test_the_fastest_of_its_own_architecture_is_taken_unasked():
    known = [record([9, 0], row("triton", 3.0), row("cuda", 2.0)), record([8, 0], row("cuda", 9.0))]
    assert choose(known) == ("triton", [])
    assert choose(known, capability=(8, 0)) == ("cuda", [])


def test_another_architecture_is_checked_first():
    known = [record([9, 0], row("triton", 3.0), row("cuda", 2.0))]
    assert choose(known, capability=(8, 0)) == ("triton", ["triton"])
    assert choose(known, capability=(8, 0), agrees=False) == (None, ["triton", "cuda"])


def test_slower_unchecked_and_other_rows_do_not_count():
    assert choose([record([9, 0], row("triton", 0.9))])[0] is None
    assert choose([record([9, 0], row("triton", 3.0, checked=False))])[0] is None
    known = [record([9, 0], row("triton", 3.0))]
    for changes in ({"dtype": "float32"}, {"variant": "mse"}, {"operator": "pairwise_alignment"}):
        assert choose(known, **changes)[0] is None


def test_the_nearest_length_decides():
    known = [record([9, 0], row("triton", 0.8, tokens=128), row("triton", 3.0, tokens=4096))]
    assert choose(known, tokens=100)[0] is None
    assert choose(known, tokens=1500)[0] == "triton"


@pytest.mark.parametrize(
    ("function", "variant", "shapes"),
    [
        (attention_alignment, "mse mean", dict.fromkeys(("student_query", "student_key"), (1, 2, 9, 4))),
        (pairwise_alignment, "distance", {"student": (1, 9, 4), "teacher": (1, 9, 5)}),
        (hidden_alignment, "cosine projected", {"student": (1, 9, 4), "teacher": (1, 9, 4)}),
        (op.soft_label_alignment, "jsd", op.SMALL_CALL),
        (joint._total, "tvd", op.SMALL_CALL),
        (op._task_of_logits, "task", {k: v for k, v in op.SMALL_CALL.items() if k.startswith("student")}),
    ],
    ids=["attention", "pairwise", "hidden", "soft labels", "vocabulary", "cross-entropy"],
)
def test_the_small_call_compares_with_chunked(function, variant, shapes, caplog):
    if function is attention_alignment:
        shapes = shapes | dict.fromkeys(("teacher_query", "teacher_key"), (1, 2, 9, 4))
    with caplog.at_level(logging.WARNING, logger="dsdistill"):
        assert records.agreement(torch.float32, "cpu", "reference", function, shapes, variant)
        assert not records.agreement(torch.float32, "cpu", "cuda", function, shapes, variant)
    assert "'cuda' failed on a small call" in caplog.text


def test_the_records_that_are_shipped_have_what_auto_reads():
    text = (records.FOLDER / "README.md").read_text(encoding="utf-8")
    example = json.loads(text.split("```json")[1].split("```")[0])
    for found in (example, *records.records()):
        assert len(found["capability"]) == 2
        for each in found["rows"]:
            assert WANTED.keys() | {"backend", "vs_chunked", "tokens", "checked"} <= each.keys()
    assert bool(records.records()) != ("Nothing has run on a GPU yet" in text)
    assert "bench/results/*" in (Path(__file__).parents[2] / "pyproject.toml").read_text()
