"""Export the student of a run as a plain model folder, without projectors or other parts of the distillation."""

import logging
import math
import os
import re

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsdistill import config as configs
from dsdistill import disk
from dsdistill.config import Config, UserError
from dsdistill.config.bounded import parse_size
from dsdistill.data.chat import turn_end
from dsdistill.data.sources import parts
from dsdistill.disk import check_writable
from dsdistill.distributed import deepspeed
from dsdistill.engine import checkpoint
from dsdistill.engine.first_weights import base_digest, first_weights
from dsdistill.engine.module import restore, within
from dsdistill.engine.run_folder import CONFIG, INIT, RunFolder, check_plain
from dsdistill.models import adapters
from dsdistill.models.build import architecture, load_tokenizer, locate
from dsdistill.models.domain_fusion import FUSION, STUDENT
from dsdistill.models.sentence import read_sentence, write_sentence
from dsdistill.models.settings import carry_generation, stop_generation, text_config

log = logging.getLogger("dsdistill")

LEAST_SHARD = 10**6  # bytes; a smaller size is probably a mistake: each tensor would get its own file


def read_config(path: str) -> Config:
    """Return the config of a run folder; raise UserError if there is none."""
    folder = RunFolder(path)
    if not os.path.isfile(folder / CONFIG):
        raise UserError(
            path, f"a folder without {CONFIG}" if os.path.isdir(path) else "no such folder", "a run folder"
        )
    check_plain(path)
    return configs.load_saved(folder / CONFIG)


def find_checkpoint(path: str) -> str:
    """Return the tag of a run's newest checkpoint that verifies; raise UserError if there is none."""
    tag = checkpoint.newest(path)
    if tag is None:
        raise UserError(path, "a run without an intact checkpoint", "a run that has saved one")
    return tag


def load_student(run: str, config: Config, tag: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return a checkpoint's student, in float32 on the CPU, and the weights of its domain fusion ({} without one).

    A student that was trained with adapters keeps them; the weights below them come from RUN/init or student.path.
    """
    init = first_weights(run, config)
    checkpoint.check_base(run, tag, base_digest(config, init))
    made = architecture(os.path.join(run, INIT), None, "student")
    saved = deepspeed.whole_weights(os.path.join(run, checkpoint.FOLDER), tag)
    return restore(config, made, init, saved, f"{run}, {tag}"), within(saved, "domain.")


def load_objective(run: str, tag: str) -> dict[str, Tensor]:
    """Return the weights that the terms of a checkpoint's stage have beside the student: projectors, a decoder."""
    return within(deepspeed.whole_weights(os.path.join(run, checkpoint.FOLDER), tag), "objective.")


def _newest_student(run: str, config: Config) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Load the student of the newest checkpoint; retry if a run in training removes that one meanwhile."""
    while True:
        tag = find_checkpoint(run)
        try:
            return load_student(run, config, tag)
        except Exception:
            if find_checkpoint(run) == tag:
                raise


def _check_new(out: str) -> None:
    """Raise UserError unless the folder can be made."""
    check_writable(out, "--out")
    there = os.path.isdir(out)  # perhaps a mount point, which cannot be replaced
    if os.path.exists(out) and (not there or os.listdir(out)):
        raise UserError("--out", f"{out}, which is not empty", "a new or an empty folder")


def export(
    run: str,
    out: str,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    adapter: bool = False,
) -> None:
    """Write the student of a run's newest checkpoint as `save_pretrained` does, tokenizer and chat template included.

    Adapters (student.lora) are merged into the weights, before these are rounded.

    For task embedding, SentenceTransformer can load the folder too, and gives the same vectors.

    A student with domain fusion has two parts: OUT/student holds the plain model, OUT/domain.safetensors the fusion.
    dsdistill.models.domain_fusion.load_exported loads both.

    A new folder appears whole or not at all.

    Args:
        run: folder of a run.
        out: folder to be made.
        dtype: dtype of the written weights: fp32, bf16 or fp16; None: the run's `train.dtype`. Weights that
            transformers keeps in float32 in models of that dtype stay float32.
        max_shard_size: most bytes of a file of weights, or a size such as 5GB; at least 1MB. A tensor that is larger
            has a file of its own.
        adapter: write only the adapters, and the head that trained with them, for peft.PeftModel.from_pretrained.

    Raises:
        UserError: an invalid dtype or size, a folder that is not empty, a run without a student, or without adapters
            to write, or a weight that fp16 cannot hold.
    """
    if dtype is not None and dtype not in deepspeed.DTYPES:
        raise UserError("--dtype", repr(dtype), " or ".join(deepspeed.DTYPES))
    size = parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
    if size is None or size < LEAST_SHARD:
        raise UserError("--max-shard-size", repr(max_shard_size), "a size such as 5GB or 500MiB, 1MB or more")
    _check_new(out)
    config = read_config(run)
    if adapter and (config.student.lora is None or config.student.domain is not None):
        what = "domain fusion" if config.student.lora is not None else "no adapters"
        raise UserError("--adapter", f"{run}, whose student has {what}", "a run with student.lora alone")
    kind = deepspeed.DTYPES[dtype or config.train.dtype]
    model, fusion = _newest_student(run, config)
    tokenizer = load_tokenizer(os.path.join(run, INIT), INIT)
    if adapter:
        base = locate(first_weights(run, config), "student.path")
        with disk.replacing(os.path.realpath(out)) as made:
            adapters.save_adapter(model, config.task, base, kind, made)
            tokenizer.save_pretrained(made)
        return
    if config.student.lora is not None:
        adapters.merge(model)
    _round(model, kind)
    with disk.replacing(os.path.realpath(out)) as made:
        plain = os.path.join(made, STUDENT) if fusion else made
        model.save_pretrained(plain, max_shard_size=size)
        if model.can_generate():
            carry_generation(os.path.join(run, INIT), plain, text_config(model.config).vocab_size)
            stop_generation(plain, _ends(config, tokenizer))
        tokenizer.save_pretrained(made)
        if (sentence := read_sentence(os.path.join(run, INIT), INIT)) is not None:
            write_sentence(made, sentence, text_config(model.config).hidden_size, config.data.max_length)
        if fusion:  # without the maps, which only training uses
            weights = {
                name: value.to(kind).contiguous()
                for name, value in fusion.items()
                if not name.startswith("maps.")
            }
            save_file(weights, os.path.join(made, FUSION))
            log.info(
                "the student has a domain fusion: dsdistill.models.domain_fusion.load_exported(%r) loads both",
                out,
            )


def export_onnx(run: str, out: str, *, int8: bool = False) -> dict[str, float]:
    """Write the student of a run's newest checkpoint as model.onnx, with its config and tokenizer; see `onnx_graph`.

    A new folder appears whole or not at all. The graph computes in float32.

    Args:
        run: folder of a run.
        out: folder to be made.
        int8: also write model.int8.onnx.

    Returns:
        The largest difference of each file's outputs from the student's, by the file's name, on random texts.

    Raises:
        UserError: a folder that is not empty, a run without a student, or a student with domain fusion.
        RunError: the exporter cannot handle the student, or the outputs of model.onnx differ from the student's.
    """
    from dsdistill.engine import onnx_graph

    _check_new(out)
    config = read_config(run)
    model, fusion = _newest_student(run, config)
    if fusion:
        raise UserError("--format", "onnx for a student with domain fusion", "transformers")
    if config.student.lora is not None:
        adapters.merge(model)
    tokenizer = load_tokenizer(os.path.join(run, INIT), INIT)
    sentence = read_sentence(os.path.join(run, INIT), INIT)
    deployed = onnx_graph.Deployed(model.eval(), config.task, sentence.pooling if sentence else None)
    with disk.replacing(os.path.realpath(out)) as made:
        os.makedirs(made)
        found = onnx_graph.write_all(deployed, made, config.data.max_length, int8=int8)
        model.config.save_pretrained(made)
        tokenizer.save_pretrained(made)
        if sentence is not None:
            width = text_config(model.config).hidden_size
            write_sentence(made, sentence, width, config.data.max_length)
    return found


def _round(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast a float32 model's weights and buffers to `dtype`, except those that transformers keeps in float32."""
    if dtype == torch.float32:
        return
    most = torch.finfo(dtype).max
    patterns = [re.compile(name.replace("*", ".*")) for name in model._get_dtype_plan(dtype)]
    kept = {}
    for name, value in model.state_dict(keep_vars=True).items():  # without buffers that are not saved
        if any(pattern.search(name) for pattern in patterns):
            kept[name] = value.data
            continue
        largest = float(value.detach().abs().max()) if value.is_floating_point() and value.numel() else 0.0
        if most < largest < math.inf:
            got = f"{dtype}, whose largest number is {most:,.0f}, for {name} with a weight of {largest:,.0f}"
            raise UserError("--dtype", got, "bf16 or fp32")
    model.to(dtype)
    for name, value in kept.items():
        module, _, leaf = name.rpartition(".")
        getattr(model.get_submodule(module), leaf).data = value


def _ends(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer, as the student learned to write them; none if it learned plain text."""
    if config.task != "causal_lm":
        return []
    sections = [part for *_, part in parts(config.data)]
    layouts = {
        part.layout or ("template" if tokenizer.chat_template else "separator")
        if part.messages is None
        else "template"
        for part in sections
        if part.messages is not None or len(part.text) == 2
    }
    found = [tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id]
    if "template" in layouts:
        found.append(turn_end(tokenizer, config.data.template_options))
    return [end for end in dict.fromkeys(found) if end is not None] if layouts else []
