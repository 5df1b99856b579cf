"""Scores of text vectors: by hand, against scikit-learn and SciPy, and of models that have learned nothing."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import ndcg_score

from dsdistill.evaluation import similarity


def draw(count: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=-1)


def near(vectors: torch.Tensor, noise: float) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors + noise * draw(*vectors.shape, seed=5), dim=-1)


def retrieval(queries: torch.Tensor, documents: torch.Tensor) -> dict[str, float]:
    return similarity.retrieval(similarity.search(queries, documents)[:, 0])


def test_retrieval_by_hand():
    """The right documents come first, second and third of three."""
    queries = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]])
    documents = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, -1.0]])
    assert similarity.search(queries, documents).tolist() == [[1, 0], [2, 0], [3, 1]]
    found = retrieval(queries, documents)
    assert found["recall_1"] == pytest.approx(1 / 3) and found["recall_10"] == 1
    assert found["mrr_10"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert found["ndcg_10"] == pytest.approx((1 + 1 / np.log2(3) + 1 / 2) / 3)


@pytest.mark.parametrize("elements", [1, 150, 2**24])
def test_retrieval_is_scikit_learns_in_blocks_of_any_size(monkeypatch, elements):
    monkeypatch.setattr(similarity, "ELEMENTS", elements)
    documents = draw(40)
    queries = near(documents, 1.2)
    found = retrieval(queries, documents)
    cosines = (queries.double() @ documents.double().T).numpy()
    assert found["ndcg_10"] == pytest.approx(ndcg_score(np.eye(40), cosines, k=10))
    firsts = similarity.search(queries, documents)[:, 1]
    assert (firsts.numpy() == cosines.argmax(1)).all()
    right = cosines.diagonal()
    ranks = 1 + (cosines > right[:, None]).sum(1)
    assert 0 < (ranks == 1).mean() < (ranks <= 10).mean() < 1
    assert found["recall_1"] == pytest.approx((ranks == 1).mean())
    assert found["recall_10"] == pytest.approx((ranks <= 10).mean())
    assert found["mrr_10"] == pytest.approx(np.where(ranks <= 10, 1 / ranks, 0).mean())


def test_a_model_that_gives_all_texts_one_vector_finds_nothing():
    one = draw(1).expand(30, 8)
    assert set(retrieval(one, one).values()) == {0.0}
    assert (similarity.search(one, one)[:, 1] != torch.arange(30)).all()
    found = similarity.scores(one.repeat(2, 1), torch.arange(30.0))
    assert found == {"pearson": 0.0, "spearman": 0.0}


def test_judged_pairs_against_scipy():
    first = draw(20)
    vectors = torch.stack([first, near(first, 0.5)], dim=1).flatten(0, 1)
    gold = torch.rand(20, generator=torch.Generator().manual_seed(1))
    teacher = near(vectors, 0.3)
    found = similarity.scores(vectors, gold, teacher=teacher)
    cosines, theirs = ((of[::2] * of[1::2]).sum(1).double().numpy() for of in (vectors, teacher))
    assert found["pearson"] == pytest.approx(pearsonr(cosines, gold.numpy())[0], abs=1e-6)
    assert found["spearman"] == pytest.approx(spearmanr(cosines, gold.numpy())[0], abs=1e-6)
    assert found["teacher_pearson"] == pytest.approx(pearsonr(cosines, theirs)[0], abs=1e-6)
    assert found["teacher_spearman"] == pytest.approx(spearmanr(cosines, theirs)[0], abs=1e-6)
    assert found["distance"] == pytest.approx((1 - (vectors * teacher).sum(1)).mean().item(), abs=1e-6)
    assert set(found) == {"pearson", "spearman", "teacher_pearson", "teacher_spearman", "distance"}


def test_single_texts_are_compared_with_the_next_one():
    vectors, teacher = draw(9), draw(9, width=5)
    found = similarity.scores(vectors, None, teacher=teacher)
    cosines, theirs = ((of[:-1] * of[1:]).sum(1).numpy() for of in (vectors, teacher))
    assert found == {
        "teacher_pearson": pytest.approx(pearsonr(cosines, theirs)[0], abs=1e-5),
        "teacher_spearman": pytest.approx(spearmanr(cosines, theirs)[0], abs=1e-5),
    }
    assert similarity.scores(vectors[:1], None, teacher=teacher[:1]) == {}
    assert similarity.scores(vectors, None) == {}


def test_a_student_that_is_its_teacher():
    vectors = draw(12)
    found = similarity.scores(
        vectors, None, found=similarity.search(vectors[::2], vectors[1::2]), teacher=vectors
    )
    assert found["teacher_spearman"] == found["teacher_pearson"] == pytest.approx(1)
    assert found["distance"] == pytest.approx(0, abs=1e-6) and {"recall_1", "ndcg_10"} <= found.keys()


def test_first_values_of_vectors_are_scored_as_vectors():
    """Each length gets the set's score: judged, searched, or against the teacher; the full width adds no new score."""
    vectors, teacher, gold = draw(40, 16), draw(40, 7, seed=3), torch.rand(20)
    short = torch.nn.functional.normalize(vectors[:, :4].double(), dim=-1)
    cosines = (short[::2] * short[1::2]).sum(1).numpy()
    found = similarity.by_length(vectors, gold, (4, 16), searched=False, teacher=teacher)
    assert found == {"spearman_of_4": pytest.approx(spearmanr(cosines, gold.numpy())[0])}
    found = similarity.by_length(vectors, None, (4, 8, 16), searched=True)
    assert list(found) == ["recall_10_of_8", "recall_10_of_4"]
    ranks = (short[::2] @ short[1::2].T).argsort(descending=True).argsort().diag()
    assert found["recall_10_of_4"] == pytest.approx((ranks < 10).double().mean().item())
    found = similarity.by_length(vectors, None, (4,), searched=False, teacher=teacher)
    mine, theirs = ((of[:-1] * of[1:]).sum(1).numpy() for of in (short, teacher))
    assert found == {"teacher_spearman_of_4": pytest.approx(spearmanr(mine, theirs)[0])}
    assert similarity.by_length(vectors, None, (4,), searched=False) == {}
