"""Published objectives, as the presets' files put them together, against plain PyTorch that writes their formulas out.

In float64, loss and every gradient. Published averages that count padding are taken over what is valid instead;
without padding the formulas are literally those of the papers.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsdistill.config import load
from tests.alignment.plain_bert import look, relation, row_kl
from tests.alignment.rig import Rig, make_batch

# A teacher of 4 layers and a student of 2: TinyBERT's k = L_T / L_S is 2.
TEACHER = {"num_hidden_layers": 4}
NARROW = {"num_hidden_layers": 2, "hidden_size": 24}
EQUAL = {"num_hidden_layers": 2}

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"


def terms_of(preset: str, stage: int, heads: int | None) -> dict:
    """Return the terms of a stage of configs/recipes/presets. heads: relation heads, since the file's do not fit."""
    config = load([str(RECIPES / "multi_level_small.yaml"), str(RECIPES / "presets" / f"{preset}.yaml")])
    terms = config.run_stages[stage].terms.model_dump(mode="json", exclude_none=True)
    if heads is not None:
        assert terms["attention"]["relation_heads"] == 48  # as published for a width of 384 or 768
        terms["attention"]["relation_heads"] = heads
    return terms


def tinybert_intermediate(student, teacher, batch, term):
    """Jiao et al. 2020, equations 7 to 9, summed over layers (the embeddings' too); a projection for each."""
    loss, valid = 0.0, batch.mask
    for s, t in [(0, 0), (1, 2), (2, 4)]:
        mine = student.hidden[s] @ term["hidden"].projectors[f"{s}-{t}"].weight.T
        loss = loss + F.mse_loss(mine[valid], teacher.hidden[t][valid])
    both = (valid[:, None, :, None] & valid[:, None, None, :]).expand(-1, 4, -1, -1)
    for s, t in [(1, 2), (2, 4)]:
        loss = loss + F.mse_loss(student.scores(s)[both], teacher.scores(t)[both])
    return loss


def tinybert_prediction(student, teacher, batch, term):
    """Return the soft cross-entropy (equation 10), a mean over examples, minus the teacher's entropy, a constant."""
    p = teacher.logits.softmax(-1)
    return -(p * student.logits.log_softmax(-1)).sum(-1).mean() + (p * p.log()).sum(-1).mean()


def minilm(student, teacher, batch, term):
    """Wang et al. 2020: attention and value relation of the last layers, averaged over heads and queries."""
    attention = row_kl(teacher.scores(4), student.scores(2), batch.mask)
    values = row_kl(relation(teacher.value[3]), relation(student.value[1]), batch.mask)
    return attention.mean() + values.mean()


def minilmv2(student, teacher, batch, term):
    """Wang et al. 2021: relations of queries, keys and values of the last layers, in 8 relation heads."""
    loss = 0.0
    for name in ("query", "key", "value"):
        t, s = (relation(x, heads=8) for x in (getattr(teacher, name)[3], getattr(student, name)[1]))
        loss = loss + row_kl(t, s, batch.mask).mean()
    return loss


def distilbert(student, teacher, batch, term):
    """5 τ² KL + 2 task + cosine of the last hidden states (Sanh et al. 2019; the task here is classification)."""
    log_p, log_q = (x.logits.div(2).log_softmax(-1) for x in (teacher, student))
    soft = 4 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    valid = batch.mask
    cosine = F.cosine_embedding_loss(
        student.hidden[-1][valid], teacher.hidden[-1][valid], torch.ones(int(valid.sum()))
    )
    return 5 * soft + 2 * F.cross_entropy(student.logits, batch.labels) + cosine


def distilbert_masked(student, teacher, batch, term):
    """The same for masked language modelling: KL over every valid token, cross-entropy over the masked ones."""
    log_p, log_q = (x.logits.div(2).log_softmax(-1)[batch.mask] for x in (teacher, student))
    soft = 4 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    masked = F.cross_entropy(student.logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
    valid = batch.mask
    cosine = F.cosine_similarity(student.hidden[-1][valid], teacher.hidden[-1][valid], dim=-1)
    return 5 * soft + 2 * masked + (1 - cosine).mean()


def mobilebert(layers):
    def formula(student, teacher, batch, term):
        """Sun et al. 2020 and its code: 100 FMT + 5000 means + 5 variances + attention, of one pair of layers.

        Attention is taken minus the teacher's entropy, a constant.
        """
        (s, t), valid = layers, batch.mask
        mine, other = student.hidden[s][valid], teacher.hidden[t][valid]
        projectors = term["feature_map"].projectors  # None for equal widths
        mapped = mine if projectors is None else mine @ projectors[f"{s}-{t}"].weight.T
        maps = F.mse_loss(*(F.layer_norm(x, x.shape[-1:], eps=1e-12) for x in (mapped, other)))
        means = F.mse_loss(mine.mean(-1), other.mean(-1))
        variances = F.l1_loss(mine.var(-1, correction=0), other.var(-1, correction=0))
        attention = row_kl(teacher.scores(t), student.scores(s), valid).mean()
        return 100 * maps + 5000 * means + 5 * variances + attention

    return formula


def half_labels(student, teacher, batch, term):
    """Return the cross-entropy with half the label and half the teacher's distribution, minus half its entropy."""
    p, log_q = teacher.logits.softmax(-1), student.logits.log_softmax(-1)
    target = 0.5 * F.one_hot(batch.labels, 3) + 0.5 * p
    return -(target * log_q).sum(-1).mean() + 0.5 * (p * p.log()).sum(-1).mean()


def ckd(student, teacher, batch, term):
    """Return the loss of Park et al.

    2021 with its code's divisors, word by word: embeddings, two layers, windows of 21 words.
    """
    maps, sums = [(0, 0), (1, 2), (2, 4)], {kind: [0.0, 0] for kind in ("wp", "wt", "lp", "lt")}

    def add(kind, value, count):
        sums[kind][0], sums[kind][1] = sums[kind][0] + value, sums[kind][1] + count

    def cosines(x):
        unit = F.normalize(x, dim=-1)
        return unit @ unit.T

    def pairs(kind, mine, other):
        apart = ~torch.eye(len(mine), dtype=torch.bool)
        p, q = (cosines(x)[apart].view(len(x), -1).log_softmax(-1) for x in (other, mine))
        add(kind, (p.exp() * (p - q)).sum(), len(mine) ** 2)

    def triples(kind, vertex, mine, other):
        a, b = (cosines(x - x[vertex]) for x in (mine, other))
        add(kind, (a - b).square().sum(), a.numel())

    for row, valid in enumerate(batch.mask):
        words = [(student.hidden[s][row][valid], teacher.hidden[t][row][valid]) for s, t in maps]
        for mine, other in words:
            pairs("wp", mine, other)
            for i in range(len(mine)):
                near = slice(max(0, i - 10), i + 11)
                triples("wt", min(i, 10), mine[near], other[near])
        for i in range(int(valid.sum())):
            mine, other = (torch.stack([of[side][i] for of in words]) for side in (0, 1))
            pairs("lp", mine, other)
            for vertex in range(3):
                triples("lt", vertex, mine, other)
    p, log_q = teacher.logits.softmax(-1), student.logits.log_softmax(-1)
    soft = (p * (p.log() - log_q)).sum(-1).mean()
    return soft + sum(value / count for value, count in sums.values())


def bert_emd(student, teacher, batch, term):
    """Li et al. 2020, with the equal flow of the first step: 0.01 of layers and embeddings + 0.8 KD + 0.2 CE."""
    valid, hidden = batch.mask, term["hidden"].projectors

    def states(s, t):
        return F.mse_loss((student.hidden[s] @ hidden[f"{s}"].weight.T)[valid], teacher.hidden[t][valid])

    both = (valid[:, None, :, None] & valid[:, None, None, :]).expand(-1, 4, -1, -1)
    layers = states(0, 0)
    for s in (1, 2):
        for t in (1, 2, 3, 4):
            attention = F.mse_loss(student.scores(s)[both], teacher.scores(t)[both])
            layers = layers + (states(s, t) + attention) / 8
    log_p, log_q = (x.logits.log_softmax(-1) for x in (teacher, student))
    soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return 0.01 * layers + 0.8 * soft + 0.2 * F.cross_entropy(student.logits, batch.labels)


def pkd(student, teacher, batch, term):
    """Sun et al. 2019, equations 6 to 8: (1 − α) CE + α KD + β' PT over [CLS] of all layers but the last.

    β' = 0.13 is β = 100 over 768 values. With 4 and 2 layers the first learns from the second.
    """
    log_p, log_q = (x.logits.div(10).log_softmax(-1) for x in (teacher, student))
    soft = 100 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    mine, other = (F.normalize(x[:, 0], dim=-1) for x in (student.hidden[1], teacher.hidden[2]))
    patient = (mine - other).square().sum(-1).mean()
    return 0.5 * F.cross_entropy(student.logits, batch.labels) + 0.5 * soft + 0.13 * patient


def skew_kl(student, teacher, batch, term):
    """KL(p ‖ αp + (1 − α)q), α = 0.1 (Ko et al. 2024, equation 3)."""
    p, q = teacher.logits.softmax(-1), student.logits.softmax(-1)
    return (p * (p / (0.1 * p + 0.9 * q)).log()).sum(-1).mean()


def adaptive_kl(student, teacher, batch, term):
    """The mean of forward and reverse KL, weighted by the gaps of head and tail (Wu et al. 2024), with μ = 0.5."""
    total = 0.0
    for p, q in zip(teacher.logits.softmax(-1), student.logits.softmax(-1), strict=True):
        order = p.argsort(descending=True)
        p, q = p[order], q[order]
        size = max(1, int((p.cumsum(0) <= 0.5).sum()))
        gaps = (p - q).detach().abs()
        forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
        total = total + (gaps[:size].sum() * forward + gaps[size:].sum() * reverse) / gaps.sum()
    return total / len(batch.mask)


def logit_mse(student, teacher, batch, term):
    """Half the labels, half the squared difference of the logits, averaged over classes (Kim et al. 2021)."""
    squared = F.mse_loss(student.logits, teacher.logits)
    return 0.5 * F.cross_entropy(student.logits, batch.labels) + 0.5 * squared


def scatter_norms(*models):
    """Change fresh LayerNorms, which give every state mean 0 and variance 1, so that states could not be told apart."""
    torch.manual_seed(3)
    for model in models:
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name:
                parameter.data.add_(0.3 * torch.randn_like(parameter))


def fine_tuning(student, teacher, batch, term):
    return F.cross_entropy(student.logits, batch.labels)


# Preset and stage, relation heads instead of the file's, the student, the formula.
PRESETS = {
    "TinyBERT, intermediate": ("tinybert", 0, None, NARROW, tinybert_intermediate),
    "TinyBERT, prediction": ("tinybert", 1, None, NARROW, tinybert_prediction),
    "MiniLM": ("minilm", 0, None, NARROW, minilm),
    "MiniLM, fine-tuning": ("minilm", 1, None, NARROW, fine_tuning),
    "MiniLMv2": ("minilmv2", 0, 8, NARROW | {"num_attention_heads": 6}, minilmv2),
    "MiniLMv2, fine-tuning": ("minilmv2", 1, None, NARROW, fine_tuning),
    "DistilBERT": ("distilbert", 0, None, EQUAL, distilbert),
    "DistilBERT, masked LM": ("distilbert", 0, None, EQUAL, distilbert_masked),
    "MobileBERT, first": ("mobilebert", 0, None, NARROW, mobilebert((1, 2))),
    "MobileBERT, second, equally wide": ("mobilebert", 1, None, EQUAL, mobilebert((2, 4))),
    "MobileBERT, task": ("mobilebert", 3, None, NARROW, half_labels),
    "CKD": ("ckd", 0, None, NARROW, ckd),
    "BERT-EMD": ("bert_emd", 0, None, NARROW, bert_emd),
    "PKD": ("pkd", 0, None, EQUAL, pkd),
    "skew KL": ("skew_kl", 0, None, NARROW, skew_kl),
    "adaptive KL": ("akl", 0, None, NARROW, adaptive_kl),
    "logit MSE": ("logit_mse", 0, None, NARROW, logit_mse),
}


@pytest.mark.parametrize("lengths", [(9,) * 4, (9, 4, 1, 7)], ids=["unpadded", "padded"])
@pytest.mark.parametrize("name", PRESETS)
def test_equals_the_published_formula(name, lengths):
    preset, stage, heads, student, formula = PRESETS[name]
    task = "masked_lm" if "masked LM" in name else "classification"
    rig = Rig("bert", task, terms_of(preset, stage, heads), student, TEACHER)
    rig.module.double(), rig.teacher.double()
    scatter_norms(rig.student, rig.teacher)
    batch = make_batch(task, lengths, width=max(lengths))
    total, _, gradients = rig.step(batch)

    rig.module.zero_grad()
    with torch.no_grad():
        teacher = look(rig.teacher, batch)
    loss = formula(look(rig.student, batch), teacher, batch, rig.objective.terms)
    loss.backward()
    assert loss.item() > 1e-2
    assert total == pytest.approx(loss.item(), rel=1e-6)
    expected = {n: p.grad for n, p in rig.module.named_parameters() if p.grad is not None}
    whole = torch.cat([g.flatten() for g in expected.values()]).norm()
    for parameter, gradient in expected.items():
        error = (gradients[parameter] - gradient).norm()
        assert error <= 1e-6 * gradient.norm() + 1e-7 * whole, f"{parameter}: {error} of {gradient.norm()}"
    assert not any(gradients[n].any() for n in gradients.keys() - expected.keys())


def test_tinybert_counts_padding_and_we_do_not():
    """TinyBERT's own mean over all entries differs from ours with padding, but not without."""
    for lengths, same in (((9,) * 3, True), ((9, 4, 1), False)):
        rig = Rig("bert", terms={"hidden": {"embedding": False, "layers": "last"}}, student=EQUAL)
        batch = make_batch("classification", lengths, width=9)
        with torch.no_grad():
            literal = F.mse_loss(look(rig.student, batch).hidden[2], look(rig.teacher, batch).hidden[3])
        ours = rig.step(batch)[1]["hidden"]
        assert (ours == pytest.approx(literal.item(), rel=1e-5)) == same
