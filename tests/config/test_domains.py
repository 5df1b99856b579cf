"""Settings with which data.sampler ddk cannot work are each refused in one line."""

import pytest

from dsdistill.config import UserError
from dsdistill.config.load import make_config
from tests.conftest import merge

GOOD = {
    "task": "causal_lm",
    "run": {"evaluate_every": 10},
    "data": {
        "source": "files",
        "train": [{"train": "a.txt", "name": "a"}, {"train": "b.txt", "name": "b"}],
        "dev": {"a": "c.txt", "b": "d.txt"},
        "sampler": "ddk",
    },
    "teacher": {"path": "t"},
    "student": {"path": "s"},
    "terms": {"task": {}, "soft_label": {}},
}


def test_good():
    assert make_config(merge(GOOD, {}), "x").data.sampler == "ddk"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data.train": "a.txt"}, "data.sampler: got ddk with one source, expected data.train as a list"),
        (
            {"task": "regression"},
            "data.sampler: got ddk with task regression, expected causal_lm or masked_lm",
        ),
        (
            {"teacher": None, "terms": {"task": {}}},
            "data.sampler: got ddk without a teacher, expected a teacher section",
        ),
        (
            {"data.train": [{"train": "a.txt"}, {"train": "b.txt", "weight": 2.0}]},
            "data.train.1.weight: got 2.0 with data.sampler ddk, expected no weight",
        ),
        ({"run.evaluate_every": 0}, "run.evaluate_every: got 0 with data.sampler ddk, expected the steps"),
        ({"train.group_by_length": True}, "train.group_by_length: got true with data.sampler ddk"),
        ({"teacher.overlap": True}, "teacher.overlap: got true with data.sampler ddk"),
    ],
)
def test_bad(changes, line):
    with pytest.raises(UserError) as caught:
        make_config(merge(GOOD, changes), "x")
    assert str(caught.value).startswith(f"x: {line}")
