"""Write RUN/init (the student's architecture, tokenizer and first weights), and read the student from it."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from dsdistill import disk
from dsdistill.config import Config
from dsdistill.config.schema import EMBEDDING
from dsdistill.distributed import allocator, deepspeed, engines
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.module import StudentModule, brings_head
from dsdistill.engine.prepare import Prepared
from dsdistill.engine.run_folder import INIT, RunFolder
from dsdistill.models.build import build_and_tell, build_model, check_missing, locate, skeleton
from dsdistill.models.cut import check_cut, check_rest, copy_layers
from dsdistill.models.sentence import Sentence, named_prompts, read_sentence, write_sentence
from dsdistill.models.settings import carry_generation, text_config
from dsdistill.models.slices import cut_files
from dsdistill.models.weights import (
    at_hand,
    check_ties,
    check_weights,
    fingerprint,
    holds_weights,
    mapped_dtype,
    stored_dtype,
)

log = logging.getLogger("dsdistill")


def student_init(prepared: Prepared, folder: RunFolder, ranks: Ranks) -> str | None:
    """Write RUN/init unless it is there; return the path of the student's first weights (None: random).

    Only rank 0 writes. A student that ZeRO-3 shards is read from files, so its random weights are written too. If it
    has a domain fusion, every rank draws the whole student instead, because the fusion draws its weights after it.
    Random weights below adapters are always written, since checkpoints do not hold them.
    """
    target, config = folder / INIT, prepared.config
    with ranks.first_alone():
        if ranks.first and not os.path.isdir(target):
            with disk.replacing(target) as name:
                cut = config.student.from_teacher is not None
                if cut:
                    _cut(prepared, name)
                elif _is_drawn_for_files(prepared):
                    _draw(prepared, name)
                else:
                    prepared.student.save_pretrained(name)
                prepared.tokenizer.save_pretrained(name)
                if config.task == EMBEDDING:
                    _write_sentence(prepared, name)
                source = config.teacher.path if cut else config.student.path
                if source is not None and config.task == "causal_lm":
                    entries = text_config(prepared.student).vocab_size
                    carry_generation(locate(source, "student.path"), name, entries)
    # Rank 0 decides for all: a network file system may show the files to other ranks a little later.
    return ranks.gather(first_weights(folder.path, config))[0]


def first_weights(run: str, config: Config) -> str | None:
    """Return the path of a run's first weights, once RUN/init is there; None if they are random."""
    own = os.path.join(run, INIT)
    return own if holds_weights(own) else config.student.path


def base_digest(config: Config, init: str | None) -> str | None:
    """Return a digest of the weights below adapters, which no checkpoint holds; None if the student has no adapters.

    init: path of the run's first weights. The digest is also None for a model from the hub with an unknown commit.
    """
    return None if config.student.lora is None or init is None else fingerprint(init, "student.path")


def _write_sentence(prepared: Prepared, target: str) -> None:
    """Write how the student turns a text into a vector, so that an export needs no other folder.

    Prompts of a model's folder keep their names; those that the run does not use are written too.
    """
    config, data, pooling = prepared.config, prepared.config.data, prepared.pair.pooling[0]
    sentence = Sentence(pooling, *named_prompts(data.prompts or ()))
    for place, section in (("teacher.path", config.teacher), ("student.path", config.student)):
        if section is not None and section.path is not None:
            own = read_sentence(locate(section.path, place), place)
            if own is not None and own.prompts_of(len(data.text)) == data.prompts:
                sentence = replace(own, pooling=pooling, lower=False)
                break
    write_sentence(target, sentence, prepared.pair.student.width, data.max_length)


def read_student(
    make: Callable[[torch.dtype], StudentModule],
    config: Config,
    architecture: PretrainedConfig,
    init: str | None,
    ranks: Ranks,
    *,
    anew: bool = False,
) -> StudentModule:
    """Return the module that `make` makes, given the dtype of its weights; sharded if ZeRO-3 shards the student.

    Weights have the run's dtype if the files have it too, else float32, so that no value is rounded before the
    optimizer receives it. A student with random weights (even if only the head is random) is built unsharded in
    float32. A student that DeepSpeed keeps on disks (NVMe), quantized or twice (ZeRO++) is built unsharded too.

    anew: whether other values, which may be float32, replace these weights later.
    """
    settings = deepspeed.student_settings(config, ranks.world_size)
    complete = init is not None and not _lacks(init, architecture, config.task)
    stored = stored_dtype(init, "student") if init is not None else None
    mapped = mapped_dtype(init, architecture, config.task, "student")
    # Rank 0 decides for all, since all ranks must take the same branch.
    complete, stored, mapped = ranks.gather((complete, stored, mapped))[0]
    same = complete and not anew and stored == deepspeed.DTYPES[config.train.dtype]
    computes = config.train.dtype if same else "fp32"
    dtype = deepspeed.DTYPES[computes]
    with allocator.loading(ranks.device):
        if config.student.zero_stage != 3 or not complete or _kept_otherwise(settings):
            return make(dtype)
        settings |= deepspeed.precision(computes)
        if mapped is not None:
            module = make(mapped)
            engines.partition(module.model, settings, dtype, ranks.device)
            return module
        with engines.constructing(settings):
            return make(dtype)


def frozen_weights(module: StudentModule, config: Config, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Return on rank 0, by name, the frozen weights that a checkpoint must hold besides what the engine saves.

    Without adapters they are the weights that the engine is about to round; with adapters, all but those below them.
    """
    found, dtype = {}, deepspeed.DTYPES[config.train.dtype]
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad or name in module.base:
            continue
        if module.base or parameter.dtype != dtype:
            kept = engines.whole(parameter)
            found |= {name: kept} if ranks.first else {}
    return found


def _kept_otherwise(settings: dict[str, Any]) -> bool:
    """Return whether DeepSpeed keeps weights on disks, quantized or twice."""
    zero = deepspeed.zero_section(settings)
    quantized = zero.zero_quantized_weights or zero.zero_quantized_nontrainable_weights
    on_disk = zero.offload_param is not None and zero.offload_param.device == "nvme"
    return on_disk or quantized or zero.zero_hpz_partition_size > 1


def _cut(prepared: Prepared, target: str) -> None:
    """Write the chosen layers of the teacher, and all weights outside its layers, as they are stored.

    Weights that the teacher lacks, such as a head for these classes, are random. If the teacher has no files, or its
    files do not show which weights belong to which layer, the teacher is built and its layers are copied.
    """
    config, layers, path = prepared.config, prepared.config.student.from_teacher, prepared.config.teacher.path
    if text_config(prepared.teacher) is not prepared.teacher:  # a model of images and text
        log.info("the student is cut from the text part of a %s", prepared.teacher.model_type)
    folder = at_hand(path, "teacher") if path is not None else None
    if folder is not None:
        # Files from the hub are here only now; they get the checks that `prepare` makes of local ones.
        missing, added = check_weights(folder, prepared.teacher, config.task, "teacher"), {}
        whole = skeleton(prepared.teacher, config.task, "teacher")
        check_missing(whole, missing, path, config.task, "teacher", needs_head=False)
        ties = check_cut(prepared.student, prepared.teacher, layers, config.task, "student", missing)
        check_ties(folder, ties, "teacher")
        if missing:
            added = {name: value for name, value in _random(prepared).state_dict().items() if name in missing}
        if cut_files(folder, target, prepared.student, prepared.teacher, layers, config.task, added):
            return
        log.info(
            "names in the teacher's files do not show its layers: the teacher is built to cut the student from it"
        )
    made = _random(prepared)
    torch.manual_seed(config.run.seed)  # as in LazyTeacher, so that both draw the same random teacher
    teacher, missing = build_and_tell(
        prepared.teacher, config.teacher.path, config.task, "teacher", needs_head=False
    )
    check_rest(made, teacher, config.task, "student", missing)
    copy_layers(made, teacher, layers, missing)
    made.save_pretrained(target)


def _random(prepared: Prepared) -> PreTrainedModel:
    """Return the student with random weights in float32."""
    torch.manual_seed(prepared.config.run.seed)
    return build_model(prepared.student, None, prepared.config.task, "student", needs_head=False)


def _is_drawn_for_files(prepared: Prepared) -> bool:
    """Return whether random weights must be written to files: if ZeRO-3 shards the student or if it has adapters.

    The weight files decide whether there are random weights: files, also those from the hub, may lack some.
    """
    section = prepared.config.student
    if section.lora is None and (section.zero_stage != 3 or section.domain is not None):
        return False
    return section.path is None or _lacks(section.path, prepared.student, prepared.config.task)


def _lacks(path: str, student: PretrainedConfig, task: str) -> bool:
    """Return whether files lack some of the student's weights, or are not on this machine."""
    folder = at_hand(path, "student")
    return folder is None or bool(check_weights(folder, student, task, "student"))


def _draw(prepared: Prepared, target: str) -> None:
    """Write the student with the random weights that every rank would draw: all, or those that its files lack."""
    config = prepared.config
    torch.manual_seed(config.run.seed)
    made = build_model(
        prepared.student, config.student.path, config.task, "student", needs_head=brings_head(config)
    )
    made.save_pretrained(target)
