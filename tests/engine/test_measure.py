"""`evaluate` measures more than the scores."""

import statistics
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification

from dsdistill.data import Examples
from dsdistill.engine.passes import dev_scores
from dsdistill.engine.passes.dev_scores import TIMED, WARM, latency
from tests.conftest import BERT
from tests.data.rig import made


def examples(lengths: list[int]) -> Examples:
    return made([[5] * length for length in lengths], labels=[0] * len(lengths))


@pytest.mark.parametrize("count", [1000, TIMED, 7])
def test_latency_is_the_median_over_the_dev_set_and_not_over_its_longest_texts(monkeypatch, count):
    """Timing uses a clock that each token advances by a millisecond."""
    lengths = [3 + i % 5 for i in range(count)]
    lengths[: count // 5] = [60] * (count // 5)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**BERT)).eval()
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].shape), with_kwargs=True
    )
    monkeypatch.setattr(
        dev_scores, "time", SimpleNamespace(perf_counter=lambda: sum(n for _, n in seen) / 1000)
    )
    prepared = SimpleNamespace(
        data=SimpleNamespace(dev=examples(lengths)), tokenizer=SimpleNamespace(pad_token_id=0)
    )
    found = latency(model, prepared)
    sample = min(TIMED, count)
    assert len(seen) == min(WARM, sample) + sample and {rows for rows, _ in seen} == {1}
    timed = [tokens for _, tokens in seen[-sample:]]
    assert timed.count(60) == sample // 5  # the same share as in the whole set
    assert found == {"latency_ms": statistics.median(timed)} == {"latency_ms": statistics.median(lengths)}
