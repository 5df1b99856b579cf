"""Terms over vectors of texts are compared with plain transformers and PyTorch in float64, and across ranks."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

from dsdistill.alignment.units import unit_vectors
from dsdistill.config import UserError
from dsdistill.data.batch import NO_LABEL, Batch
from tests.alignment.rig import Rig, make_batch
from tests.alignment.two_ranks import average_over_two_ranks, whole

LENGTHS = (14, 9, 3, 1, 12, 7)
NARROW = {"hidden_size": 24, "num_hidden_layers": 2}


def make_rig(terms: dict, family: str = "bert", pooling=("mean", "mean"), student=NARROW) -> Rig:
    rig = Rig(family, "embedding", terms, student, pooling=pooling)
    rig.module.double()
    rig.teacher.double()
    return rig


def make_pairs(order=(0, 0, 1, 1, 2, 2), seed: int = 0) -> Batch:
    """Make six texts; two with the same number in `order` are a pair. Nobody reads the labels."""
    batch = make_batch("regression", LENGTHS, seed=seed)
    return replace(batch, labels=torch.full((6,), torch.nan), pair=torch.tensor(order))


def plain_vectors(model, batch: Batch, pooling: str) -> list[torch.Tensor]:
    """Return the vector that plain transformers gives each text by itself, without padding, pooled by definition."""
    found = []
    for ids, length in zip(batch.input_ids, batch.mask.sum(1), strict=True):
        states = model(input_ids=ids[None, :length]).last_hidden_state[0]
        found.append({"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling])
    return found


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_model_without_a_head_is_plain_transformers(pooling):
    rig = make_rig({"embedding": {}}, pooling=(pooling, "mean"))
    assert type(rig.student) is type(AutoModel.from_config(rig.student.config))
    rig.module.eval()
    batch = make_pairs()
    with torch.no_grad():
        vectors = rig.module(batch)
        for mine, plain in zip(vectors, plain_vectors(rig.student, batch, pooling), strict=True):
            assert torch.allclose(mine, F.normalize(plain, dim=0), rtol=1e-9, atol=1e-12)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize(("mine", "theirs"), [("mean", "mean"), ("cls", "last"), ("last", "cls")])
@pytest.mark.parametrize("divergence", ["cosine", "mse"])
def test_embedding_is_its_definition(family, mine, theirs, divergence):
    student = NARROW if family == "bert" else {"n_embd": 24, "n_layer": 2}
    terms = {"embedding": {"divergence": divergence, "dims": [24, 16, 8]}}
    rig = make_rig(terms, family, (mine, theirs), student)
    rig.module.eval()
    batch = make_pairs()
    total, raw, gradients = rig.step(batch)
    (term,) = rig.objective.terms.values()
    rig.module.zero_grad()
    expected = 0.0
    pairs = zip(
        plain_vectors(rig.student, batch, mine), plain_vectors(rig.teacher, batch, theirs), strict=True
    )
    for student, teacher in pairs:
        for width in (24, 16, 8):
            projected = term.projectors[str(width)].weight @ student[:width]
            if divergence == "mse":
                loss = (projected - teacher).square().mean()
            else:
                loss = 1 - projected @ teacher / (projected.norm() * teacher.norm())
            expected = expected + loss / (6 * 3)
    expected.backward()
    assert total == pytest.approx(expected.item(), rel=1e-6)
    assert raw["embedding"] == pytest.approx(total, rel=1e-6)
    for name, parameter in rig.module.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-5, atol=1e-9), name


def test_vectors_of_one_width_are_not_projected():
    assert (
        not make_rig({"embedding": {}}, student={"num_hidden_layers": 2})
        .objective.terms["embedding"]
        .projectors
    )
    half = make_rig({"embedding": {"dims": [32, 24]}}, student={"num_hidden_layers": 2})
    assert list(half.objective.terms["embedding"].projectors) == ["24"]
    always = make_rig({"embedding": {"projector": "linear"}}, student={"num_hidden_layers": 2})
    assert list(always.objective.terms["embedding"].projectors) == ["32"]


@pytest.mark.parametrize("dims", [[32], [24, 24]])
def test_dims_beyond_the_student_or_twice_are_refused(dims):
    with pytest.raises(UserError, match=r"^terms.embedding.dims: got .* a student 24 wide"):
        make_rig({"embedding": {"dims": dims}})


def plain_contrast(queries, documents, temperature: float):
    """Return the mean over queries of −log of the right document's probability, written out."""
    total = 0.0
    for i, query in enumerate(queries):
        cosines = torch.stack([query @ d / (query.norm() * d.norm()) for d in documents]) / temperature
        total = total + cosines.logsumexp(0) - cosines[i]
    return total / len(queries)


@pytest.mark.parametrize("order", [(0, 0, 1, 1, 2, 2), (2, 0, 1, 1, 2, 0)])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_the_task_of_pairs_is_contrast_in_the_batch(order, temperature):
    """The order of the rows does not matter, but which text of a pair comes first does."""
    rig = make_rig({"task": {"temperature": temperature}})
    rig.module.eval()
    total, _, gradients = rig.step(make_pairs(order))
    rig.module.zero_grad()
    vectors = plain_vectors(rig.student, make_pairs(), "mean")
    queries = [vectors[order.index(number)] for number in range(3)]
    documents = [vectors[5 - order[::-1].index(number)] for number in range(3)]
    expected = plain_contrast(queries, documents, temperature)
    expected.backward()
    assert total == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in rig.module.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7), name


def test_the_task_of_pairs_is_the_librarys_loss():
    """The default temperature corresponds to the scale of 20 in MultipleNegativesRankingLoss."""
    losses = pytest.importorskip("sentence_transformers.losses")
    rig = make_rig({"task": {}})
    batch = make_pairs()
    rig.module.eval()
    with torch.no_grad():
        states = rig.student(input_ids=batch.input_ids, attention_mask=batch.mask.long()).last_hidden_state
        vectors = unit_vectors(states, batch, "mean")
        loss = losses.MultipleNegativesRankingLoss(model=torch.nn.Identity())
        expected = loss.compute_loss_from_embeddings([vectors[::2], vectors[1::2]], None)
    total, _, _ = rig.step(batch)
    assert total == pytest.approx(expected.item(), rel=1e-6)


def test_filler_and_padding_change_nothing():
    terms = {"task": {}, "embedding": {}}
    rig = make_rig(terms)
    rig.module.eval()
    batch = make_pairs()
    total, raw, _ = rig.step(batch)
    add = torch.nn.functional.pad
    filled = Batch(
        add(batch.input_ids, (0, 3, 1, 1)),
        add(batch.mask, (0, 3, 1, 1)),
        add(batch.labels, (1, 1), value=NO_LABEL),
        index=add(batch.index, (1, 1), value=-1),
        pair=add(batch.pair, (1, 1), value=-1),
    )
    assert rig.step(filled)[0] == pytest.approx(total, rel=1e-9)
    assert rig.counts([filled]).tolist() == rig.counts([batch]).tolist() == [3, 6]
    alone = Batch(
        filled.input_ids[:1], filled.mask[:1], filled.labels[:1], index=filled.index[:1], pair=filled.pair[:1]
    )
    both, again, _ = rig.step(batch, alone)
    assert both == pytest.approx(total, rel=1e-9) and again == pytest.approx(raw, rel=1e-9)


def test_a_step_weighs_its_micro_batches_by_their_pairs():
    """InfoNCE with more negatives is another loss, so accumulation gives the mean over the micro-batches' pairs."""
    rig = make_rig({"task": {}})
    rig.module.eval()
    first, second = make_pairs(), make_pairs((0, 0, -1, -1, 1, 1), seed=1)
    second = replace(second, mask=second.mask & (second.pair >= 0)[:, None])
    alone = [rig.step(part)[1]["task"] for part in (first, second)]
    assert rig.step(first, second)[1]["task"] == pytest.approx((3 * alone[0] + 2 * alone[1]) / 5, rel=1e-6)


def test_two_ranks_are_one_with_all_pairs(tmp_path):
    """The ranks hold 2 and 1 pairs, and in a second micro-batch 2 and none."""
    values, gradients = average_over_two_ranks(tmp_path, "pairs")
    expected_values, expected = whole("pairs")
    assert values == pytest.approx(expected_values, rel=1e-4)
    assert gradients.keys() == expected.keys()
    size = torch.cat([g.flatten() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * size, name
