"""Rows mixed with others (MixKD), against plain PyTorch on mixed embeddings."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsdistill.data.collate import mixed
from tests.alignment.rig import Rig, make_batch, with_filler
from tests.alignment.test_presets import terms_of
from tests.models.families import FAMILIES

LENGTHS, OTHERS = (9, 4, 1, 7), (5, 11, 6, 2)
SHARE = torch.tensor([0.3, 0.8, 1.0, 0.6])


def batch_of(task="classification"):
    own, other = (make_batch(task, of, max(of), seed=seed) for seed, of in enumerate((LENGTHS, OTHERS)))
    return mixed(own, other, SHARE, 0)


def logits(model, batch):
    """Return the logits of the library's forward pass on mixed embeddings of words."""
    words = model.get_input_embeddings()
    share = batch.share[:, None, None].to(words.weight.dtype)
    embeds = share * words(batch.input_ids) + (1 - share) * words(batch.partner_ids)
    return model(inputs_embeds=embeds, attention_mask=batch.mask.long()).logits


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_equals_the_published_formula(task):
    """Liang et al. 2021: cross-entropy of both labels, weighted by their shares, and squared differences of logits."""
    batch = batch_of(task)
    assert batch.mask.sum(1).tolist() == [9, 11, 1, 7]  # the longer text; the third is not mixed
    rig = Rig("bert", task, terms_of("mixkd", 0, None), {"num_hidden_layers": 2})
    rig.module.double(), rig.teacher.double()
    total, _, gradients = rig.step(batch)
    rig.module.zero_grad()
    mine, theirs = logits(rig.student, batch), logits(rig.teacher, batch).detach()
    if task == "classification":
        sides = [F.cross_entropy(mine, of, reduction="none") for of in (batch.labels, batch.partner_labels)]
        hard = (SHARE * sides[0] + (1 - SHARE) * sides[1]).mean()
    else:
        hard = F.mse_loss(mine[:, 0], SHARE * batch.labels + (1 - SHARE) * batch.partner_labels)
    loss = hard + F.mse_loss(mine, theirs)
    loss.backward()
    assert total == pytest.approx(loss.item(), rel=1e-6) and total > 0.1
    expected = {n: p.grad for n, p in rig.module.named_parameters() if p.grad is not None}
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-7 * whole, name


def test_class_weights_and_missing_labels():
    """A missing label's share counts neither in the loss nor in the divisor."""
    batch = batch_of()
    batch.labels[0], batch.partner_labels[1] = -100, -100
    weights = (0.5, 2.0, 1.0)
    rig = Rig("bert", terms={"task": {}}, class_weights=weights)
    raw = rig.step(batch)[1]["task"]
    with torch.no_grad():
        log_q = logits(rig.student, batch).double().log_softmax(-1)
    loss = count = 0.0
    for row in range(4):
        for label, share in ((batch.labels[row], SHARE[row]), (batch.partner_labels[row], 1 - SHARE[row])):
            if label >= 0:
                loss -= share * weights[label] * log_q[row, label]
                count += share * weights[label]
    assert raw == pytest.approx((loss / count).item(), rel=1e-5)


@pytest.mark.parametrize(
    "family", sorted({"distilbert", "roberta", "modernbert", "llama", "gpt2"} & set(FAMILIES))
)
def test_families_mix_their_embeddings(family):
    """A row that is entirely its partner's, at the partner's place, equals the partner; no hook stays behind."""
    other = make_batch("classification", OTHERS, max(OTHERS), seed=1)
    rig = Rig(family, terms={"task": {}, "soft_label": {}})
    rig.student.eval()  # DistilBERT has dropout before its head
    expected = rig.step(other)
    ids = torch.where(other.mask, 5, 0)  # other tokens at the same places
    swapped = replace(
        other, input_ids=ids, partner_ids=other.input_ids, partner_labels=other.labels, share=torch.zeros(4)
    )
    found = rig.step(swapped)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert rig.step(other)[0] == pytest.approx(expected[0], rel=1e-6)
    assert rig.step(replace(other, input_ids=ids))[0] != pytest.approx(expected[0], rel=1e-3)


def test_every_term_takes_mixed_rows_and_splits_do_not_matter():
    terms = {"task": {}, "soft_label": {}, "hidden": {}, "attention": {"heads": "mean"}, "ckd": {"window": 5}}
    rig, batch = Rig("bert", terms=terms, student={"hidden_size": 24, "num_hidden_layers": 2}), batch_of()
    whole = rig.step(batch)

    def part(rows):
        names = ("input_ids", "mask", "labels", "index", "partner_ids", "partner_labels", "share", "draw")
        return replace(batch, spans=None, **{name: getattr(batch, name)[rows] for name in names})

    filler = with_filler(make_batch("classification", (3,), 3), 1)
    filler = replace(filler, mask=torch.zeros_like(filler.mask))
    for parts in ([part([0, 1]), part([2, 3])], [part([3]), filler, part([0, 1, 2])]):
        found = rig.step(*parts)
        assert found[0] == pytest.approx(whole[0], rel=1e-5)
        assert found[1] == pytest.approx(whole[1], rel=1e-5)
