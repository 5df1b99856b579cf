"""The same documents give the same losses and gradients, whether they share rows or have one each."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dsdistill.alignment.terms import TERMS
from dsdistill.alignment.terms.task import count_predicted, targets
from dsdistill.alignment.units import pooled, unpacked
from dsdistill.data.batch import NO_LABEL, Batch
from dsdistill.data.packing import Document, packed_batch
from dsdistill.engine.passes.teacher_scores import entropy
from dsdistill.models import tracer
from tests.alignment.rig import Rig, make_spans
from tests.alignment.test_invariance import assert_same
from tests.models.test_domain_fusion import fitted

LENGTHS = (14, 9, 3, 1, 12, 1, 1, 7, 2, 5)
# Which documents share the rows of each micro-batch: a full row, rows with filler, one-token documents side by side.
BLOCKS = (((0,), (1, 2, 3)), ((4, 5, 6), (), (7, 8, 9)))
CASES = {
    "task": {},
    "soft_label": {},
    "soft_label, jsd": {"divergence": "jsd"},
    "soft_label, all tokens": {"positions": "valid", "divergence": "akl"},
    "hidden": {"embedding": True},
    "hidden, cosine": {"divergence": "cosine"},
    "feature": {},
    "feature_map": {},
    "attention": {"relations": ["query_key", "value_value"]},
    "attention, mean heads": {"heads": "mean", "divergence": "mse"},
    "attention, groups": {"heads": "group"},
    "attention, scores": {"divergence": "score_mse"},
    "attention, relation heads": {"relations": ["query_query", "key_key"], "relation_heads": 2},
    "pairwise": {"layers": "uniform", "center": True},
    "pairwise, distance": {"relation": "distance"},
    "ckd": {"window": 5},
    "contrastive": {},
    "sp": {},
    "rkd": {},
    "cka": {},
    "pkt": {},
    "trajectory": {"word_layers": [[1, 2]], "phrase_layers": [[2, 3], [1, 1]]},
    "fdd": {},
    "domain": {},
    "smooth": {},
}
LLAMA = {"hidden_size": 24, "num_hidden_layers": 2}
# Where a student's sizes differ from its teacher's; qwen2 has a layer with windows of 4 tokens.
FAMILIES = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "gpt2": {"n_embd": 24, "n_layer": 2},
    "qwen2": {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
}


def documents() -> list[Document]:
    """Return random documents; in some the first tokens are a prompt, which has no labels."""
    chance, made = np.random.default_rng(0), []
    for number, length in enumerate(LENGTHS):
        tokens = chance.integers(2, 60, length)
        labels = np.where(np.arange(length) < 2 * (number % 3 == 1), NO_LABEL, tokens)
        made.append(Document(tokens, labels, make_spans([length])[:, 1:].numpy(), f"d{number}", number))
    return made


def in_rows(chosen: list[Document]) -> Batch:
    """Return one document per row, padded on the right: what `packed_batch` is compared with."""
    width = max(2, *(len(document.tokens) for document in chosen))
    ids, labels = torch.zeros(len(chosen), width).long(), torch.full((len(chosen), width), NO_LABEL)
    for row, document in enumerate(chosen):
        ids[row, : len(document.tokens)] = torch.from_numpy(document.tokens)
        labels[row, : len(document.tokens)] = torch.from_numpy(document.labels)
    lengths = [len(document.tokens) for document in chosen]
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Batch(ids, mask, labels, index=torch.arange(len(chosen)), spans=make_spans(lengths))


def both(blocks=BLOCKS) -> tuple[list[Batch], list[Batch]]:
    """Return the micro-batches with one document per row and packed, each with its examples' draws."""
    every, apart, together = documents(), [], []
    for rows in blocks:
        packed = packed_batch([[every[i] for i in row] for row in rows], 0, spans=True)
        chosen = [every[i] for row in rows for i in row]
        chance = torch.linspace(0, 0.99, len(chosen)) if chosen else torch.zeros(1)
        together.append(replace(packed, chance=chance))
        if chosen:
            apart.append(replace(in_rows(chosen), chance=chance))
    return apart, together


def rig(family: str, case: str) -> Rig:
    """Return a rig with one term."""
    term, student, settings = case.split(",")[0], dict(FAMILIES[family]), dict(CASES[case])
    if "groups" in case:  # one group of the teacher's heads for each of the student's
        student |= {"n_head": 2} if family == "gpt2" else {"num_attention_heads": 2, "num_key_value_heads": 1}
    if term == "attention" and family == "qwen2":
        settings["layers"] = [[1, 1], [2, 2]]  # layers with the same window
    fusion = None
    if term == "domain":
        fusion = fitted(student_width=32 if family == "qwen2" else 24, layers=(2, 3))
        torch.nn.init.normal_(fusion.lift.weight)  # at 0, its initial value, the gate gets no gradient
        fusion.share = 0.5  # half of the documents take the teacher's features
    made = Rig(family, "causal_lm", {term: settings}, student, domain=fusion)
    made.module.train()
    return made


def test_every_term_has_a_case():
    """The term `embedding` has none: it belongs to the task embedding, whose texts are never packed."""
    assert {case.split(",")[0] for case in CASES} == set(TERMS) - {"embedding"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_counts_are_the_same(family, case):
    made = rig(family, case)
    apart, together = both()
    expected = made.step(*apart)
    assert expected[0] > 1e-4 and any(gradient.any() for gradient in expected[2].values())
    torch.testing.assert_close(made.counts(together), made.counts(apart), rtol=0, atol=0)
    assert_same(made.step(*together), expected)


@pytest.mark.parametrize("case", CASES)
def test_a_micro_batch_of_filler_alone(case):
    made = rig("llama", case)
    apart, together = both((*BLOCKS, ()))
    assert not together[-1].documents.any() and together[-1].ids == ("",)
    assert_same(made.step(*together), made.step(*apart))
    total, _, gradients = made.step(together[-1])
    assert total == 0 and all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_leak_is_seen():
    """If positions run on through a row, the loss must differ: the comparison above can fail."""
    made = rig("llama", "task")
    apart, together = both()
    run_on = [
        replace(batch, position_ids=torch.arange(batch.mask.shape[1]).expand_as(batch.mask).clone())
        for batch in together
    ]
    total = made.step(*apart)[0]
    assert made.step(*together)[0] == pytest.approx(total, rel=1e-5)
    assert made.step(*run_on)[0] != pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize(
    "case", ["soft_label", "attention", "attention, relation heads", "pairwise", "domain"]
)
def test_rows_that_run_as_one_row(case, monkeypatch):
    """Rows are flattened as flash attention needs them; SDPA, which runs here, keeps documents apart in either form."""
    made = rig("llama", case)
    apart, together = both()
    monkeypatch.setattr(tracer, "wants_one_row", lambda model: True)
    seen = []
    hook = made.student.get_input_embeddings().register_forward_hook(
        lambda module, given, output: seen.append(tuple(given[0].shape))
    )
    found = made.step(*together)
    assert set(seen) == {(1, batch.mask.numel()) for batch in together} and len(together[0].mask) > 1
    hook.remove()
    monkeypatch.undo()
    assert_same(found, made.step(*apart))


def test_targets_agree_with_what_is_counted():
    for batch in both()[1]:
        places = torch.arange(batch.mask.numel()).view_as(batch.mask)[:, 1:]
        found = places[targets(batch, "causal_lm") != NO_LABEL]
        assert torch.equal(found, batch.counted) and len(found)
        without = replace(batch, counted=None)
        assert count_predicted(without, "causal_lm") == count_predicted(batch, "causal_lm")


def test_documents_are_laid_out_and_pooled():
    """By hand: two rows, of three documents and of one; the second row is filled up."""
    blocks = [
        [Document(np.arange(n) + 2, spans=np.array([[0, n, 1]])) for n in row] for row in ((2, 1, 1), (3,))
    ]
    batch = packed_batch(blocks, 0, spans=True)
    states = torch.arange(8.0).view(2, 4, 1)
    assert batch.owners.tolist() == [0, 0, 1, 2, 3, 3, 3, 4]
    assert unpacked(states, batch)[..., 0][batch.unpacked.mask].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert pooled(states, batch)[:, 0].tolist() == [0.5, 2, 3, 5]
    rows = batch.unpacked
    assert rows.spans.tolist() == [[0, 0, 2, 1], [1, 0, 1, 1], [2, 0, 1, 1], [3, 0, 3, 1]]
    assert rows.labels.tolist() == [[2, 3, -100], [2, -100, -100], [2, -100, -100], [2, 3, 4]]
    poisoned = states.clone()
    poisoned[1, 3] = float("nan")  # filler
    assert torch.equal(pooled(poisoned, batch), pooled(states, batch))


def test_passes_of_the_teacher_see_documents():
    """Entropies and means of packed documents are those of the documents alone, in their order."""
    made = rig("llama", "soft_label")
    apart, together = both()
    for alone, packed in zip(apart, together, strict=True):
        traces = made.teacher_trace(alone), made.teacher_trace(packed)
        expected, found = (
            entropy(trace, batch, "causal_lm") for trace, batch in zip(traces, (alone, packed), strict=True)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        means = [pooled(trace.output, batch) for trace, batch in zip(traces, (alone, packed), strict=True)]
        torch.testing.assert_close(means[1], means[0], rtol=1e-4, atol=1e-5)
