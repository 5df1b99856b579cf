"""One forward pass under capture."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from dsdistill.data.batch import Batch
from dsdistill.models.capture import Capture, final_norm
from dsdistill.models.trace import Trace


def model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """What the library's forward takes. Filler rows show it one token: attention over none would be undefined."""
    mask = batch.mask
    first = torch.zeros_like(mask)
    first[:, 0] = ~batch.rows
    inputs = {"input_ids": batch.input_ids, "attention_mask": (mask | first).long()}
    if batch.token_types is not None and getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = batch.token_types
    return inputs


def trace(call: Callable, model: PreTrainedModel, capture: Capture, batch: Batch) -> Trace:
    """The trace of one forward pass.

    call: what to call with the model's inputs: the model itself, its DeepSpeed engine, or a Headless around it.
    """
    with capture.recording() as found:
        outputs = call(**model_inputs(model, batch))
    if "logits" in outputs:
        found.logits = outputs["logits"]
    else:
        found.output, found.norm = outputs["last_hidden_state"], final_norm(model)
    return found
