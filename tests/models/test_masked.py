"""Masked language models without their decoder give the numbers of the library's own head, and no logits."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForMaskedLM

from dsdistill.config import UserError
from dsdistill.data.batch import NO_LABEL
from dsdistill.models.build import Headless
from dsdistill.models.probe import probe
from tests.alignment.rig import Rig, make_batch, padded, rows, with_filler
from tests.models.families import FAMILIES, inputs

MASKED = {name: FAMILIES[name] for name in ("bert", "roberta", "distilbert", "modernbert")}
MASKED["electra"] = FAMILIES["bert"] | {"embedding_size": 16}


@pytest.mark.parametrize("family", MASKED)
def test_the_decoder_alone_is_left_out(family):
    config = AutoConfig.for_model(family, **MASKED[family])
    probe(config, "masked_lm", "student", attention=True, hidden=True)
    model = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        states, head = Headless(model, "student")(**inputs()).last_hidden_state, model.get_output_embeddings()
        logits = model(**inputs()).logits
    torch.testing.assert_close(F.linear(states, head.weight, head.bias), logits)
    assert states.shape[-1] != logits.shape[-1]


def test_a_decoder_is_refused():
    with pytest.raises(UserError, match="model type gpt2"):
        probe(AutoConfig.for_model("gpt2"), "masked_lm", "student", attention=False, hidden=False)


def test_losses_and_gradients_are_those_of_whole_logits():
    """Task and soft labels over the chosen positions are written out; the tied decoder learns from both uses."""
    rig = Rig("bert", "masked_lm", {"task": {}, "soft_label": {}}, student={"num_hidden_layers": 2})
    batch = make_batch("masked_lm")
    _, raw, gradients = rig.step(batch)

    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.mask.long()}
    logits = rig.student(**inputs).logits
    with torch.no_grad():
        other = rig.teacher(**inputs).logits
    chosen = batch.labels != NO_LABEL
    task = F.cross_entropy(logits[chosen], batch.labels[chosen])
    log_p, log_q = ((x[chosen] / 2).log_softmax(-1) for x in (other, logits))
    soft = 4 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert raw == pytest.approx({"task": task.item(), "soft_label": soft.item()}, rel=1e-4)
    rig.student.zero_grad()
    (task + soft).backward()
    assert rig.student.get_output_embeddings().weight is rig.student.get_input_embeddings().weight
    for name, parameter in rig.student.named_parameters():
        torch.testing.assert_close(gradients[f"body.model.{name}"], parameter.grad, rtol=1e-3, atol=1e-5)


def test_padding_fillers_and_splits_change_nothing():
    rig = Rig("bert", "masked_lm")
    batch = make_batch("masked_lm")
    total, raw, _ = rig.step(batch)
    for other in (
        [padded(batch, 3)],
        [with_filler(batch, 2)],
        [rows(batch, [0, 2]), rows(batch, [1, 3, 4, 5])],
    ):
        again, found, _ = rig.step(*other)
        assert again == pytest.approx(total, rel=1e-5)
        assert found == pytest.approx(raw, rel=1e-5)
