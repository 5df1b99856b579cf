"""Evaluate the newest checkpoint of a run on its dev set, for `dsdistill evaluate`."""

import logging

import torch

from dsdistill.config import Config
from dsdistill.distributed import deepspeed
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine import checkpoint
from dsdistill.engine.export import find_checkpoint, load_student, read_config
from dsdistill.engine.module import StudentModule, fused_layers, make_fusion
from dsdistill.engine.passes import representation_space
from dsdistill.engine.passes.dev_scores import latency, score
from dsdistill.engine.passes.generation import generation
from dsdistill.engine.passes.stability import stability
from dsdistill.engine.prepare import Prepared, prepare
from dsdistill.engine.run import running, use_recipe, with_fields
from dsdistill.engine.run_folder import RunFolder
from dsdistill.engine.teacher import load_teacher
from dsdistill.evaluation.text import bleu_signature
from dsdistill.models.tracer import cast_parameters

log = logging.getLogger("dsdistill")


def evaluate_run(path: str) -> dict:
    """Score the newest checkpoint of a run on its dev set; return (and write) its summary with those scores."""
    config = _computable(read_config(path), path)
    folder = RunFolder(path)
    with running(config.run.timeout) as ranks:
        with ranks.first_alone():
            if ranks.first:
                folder.claim()
                folder.tag = find_checkpoint(path)  # now that nobody writes another
            prepared = prepare(config, ranks.world_size)
        tag = ranks.gather(folder.tag)[0]
        if prepared.recipe is not None:
            use_recipe(prepared, folder, ranks)
        summary = folder.summary() or {"name": config.run.name, "task": config.task, "models": {}}
        with prepared.reading():
            scores = _scores(prepared, path, tag, ranks)
        for name, values in scores.items():
            summary["models"].setdefault(name, {}).update(values)
        if config.evaluation.generate:
            summary["bleu_signature"] = bleu_signature()
        summary["evaluated"] = tag
        with ranks.first_alone():
            if ranks.first:
                folder.write_summary(summary)
        return summary


def _computable(config: Config, path: str) -> Config:
    """Return a run's config in a precision that this machine has."""
    if config.train.dtype != "fp16" or torch.cuda.is_available():
        return config
    log.info("%s was trained in fp16, which needs a GPU: evaluating in fp32", path)
    return with_fields(config, train=with_fields(config.train, dtype="fp32"))


def _scores(prepared: Prepared, path: str, tag: str, ranks: Ranks) -> dict[str, dict]:
    """Return the scores of a checkpoint's student and of the teacher, all that the config asks for.

    Those that the run reports too are computed in the type that it trained in, so that they are the same; texts and
    times are those of the float32 weights that `export` writes.
    """
    config = prepared.config
    asked = config.evaluation
    model, weights = load_student(path, config, tag)
    fusion = make_fusion(config, prepared.pair, fused_layers(prepared.objectives))
    if fusion is not None:
        fusion.load_state_dict(weights)
    module = StudentModule(
        model, prepared.objectives[-1], prepared.evaluation, represents=asked.structure, domain=fusion
    )
    module = module.to(ranks.device).eval()
    whole: dict[str, dict] = {"student": {}}
    if asked.latency and ranks.first:
        whole["student"] |= latency(model, prepared)
    if asked.generate:  # before the teacher that scores is there: a whole one writes
        for name, values in generation(model, prepared, path, ranks).items():
            whole.setdefault(name, {}).update(values)
    cast_parameters(module, deepspeed.DTYPES[config.train.dtype])  # as the engine does, which keeps buffers
    teacher = None
    if prepared.judged or asked.structure:
        last = [prepared.pair.teacher.depth] if asked.structure else []
        teacher = load_teacher(
            config, prepared.teacher, prepared.objectives[-1:], ranks, last, judged=prepared.judged
        )
    scores = score(module, teacher if prepared.judged else None, prepared, ranks)
    if asked.structure:
        scores["student"] |= representation_space.measure(module, teacher, prepared, ranks)
    scores["student"] |= stability(scores["student"], path, checkpoint.read_state(path, tag)["step"])
    for name, values in whole.items():
        scores.setdefault(name, {}).update(values)
    return scores
