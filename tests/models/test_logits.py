"""Soft caps and constant factors of logits are compared with the library's own logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from dsdistill.alignment.objective import Objective
from dsdistill.config import UserError
from dsdistill.config.terms import Terms
from dsdistill.data.batch import NO_LABEL
from dsdistill.engine.passes.teacher_scores import entropy
from dsdistill.models.build import Headless, skeleton
from dsdistill.models.logits import LogitForm, logit_form
from dsdistill.models.probe import probe
from tests.alignment.rig import Rig, make_batch, padded, rows
from tests.models.families import FAMILIES, inputs, peaked

DECODER = FAMILIES["llama"] | {"head_dim": 8}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
FORMS = [  # model type, settings, factor, soft cap
    ("gemma2", {"final_logit_softcapping": 3.0}, 1.0, 3.0),
    ("gemma2", {"final_logit_softcapping": None}, 1.0, None),
    ("gemma3_text", {"final_logit_softcapping": 2.0}, 1.0, 2.0),
    ("nanochat", {}, 1.0, 15.0),
    ("granite", {"logits_scaling": 6.0}, 1 / 6, None),
    ("granitemoe", {"logits_scaling": 6.0, **EXPERTS}, 1 / 6, None),
    ("hyperclovax", {"logits_scaling": 6.0}, 6.0, None),  # multiplies by the factor by which Granite divides
    ("cohere", {"logit_scale": 0.3}, 0.3, None),
    ("cohere2", {"logit_scale": 0.3}, 0.3, None),
    ("minicpm3", {"dim_model_base": 8, "head_dim": None, "num_key_value_heads": 4, **LATENT}, 8 / 32, None),
    ("inkling_text", {"logits_mup_width_multiplier": 3.0}, 1 / 3, None),
    ("llama", {"logit_scale": 3.0}, 1.0, None),  # a name that the model does not read
    ("opt", {}, 1.0, None),
    ("gpt2", FAMILIES["gpt2"], 1.0, None),
]


def config_of(kind: str, changes: dict):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    return AutoConfig.for_model(kind, **DECODER | changes)


@pytest.mark.parametrize(("kind", "changes", "factor", "softcap"), FORMS)
def test_logits_are_the_librarys(kind, changes, factor, softcap):
    config = config_of(kind, changes)
    torch.manual_seed(0)
    model = peaked(AutoModelForCausalLM.from_config(config), 4.0).eval()
    headless, head = Headless(model, "student"), model.get_output_embeddings()
    assert headless.form.factor == pytest.approx(factor, rel=1e-9)
    assert headless.form.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-9))
    with torch.no_grad():
        z = F.linear(headless(**inputs()).last_hidden_state, head.weight, head.bias)
        found = z if softcap is None else softcap * torch.tanh(z / softcap)
        expected = model(**inputs()).logits
    torch.testing.assert_close(found, expected)
    probe(config, "causal_lm", "student", attention=False, hidden=False)
    assert logit_form(skeleton(config, "causal_lm", "student"), "student") == headless.form


def test_a_cap_that_is_not_honoured_is_refused(monkeypatch):
    config = config_of("gemma2", {"final_logit_softcapping": 1.0})
    monkeypatch.setattr("dsdistill.models.build.logit_form", lambda *_: LogitForm())
    with pytest.raises(
        UserError, match=r"^student: got model type gemma2, whose head is more than one linear"
    ):
        probe(config, "causal_lm", "student", attention=False, hidden=False)


CHANGED = {  # what comes between head and logits
    "a squashing": lambda logits: logits.sigmoid(),
    "an offset": lambda logits: logits + 1,
    "other factors by entry": lambda logits: logits * torch.arange(logits.shape[-1]),
    "an asymmetric cap": lambda logits: logits.clamp(max=5.0),
    "fewer entries": lambda logits: logits[..., :-3],
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_what_is_not_understood_is_refused(change, monkeypatch):
    model = AutoModelForCausalLM.from_config(config_of("llama", {}))
    original = type(model).forward

    def forward(self, **arguments):
        output = original(self, **arguments)
        output.logits = change(output.logits)
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(
        UserError, match=r"^teacher: got model type llama, whose logits are .* expected logits"
    ):
        Headless(model, "teacher")


def test_a_scaled_bias_is_refused():
    model = AutoModelForCausalLM.from_config(config_of("cohere", {"logit_scale": 0.3}))
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(64))
    with pytest.raises(
        UserError, match=r"^student: got model type cohere, which scales logits and has a bias"
    ):
        Headless(model, "student")


PAIRS = {
    "both capped": (("gemma2", {"final_logit_softcapping": 1.0, "num_hidden_layers": 2}), ("gemma2", {})),
    "student capped": (("gemma2", {"final_logit_softcapping": 1.0}), ("granite", {"logits_scaling": 0.5})),
    "teacher capped": (("cohere", {"logit_scale": 0.7}), ("gemma2", {"final_logit_softcapping": 2.0})),
}


@pytest.fixture(params=PAIRS)
def rig(request, monkeypatch):
    student, teacher = PAIRS[request.param]
    for kind in {student[0], teacher[0]}:
        plain = {"attn_logit_softcapping": None}  # SDPA cannot cap attention scores
        plain |= {"use_cache": False, "tie_word_embeddings": False}  # below the head alone is frozen
        monkeypatch.setitem(FAMILIES, kind, DECODER | {"final_logit_softcapping": 3.0} | plain)
    terms = {"task": {}, "soft_label": {"temperature": 1.5}, "fdd": {"layers": [[1, 1], [2, 3]]}}
    return Rig(teacher[0], "causal_lm", terms, student[1], teacher[1], student_family=student[0])


def test_losses_and_gradients_are_those_of_the_librarys_logits(rig):
    """Task and soft labels use the library's logits; fdd uses its logits with the final norm applied to each layer."""
    rig.module.double(), rig.teacher.double()
    batch = make_batch("causal_lm")
    _, raw, gradients = rig.step(batch)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.mask.long()}
    mine = rig.student(**given).logits[:, :-1]
    with torch.no_grad():
        other = rig.teacher(**given).logits[:, :-1]
    counted = batch.mask[:, 1:]
    task = F.cross_entropy(mine[counted], batch.input_ids[:, 1:][counted])
    log_p, log_q = ((x[counted] / 1.5).log_softmax(-1) for x in (other, mine))
    soft = 1.5**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    fdd = lens_loss(rig, batch, given)
    assert raw == pytest.approx({"task": task.item(), "soft_label": soft.item(), "fdd": fdd.item()}, rel=1e-6)
    rig.student.zero_grad()
    (task + soft + fdd).backward()
    for name, parameter in rig.student.named_parameters():
        torch.testing.assert_close(gradients[f"body.model.{name}"], parameter.grad, rtol=1e-5, atol=1e-7)


def lens_loss(rig, batch, given):
    """Put each layer's state in place of the last layer's, so that the library itself makes its logits."""
    predictions = []
    for model, layers in ((rig.student, (1, 2)), (rig.teacher, (1, 3))):
        states = model(**given, output_hidden_states=True).hidden_states
        found = []
        for layer in layers:
            state = states[layer] if layer < len(states) - 1 else None
            heads = [parameter for parameter in model.get_output_embeddings().parameters()]
            for parameter in heads:
                parameter.requires_grad_(False)
            hook = model.model.layers[-1].register_forward_hook(
                lambda _, __, output, state=state: output if state is None else state
            )
            found.append(model(**given).logits[:, :-1].log_softmax(-1))
            hook.remove()
            for parameter in heads:
                parameter.requires_grad_(model is rig.student)
        predictions.append(found)
    counted = batch.mask[:, 1:]
    mine, other = predictions
    total = sum((t.exp() * (t - s)).sum(-1)[counted].mean() for s, t in zip(mine, other, strict=True))
    changes = [upper - lower for lower, upper in predictions]
    return total + (1 - F.cosine_similarity(*changes, dim=-1))[counted].mean()


def test_padding_and_splits_change_nothing(rig):
    batch = make_batch("causal_lm")
    total = rig.step(batch)[0]
    assert rig.step(padded(batch, 3))[0] == pytest.approx(total, rel=1e-5)
    parts = [rows(batch, chosen) for chosen in ([3], [0, 5], [1, 2, 4])]
    assert rig.step(*parts)[0] == pytest.approx(total, rel=1e-5)


def test_the_entropy_that_samples_is_of_capped_logits(rig):
    batch = make_batch("causal_lm")
    found = entropy(rig.teacher_trace(batch), batch, "causal_lm")
    with torch.no_grad():
        given = {"input_ids": batch.input_ids, "attention_mask": batch.mask.long()}
        logs = rig.teacher(**given).logits[:, :-1].log_softmax(-1)
    counted = (batch.labels[:, 1:] != NO_LABEL) & batch.mask[:, 1:]
    each = (-(logs.exp() * logs).sum(-1) / math.log(64)).masked_fill(~counted, 0).sum(1)
    torch.testing.assert_close(found, each / counted.sum(1).clamp(min=1))


def test_models_without_contents_have_the_form_of_those_with():
    """The planner's models are fake tensors; those of checks are on the device meta."""
    config = config_of("cohere", {"logit_scale": 0.3})
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = Headless(AutoModelForCausalLM.from_config(config), "student")
    with torch.device("meta"):
        meta = Headless(AutoModelForCausalLM.from_config(config), "student")
    assert fake.form == meta.form == LogitForm(fake.form.factor, None)
    assert fake.form.factor == pytest.approx(0.3, rel=1e-9)


def test_scores_are_of_capped_logits(rig):
    """Perplexity and KL to the teacher are made from sums of the evaluation objective, as in a run."""
    batch = make_batch("causal_lm")
    judged = Objective(Terms(task={}, soft_label={"temperature": 1.0}), rig.pair)
    own = Objective(Terms(task={}), rig.pair)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.mask.long()}
    counted, gold = batch.mask[:, 1:], batch.input_ids[:, 1:]
    with torch.no_grad():
        teacher = rig.teacher_trace(batch)
        found = judged.sums(rig.module.trace(batch), teacher, batch)
        theirs = own.sums(teacher, None, batch)
        mine, other = (m(**given).logits[:, :-1][counted].log_softmax(-1) for m in (rig.student, rig.teacher))
    loss, kl = F.nll_loss(mine, gold[counted], reduction="sum"), (other.exp() * (other - mine)).sum()
    assert found.tolist() == pytest.approx([loss.item(), kl.item()], rel=1e-4)
    assert theirs.item() == pytest.approx(F.nll_loss(other, gold[counted], reduction="sum").item(), rel=1e-4)
