"""Write a model as an ONNX graph, check it against the model, and quantise it to int8.

The graph maps input_ids, attention_mask and, for models that use them, token_type_ids, (B, N) int64 each, to logits or,
for a sentence encoder, to the pooled and normalised vectors (B, D) float32. B and N are free. A causal language model
has no key-value cache: each call computes all positions.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsdistill.alignment.units import unit_vectors
from dsdistill.config import RunError
from dsdistill.config.schema import EMBEDDING, LANGUAGE
from dsdistill.data.batch import Batch
from dsdistill.models.settings import text_config

GRAPH, INT8 = "model.onnx", "model.int8.onnx"
CLOSE = 1e-4  # largest difference allowed; multiplied by the largest output if that is above 1
LONGEST = 128  # tokens of the inputs that a graph is checked on


class Deployed(nn.Module):
    """A Deployed computes a model's outputs for deployment: logits, or a sentence encoder's vectors of length 1."""

    def __init__(self, model: PreTrainedModel, task: str, pooling: str | None = None):
        """Wrap a model in eval mode; pooling: mean, cls or last, for task embedding."""
        super().__init__()
        self.model, self.task, self.pooling = model, task, pooling
        self.uncached = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, N, V) or (B, C), or vectors (B, D)."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, **types, **self.uncached)
        if self.task != EMBEDDING:
            return found["logits"]
        batch = Batch(input_ids, attention_mask.bool(), None)
        return unit_vectors(found["last_hidden_state"], batch, self.pooling or "mean")


def input_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the inputs of a model's graph."""
    typed = getattr(model.config, "type_vocab_size", 0) > 1
    typed = typed and "token_type_ids" in inspect.signature(model.forward).parameters
    return ["input_ids", "attention_mask", *(["token_type_ids"] if typed else [])]


def trial_inputs(model: PreTrainedModel, longest: int) -> list[dict[str, Tensor]]:
    """Return inputs of random tokens: one text, one token, and rows of several lengths padded on the right."""
    generator = torch.Generator().manual_seed(0)
    config = text_config(model.config)
    longest = max(2, min(longest, LONGEST))
    pad = config.pad_token_id or 0
    tried = []
    for lengths in ([max(2, longest // 2)], [1], [longest, max(1, longest // 3), 1]):
        ids = torch.randint(0, config.vocab_size, (len(lengths), max(lengths)), generator=generator)
        # Decoders that classify look for the last token that is not padding, so no text may hold that token.
        ids = torch.where(ids == pad, (ids + 1) % config.vocab_size, ids)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        given = {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}
        given["token_type_ids"] = ((torch.arange(max(lengths)) >= 2) * mask).long()
        tried.append({name: given[name] for name in input_names(model)})
    return tried


def write_graph(model: Deployed, path: str, longest: int) -> float:
    """Write a model's graph and return the largest difference of its outputs from the model's own.

    Args:
        model: in eval mode, in float32 on the CPU.
        path: file to be made; weights of more than 2 GB are written to a second file beside it.
        longest: most tokens of a text.

    Raises:
        RunError: the exporter cannot handle the model, or outputs differ by more than CLOSE.
    """
    tried = trial_inputs(model.model, longest)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example = tried[-1]
    kind = model.model.config.model_type
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (),
                kwargs=example,
                dynamo=True,
                dynamic_shapes=dict.fromkeys(example, free),
                input_names=list(example),
                output_names=["sentence_embedding" if model.task == EMBEDDING else "logits"],
                verbose=False,
            )
            program.save(path)
    except Exception as error:  # of many types, with pages of text
        said = (str(error).strip().splitlines() or [""])[0][:150]
        raise RunError(f"{kind} cannot be written as ONNX: {type(error).__name__}: {said}") from None
    found, scale = differences(model, path, longest)
    if not found <= CLOSE * max(1.0, scale):
        raise RunError(
            f"the ONNX graph of {kind} differs from the student by {found:.1e}, more than {CLOSE:.0e}"
        )
    return found


def differences(model: Deployed, path: str, longest: int) -> tuple[float, float]:
    """Return the largest difference of a graph's outputs from the model's, and the model's largest output."""
    session = open_session(path)
    most = scale = 0.0
    for given in trial_inputs(model.model, longest):
        with torch.no_grad():
            expected = model(**given)
        got = torch.from_numpy(session.run(None, {name: value.numpy() for name, value in given.items()})[0])
        if model.task in LANGUAGE:  # outputs at padding have no meaning
            valid = given["attention_mask"].bool()
            expected, got = expected[valid], got[valid]
        most = float(np.fmax(most, float((got - expected).abs().max())))
        if not torch.isfinite(got).all():
            return float("nan"), scale
        scale = max(scale, float(expected.abs().max()))
    return most, scale


def quantise(path: str, target: str) -> None:
    """Write a graph with int8 weights (a scale for each channel); activations are quantised at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(path, target, weight_type=QuantType.QInt8, per_channel=True)


def open_session(path: str, threads: int = 1):
    """Return an onnxruntime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def write_all(model: Deployed, folder: str, longest: int, *, int8: bool) -> dict[str, float]:
    """Write model.onnx and, with int8, model.int8.onnx into a folder; return each file's largest difference."""
    found = {GRAPH: write_graph(model, os.path.join(folder, GRAPH), longest)}
    if int8:
        quantise(os.path.join(folder, GRAPH), os.path.join(folder, INT8))
        found[INT8] = differences(model, os.path.join(folder, INT8), longest)[0]
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes for its developers from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
