"""Plans of sentence encoders have two rows per pair, no logits, and terms over vectors."""

import pytest

from dsdistill.config.load import make_config
from dsdistill.planner.plan import make_plan, peak

BERT = {"model_type": "bert", "vocab_size": 1000, "max_position_embeddings": 128}
TEACHER = BERT | {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 192,
}
STUDENT = TEACHER | {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96}


def planned(texts: list[str], terms: dict, micro_batch_size: int):
    settings = {
        "task": "embedding",
        "data": {"source": "files", "train": "t.tsv", "dev": "d.tsv", "text": texts, "max_length": 64},
        "teacher": {"config": TEACHER, "zero_stage": 0},
        "student": {"config": STUDENT},
        "terms": terms,
        "train": {"batch_size": 16, "micro_batch_size": micro_batch_size},
    }
    return make_plan(make_config(settings), 1, gpu=False, memory=2**34)


def test_a_pair_takes_what_two_texts_take():
    terms = {"embedding": {"dims": [48, 24]}, "hidden": {}, "attention": {}, "pkt": {}}
    pairs, single = planned(["query", "document"], terms, 4), planned(["text"], terms, 8)
    assert peak(pairs.phases) == pytest.approx(peak(single.phases), rel=0.01)
    assert (
        pairs.instead["attention maps of the mapped layers"]
        == single.instead["attention maps of the mapped layers"]
    )
    assert "logits" not in pairs.instead


def test_the_contrast_is_a_term_of_little_memory():
    without = planned(["query", "document"], {"embedding": {}}, 4)
    contrast = planned(["query", "document"], {"embedding": {}, "task": {}}, 4)
    assert peak(without.phases) <= peak(contrast.phases) <= 1.05 * peak(without.phases)
