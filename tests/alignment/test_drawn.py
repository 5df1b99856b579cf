"""Every token is equally likely to be drawn; draw and layer alone decide, and each part gives one row."""

from dataclasses import replace

import pytest
import torch

from dsdistill.alignment.drawn import rows_of, stratified
from dsdistill.data.packing import Document, packed_batch
from dsdistill.ops import attention_alignment, pairwise_alignment
from tests.alignment.rig import make_batch, padded, rows

LENGTHS = (7, 5, 2)  # 35 draws of the same number of each sequence's tokens meet every pair of offsets


def all_draws(count: int):
    """Yield the rows of all equal offsets. The loss adds up over rows, so other offsets are not needed."""
    counts = torch.tensor(LENGTHS)[:, None]
    for number in range(70):
        yield stratified(number % counts.expand(-1, count), counts)


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"divergence": "mse", "causal": True}, {"divergence": "mse", "window": 3}],
    ids=str,
)
def test_the_mean_over_the_draws_of_attention_is_the_whole_loss(options):
    torch.manual_seed(0)
    given = [torch.randn(3, heads, 7, 4, dtype=torch.float64) for heads in (4, 2, 4, 1)]
    given[0].requires_grad_(), given[1].requires_grad_()
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    whole = attention_alignment(*given, mask=mask, **options)
    losses = [attention_alignment(*given, mask=mask, rows=(i, None), **options) for i in all_draws(3)]
    mean = sum(losses) / len(losses)
    torch.testing.assert_close(mean, whole, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, given[:2]) for loss in (mean, whole)]
    for mine, true in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-14)
    assert (
        max(abs(loss.item() / whole.item() - 1) for loss in losses) > 0.01
    )  # a single draw differs from the whole loss


def test_the_mean_over_the_draws_of_pairwise_is_the_whole_loss():
    torch.manual_seed(0)
    student = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    teacher, mask = torch.randn(3, 7, 5).double(), torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    whole = pairwise_alignment(student, teacher, mask=mask)
    losses = [pairwise_alignment(student, teacher, mask=mask, rows=(i, None)) for i in all_draws(4)]
    mean = sum(losses) / len(losses)
    torch.testing.assert_close(mean, whole, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (mean, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-14)


def test_one_row_from_each_part_by_hand():
    offsets, counts = torch.tensor([[0, 3, 5], [0, 1, 1], [0, 0, 0]]), torch.tensor([[6], [2], [0]])
    # Parts of two tokens: 0 + 0 / 3, (6 + 3) / 3, (12 + 5) / 3. A sequence of two tokens gives both, an empty one none.
    assert stratified(offsets, counts).tolist() == [[0, 3, 5], [0, 1, -1], [-1, -1, -1]]


def test_draw_and_layer_decide_alone():
    batch = make_batch("classification", (14, 9, 3, 12))
    (index, weights) = rows_of(batch, 5, 2, True)
    assert index.shape == (4, 5) and weights is None and (index[2] == torch.tensor([0, 1, 2, -1, -1])).all()
    assert (index[0].diff() >= 0).all() and ((index >= -1) & (index < 14)).all()
    assert torch.equal(rows_of(rows(batch, [3, 0]), 5, 2, True)[0], index[[3, 0]])
    assert torch.equal(rows_of(padded(batch, 9), 5, 2, True)[0], index)
    assert not torch.equal(rows_of(batch, 5, 3, True)[0], index)
    assert not torch.equal(rows_of(replace(batch, draw=batch.draw + 1), 5, 2, True)[0], index)
    assert rows_of(batch, 5, 2, False) is rows_of(batch, None, 2, True) is rows_of(batch, 14, 2, True) is None


def test_without_a_draw_torchs_generator_decides():
    batch = replace(make_batch("classification"), draw=None)
    torch.manual_seed(3)
    first, second = (rows_of(batch, 4, 1, True)[0] for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(rows_of(batch, 4, 1, True)[0], first) and not torch.equal(first, second)


def test_draws_are_even_and_unrelated():
    """Draw 10 rows of each of 4,000 sequences of 50 tokens. A share of 1/5 has a deviation of 0.0063."""
    mask = torch.ones(4000, 50, dtype=torch.bool)
    batch = replace(make_batch("classification"), mask=mask, draw=torch.arange(4000))
    chosen = [rows_of(batch, 10, layer, True)[0] for layer in (1, 2)]
    for index in chosen:
        share = torch.bincount(index.flatten(), minlength=50) / 4000
        assert (share - 0.2).abs().max() < 0.03
    together = (chosen[0] == chosen[1]).float().mean(0), (chosen[0][1:] == chosen[0][:-1]).float().mean(0)
    within = (chosen[0][:, 1:] % 5 == chosen[0][:, :-1] % 5).float().mean(0)
    for share in (*together, within):
        assert (share - 0.2).abs().max() < 0.03


def test_packed_documents_keep_their_draws():
    """Only the row's draw and the document's place in the row decide, not which rows share the batch."""
    documents = [Document(torch.arange(2, 2 + n).numpy()) for n in (9, 9, 9, 9)]
    both = replace(packed_batch([documents[:2], documents[2:]], 0), draw=torch.tensor([5, 6]))
    second = replace(packed_batch([documents[2:]], 0), draw=torch.tensor([6]))
    index = rows_of(both.unpacked, 4, 1, True)[0]
    assert torch.equal(rows_of(second.unpacked, 4, 1, True)[0], index[2:])
    assert len({tuple(row) for row in index.tolist()}) == 4
