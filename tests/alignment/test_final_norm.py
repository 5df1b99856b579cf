"""The last layer is read after the final norm, as other libraries do, unless a config says before."""

import pytest
import torch
from transformers import AutoConfig

from dsdistill.alignment.probing import check_pair
from dsdistill.config import UserError
from dsdistill.models.probe import probe
from tests.alignment.rig import Rig, make_batch, padded
from tests.models import tiny
from tests.models.families import FAMILIES, FINAL_NORM, architecture

TASKS = {"llama": "causal_lm", "gpt2": "causal_lm", "modernbert": "classification", "bert": "classification"}
LAST = {"layers": [[3, 3]], "embedding": False}


def states(model, batch) -> torch.Tensor:
    """Return hidden_states[-1] of plain transformers."""
    given = {"input_ids": batch.input_ids, "attention_mask": batch.mask.long()}
    return model(**given, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("family", TASKS)
def test_value_and_gradient_are_of_the_librarys_last_hidden_states(family):
    """Compare with the squared difference of plain transformers' hidden_states[-1], by definition."""
    task = TASKS[family]
    rig, batch = Rig(family, task, {"hidden": LAST}), make_batch(task)
    value, _, gradients = rig.step(batch)
    rig.student.zero_grad()
    with torch.no_grad():
        target = states(rig.teacher, batch)
    expected = (states(rig.student, batch) - target)[batch.mask].square().mean()
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-5) and value > 1e-3
    largest = max(p.grad.abs().max() for p in rig.student.parameters() if p.grad is not None)
    for name, parameter in rig.student.named_parameters():
        found = gradients.get(f"body.model.{name}", gradients.get(f"body.{name}"))
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found = torch.zeros_like(parameter) if found is None else found
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * largest.item(), msg=name)


@pytest.mark.parametrize("family", TASKS)
def test_before_is_what_the_layer_leaves(family):
    task = TASKS[family]
    batch, found = make_batch(task), {}
    for where in ("before", "after"):
        rig = Rig(family, task, {"hidden": LAST | {"final_norm": where}})
        found[where] = rig.step(batch)[0]
        with torch.no_grad():
            trace = rig.module.trace(batch)
            normed = trace.state(3, after=True)
        if family in FINAL_NORM:
            norm = FINAL_NORM[family](rig.student.base_model)
            assert torch.allclose(norm(trace.hidden[3]), normed, atol=1e-5)
        else:
            assert trace.last is None and normed is trace.hidden[3]
        assert trace.state(3, after=False) is trace.hidden[3]
    same = found["before"] == pytest.approx(found["after"], rel=1e-3)
    assert same == (family == "bert")


TERMS = {
    "feature": LAST,
    "feature_map": {"layers": "last"},
    "pairwise": {"layers": "last"},
    "ckd": {},
    "contrastive": {},
    "sp": {},
    "rkd": {},
    "cka": {},
    "pkt": {},
    "trajectory": {"word_layers": [[3, 3]]},
    "smooth": {},
}


@pytest.mark.parametrize("term", TERMS)
def test_every_term_over_states_has_both(term):
    batch = make_batch("causal_lm")
    values = {}
    for where in ("before", "after"):
        rig = Rig("gpt2", "causal_lm", {term: TERMS[term] | {"final_norm": where}})
        values[where] = rig.step(batch)[0]
        assert rig.step(padded(batch, 3))[0] == pytest.approx(values[where], rel=1e-4)
    default = Rig("gpt2", "causal_lm", {term: TERMS[term]}).step(batch)[0]
    assert default == pytest.approx(values["after"], rel=1e-6)
    assert values["before"] != pytest.approx(values["after"], rel=1e-4)


def sums(rig, batch, given: bool) -> torch.Tensor:
    """Return the terms' sums on the traces. given: plain transformers' hidden_states[-1], as the last layer."""
    with torch.no_grad(), rig.module.traces(batch) as (teacher, previous):
        student = rig.module.trace(batch, teacher)
        student.previous = previous
        for trace, model in ((student, rig.student), (teacher, rig.teacher), (previous, rig.before)):
            if given and trace is not None:
                trace.hidden[3], trace.last = states(model, batch), None
        return rig.objective.sums(student, teacher, batch)


@pytest.mark.parametrize("term", TERMS)
def test_every_term_reads_the_librarys_last_states_of_all_models(term):
    batch = make_batch("causal_lm")
    expected = sums(Rig("gpt2", "causal_lm", {term: TERMS[term] | {"final_norm": "before"}}), batch, True)
    found = sums(Rig("gpt2", "causal_lm", {term: TERMS[term]}), batch, False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_terms_that_read_both_ways_go_together():
    """The teacher's layers that one term has read stay for the next term."""
    batch = make_batch("causal_lm")
    terms = {"hidden": LAST | {"final_norm": "before"}, "feature": LAST, "pairwise": {"layers": "last"}}
    together = Rig("gpt2", "causal_lm", terms).step(batch)[1]
    for name, settings in terms.items():
        alone = Rig("gpt2", "causal_lm", {name: settings}).step(batch)[1]
        assert together[name] == pytest.approx(alone[name], rel=1e-5), name


def test_lower_layers_come_before_any_norm():
    batch = make_batch("causal_lm")
    lower = [
        Rig("llama", "causal_lm", {"hidden": LAST | {"layers": [[2, 2]], "final_norm": where}}).step(batch)[0]
        for where in ("before", "after")
    ]
    assert lower[0] == lower[1]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_whose_last_states_are_known(family):
    probe(architecture(family), "classification", "teacher", attention=False, hidden=True, final=True)


def test_a_model_that_returns_other_last_states_is_refused(monkeypatch):
    """Such a model could come from a family whose norm has a name that nobody looks for."""
    monkeypatch.setattr("dsdistill.models.capture._FINAL_NORMS", ())
    config = AutoConfig.for_model("llama", **tiny.CAUSAL["llama"], rms_norm_eps=3e-5)  # not yet tried
    with pytest.raises(
        UserError, match=r"model type llama, whose last hidden .*, expected terms with final_norm"
    ):
        probe(config, "causal_lm", "student", attention=False, hidden=True, final=True)
    probe(config, "causal_lm", "student", attention=False, hidden=True)


_DECODER = FAMILIES["llama"] | {"num_key_value_heads": 4}
_OTHERS = {
    "biogpt": _DECODER,
    "xglm": _DECODER | {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
    "ctrl": {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "dff": 48, "n_positions": 40}
    | {"pad_token_id": 0},
    "megatron-bert": FAMILIES["bert"],
    "roberta-prelayernorm": FAMILIES["roberta"],
    "xlm-roberta-xl": FAMILIES["roberta"],
    # DeBERTa's norm beside its layers is for relative positions, not a final norm.
    "deberta-v2": FAMILIES["bert"]
    | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"},
}


@pytest.mark.parametrize("family", _OTHERS)
def test_norms_of_other_names_are_found(family):
    config = AutoConfig.for_model(family, **_OTHERS[family])
    task = "causal_lm" if family == "xglm" else "classification"  # it has no classifier
    probe(config, task, "teacher", attention=False, hidden=True, final=True)


def test_last_states_of_another_width_are_refused():
    """OPT-350m projects them down to the width of its embeddings."""
    config = AutoConfig.for_model("opt", **FAMILIES["llama"] | {"ffn_dim": 48, "word_embed_proj_dim": 16})
    with pytest.raises(UserError, match=r"^student: got model type opt, whose last .* final_norm: before$"):
        probe(config, "causal_lm", "student", attention=False, hidden=True, final=True)
    probe(config, "causal_lm", "student", attention=False, hidden=True)


@pytest.mark.parametrize("where", ["after", "before"])
def test_models_are_tried_for_the_terms_that_read_after_the_norm(monkeypatch, where):
    rig = Rig("llama", "causal_lm", {"hidden": LAST | {"final_norm": where}}, {"rms_norm_eps": 4e-5})
    monkeypatch.setattr("dsdistill.models.capture._FINAL_NORMS", ())
    models = rig.student.config, rig.teacher.config
    if where == "before":
        check_pair("causal_lm", *models, [rig.objective])
        return
    with pytest.raises(UserError, match=r"^student: got model type llama, whose last .* final_norm: before$"):
        check_pair("causal_lm", *models, [rig.objective])
