"""Evaluate the newest checkpoint of a run on its dev sets, or on other files, for `dsdistill evaluate`."""

import logging
from collections.abc import Sequence

import torch

from dsdistill.config import Config
from dsdistill.config.schema import Evaluation
from dsdistill.data import files
from dsdistill.data.sources import with_dev_files
from dsdistill.distributed import allocator, deepspeed
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine import checkpoint
from dsdistill.engine.export import find_checkpoint, load_objective, load_student, read_config
from dsdistill.engine.module import StudentModule, fused_layers, make_fusion
from dsdistill.engine.passes import light_decoding, representation_space
from dsdistill.engine.passes.dev_scores import latency, score, score_on
from dsdistill.engine.passes.generation import generation
from dsdistill.engine.passes.predictions import Predictions
from dsdistill.engine.passes.stability import stability
from dsdistill.engine.prepare import Prepared, prepare
from dsdistill.engine.run import running, use_recipe, with_fields
from dsdistill.engine.run_folder import RunFolder
from dsdistill.engine.teacher import LazyTeacher
from dsdistill.models.adapters import merge
from dsdistill.models.tracer import Tracer, cast_parameters

log = logging.getLogger("dsdistill")


def evaluate_run(path: str, data: Sequence[str] = ()) -> dict:
    """Score the newest checkpoint of a run on its dev sets; return (and write) its summary with those scores.

    Args:
        path: the run's folder.
        data: files to score it on instead of the dev sets, with the run's own columns and classes. The task's scores on
            them are written under `others`, by the names given here; all other scores stay as they are.

    Raises:
        UserError: there is no such run or file, or the data cannot be used.
    """
    config = _computable(read_config(path), path)
    if data:
        config = _on_files(config, data)
    folder = RunFolder(path)
    with running(config.run.timeout) as ranks:
        with ranks.first_alone():
            if ranks.first:
                folder.claim()
                folder.tag = find_checkpoint(path)  # the lock lets no process write another now
            prepared = prepare(config, ranks.world_size)
        tag = ranks.gather(folder.tag)[0]
        if prepared.recipe is not None:
            use_recipe(prepared, folder, ranks)
        summary = folder.summary() or {"name": config.run.name, "task": config.task, "models": {}}
        summary |= prepared.scored
        with prepared.reading():
            if data:
                summary["others"] = summary.get("others", {}) | _others(prepared, path, tag, ranks)
            else:
                _score(prepared, path, tag, ranks, summary)
        with ranks.first_alone():
            if ranks.first:
                folder.write_summary(summary)
        return summary


def _computable(config: Config, path: str) -> Config:
    """Return a run's config with dtypes that this machine supports."""
    teacher = config.teacher
    if torch.cuda.is_available() or "fp16" not in (config.train.dtype, teacher.dtype if teacher else None):
        return config
    log.info("%s was trained in fp16, which needs a GPU: it is evaluated in fp32", path)
    if config.train.dtype == "fp16":
        config = with_fields(config, train=with_fields(config.train, dtype="fp32"))
    if teacher is not None and teacher.dtype == "fp16":
        config = with_fields(config, teacher=with_fields(teacher, dtype="fp32"))
    return config


def _on_files(config: Config, data: Sequence[str]) -> Config:
    """Return a run's config with these files as its dev sets and only the task's own scores."""
    for name in data:
        files.stream(name, None, (), config.data.most_bytes)  # refuses a file that is not there
    asked = Evaluation(positive_class=config.evaluation.positive_class)
    return with_fields(config, data=with_dev_files(config.data, data), evaluation=asked)


def _score(prepared: Prepared, path: str, tag: str, ranks: Ranks, summary: dict) -> None:
    """Add the scores that the config asks for to a summary: those of a checkpoint's student and of the teacher.

    Scores that the run reports too are computed in its training dtype, so that they are the same. The student's texts
    and times are measured with float32 weights.
    """
    asked = prepared.config.evaluation
    module, loaded = _student(prepared, path, tag, ranks), _teacher(prepared, ranks)
    whole: dict[str, dict] = {"student": {}}
    if asked.latency and ranks.first:
        timed = module.model
        if prepared.config.student.lora is not None:  # time the model that `export` writes
            timed = merge(load_student(path, prepared.config, tag)[0]).to(ranks.device).eval()
        whole["student"] |= latency(timed, prepared)
    if asked.generate:  # before the student is rounded
        writes = loaded if prepared.judged and prepared.config.teacher.path is not None else None
        written, summary["bleu_signature"] = generation(module.model, writes, prepared, path, ranks)
        for name, values in written.items():
            whole.setdefault(name, {}).update(values)
    teacher = _as_trained(module, loaded, prepared)
    predictions = Predictions()
    scores = score(module, teacher if prepared.judged else None, prepared, ranks, predictions)
    predictions.write(path, prepared, ranks)
    if asked.structure:
        scores["student"] |= representation_space.measure(module, teacher, prepared, ranks)
    if (term := light_decoding.decoding_term(prepared)) is not None:
        scores["student"] |= light_decoding.measure(module, term, prepared, ranks)
    scores["student"] |= stability(scores["student"], path, checkpoint.read_state(path, tag)["step"])
    for of in (scores, whole):
        for name, values in of.items():
            summary["models"].setdefault(name, {}).update(values)
    summary["evaluated"] = tag


def _others(prepared: Prepared, path: str, tag: str, ranks: Ranks) -> dict[str, dict]:
    """Return the scores of student and teacher on each dev set, by its name, with the checkpoint's tag."""
    module = _student(prepared, path, tag, ranks)
    teacher = _as_trained(module, _teacher(prepared, ranks), prepared)
    return {
        name: {**score_on(examples, module, teacher, prepared, ranks), "evaluated": tag}
        for name, examples in prepared.data.devs.items()
    }


def _student(prepared: Prepared, path: str, tag: str, ranks: Ranks) -> StudentModule:
    """Return the student of a checkpoint in evaluation mode, in float32."""
    config = prepared.config
    with allocator.loading(ranks.device):
        model, weights = load_student(path, config, tag)
    fusion = make_fusion(config, prepared.pair, fused_layers(prepared.objectives))
    if fusion is not None:
        fusion.load_state_dict(weights)
    objective = prepared.objectives[-1]
    if light_decoding.decoding_term(prepared) is not None:
        objective.load_state_dict(load_objective(path, tag))
    module = StudentModule(
        model,
        objective,
        prepared.evaluation,
        represents=config.evaluation.structure,
        domain=fusion,
    )
    return module.to(ranks.device).eval()


def _teacher(prepared: Prepared, ranks: Ranks) -> LazyTeacher | None:
    """Return the teacher, not loaded yet; None if evaluation needs none."""
    if not (prepared.judged or prepared.config.evaluation.structure):
        return None
    return LazyTeacher(prepared.config, prepared.teacher, prepared.objectives, ranks, prepared.judged)


def _as_trained(module: StudentModule, loaded: LazyTeacher | None, prepared: Prepared) -> Tracer | None:
    """Cast the student to its training dtype; return the teacher's tracer, None without a teacher."""
    config = prepared.config
    cast_parameters(module, deepspeed.DTYPES[config.train.dtype])  # like the engine: not the buffers
    if loaded is None:
        return None
    last = [prepared.pair.teacher.depth] if config.evaluation.structure else []
    return loaded.tracer(prepared.objectives[-1:], last)
