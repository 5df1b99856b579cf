"""A run may take a share of the train examples, and wrong labels on purpose."""

import pytest
import torch

from dsdistill.config.errors import UserError
from dsdistill.config.load import make_config
from dsdistill.config.schema import Data as Section
from dsdistill.data.sample import chosen, with_noise
from tests.data.rig import load
from tests.data.test_loader import examples


def draw(examples, fraction, seed):
    return examples.take(chosen(len(examples), fraction, seed))


class TestFraction:
    def test_examples_stay_whole_and_in_order(self):
        whole = examples(50, token_types=True)
        part = draw(whole, 0.5, seed=3)
        kept = [int(name.split()[1]) for name in part.given_ids]
        assert len(part) == 25 and kept == sorted(set(kept)) and kept != list(range(25))
        assert part.labels.tolist() == kept
        for i, row in enumerate(kept):
            assert part.tokens(i).tolist() == whole.tokens(row).tolist()
            assert part.types(i).tolist() == whole.types(row).tolist()

    def test_a_smaller_one_lies_in_a_larger(self):
        kept = [set(draw(examples(50), fraction, seed=3).given_ids) for fraction in (0.01, 0.2, 0.41, 1.0)]
        assert [len(ids) for ids in kept] == [1, 10, 21, 50]
        assert kept[0] < kept[1] < kept[2] < kept[3]

    def test_seed(self):
        assert draw(examples(50), 0.5, seed=3).given_ids == draw(examples(50), 0.5, seed=3).given_ids
        assert draw(examples(50), 0.5, seed=3).given_ids != draw(examples(50), 0.5, seed=4).given_ids

    def test_text_without_labels(self):
        part = draw(examples(10, labels=None), 0.3, seed=0)
        assert len(part) == 3 and part.labels is None


class TestNoise:
    @pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
    def test_so_many_labels_are_wrong(self, share):
        whole = examples(200)
        whole.labels.remainder_(5)
        noisy = with_noise(whole, share, 5, seed=1)
        wrong = noisy.labels != whole.labels
        assert int(wrong.sum()) == round(200 * share)
        assert noisy.labels.dtype == torch.int64 and set(noisy.labels.tolist()) == set(range(5))
        assert whole.labels.tolist() == [i % 5 for i in range(200)]  # left alone

    def test_every_other_class_comes_in(self):
        whole = examples(3000)
        whole.labels.fill_(1)
        counts = with_noise(whole, 1.0, 4, seed=1).labels.bincount(minlength=4)
        assert counts[1] == 0 and all(count > 900 for count in counts[[0, 2, 3]])

    def test_a_smaller_share_lies_in_a_larger(self):
        whole = examples(100)
        whole.labels.remainder_(3)
        few, many = (with_noise(whole, share, 3, seed=1).labels for share in (0.1, 0.3))
        wrong = few != whole.labels
        assert torch.equal(few[wrong], many[wrong])

    def test_scores_change_hands(self):
        whole = examples(50, labels=torch.float32)
        noisy = with_noise(whole, 0.4, 0, seed=1)
        assert int((noisy.labels != whole.labels).sum()) == 20
        assert sorted(noisy.labels.tolist()) == whole.labels.tolist()

    def test_seed(self):
        whole = examples(50)
        whole.labels.remainder_(3)
        labels = [with_noise(whole, 0.5, 3, seed).labels.tolist() for seed in (1, 1, 2)]
        assert labels[0] == labels[1] != labels[2]


def test_the_train_set_alone(tokenizer, tmp_path):
    """Half of 40 rows are kept, a quarter of these mislabelled; the dev set and the teacher's texts stay the same."""
    lines = [f"{chr(97 + i % 26)}\t{'xy'[i % 2]}\trow {i}" for i in range(40)]
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\tid\n" + "\n".join(lines) + "\n", encoding="utf-8")
    section = {"source": "files", "train": str(path), "dev": str(path)}
    clean = load(Section(**section), "classification", tokenizer)
    found = load(Section(**section, fraction=0.5, label_noise=0.25), "classification", tokenizer, seed=7)
    assert len(found.train) == 20 and found.dev.labels.equal(clean.dev.labels)
    right = torch.tensor([int(name.split()[1]) % 2 for name in found.train.given_ids])
    assert int((found.train.labels != right).sum()) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "causal_lm", "data": {"label_noise": 0.1}}, r"data.label_noise: got task causal_lm"),
        ({"terms": {"hidden": {}}, "data": {"label_noise": 0.1}}, "got no term that reads labels"),
        ({"data": {"label_noise": 1.1}}, "data.label_noise"),
        ({"data": {"fraction": 0.0}}, "data.fraction"),
        ({"data": {"chunker": "jieba"}}, "data.chunker: got jieba, but nothing in this run reads"),
    ],
)
def test_refused(changes, message):
    model = {"config": {"model_type": "bert"}}
    with pytest.raises(UserError, match=message):
        make_config({"teacher": model, "student": model} | changes)
