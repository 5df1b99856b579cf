"""Run everything: train the teacher by its recipe if there is one, the student and a baseline; write the summary."""

import contextlib
import copy
import gc
import hashlib
import logging
import os
import time
from collections.abc import Iterator

import torch.distributed as dist

from dsdistill.config import Config, RunError
from dsdistill.config.formats import teacher_identity
from dsdistill.config.terms import Task, Terms
from dsdistill.data import Streamed
from dsdistill.distributed import deepspeed, stopping
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine import checkpoint, stages
from dsdistill.engine.export import export
from dsdistill.engine.first_weights import student_init
from dsdistill.engine.origins import check_origins, content, origins, write_origins
from dsdistill.engine.passes.domain_maps import fit_maps
from dsdistill.engine.passes.layer_similarity import resolve_layers
from dsdistill.engine.passes.predictions import Predictions
from dsdistill.engine.passes.stability import stability
from dsdistill.engine.passes.teacher_scores import make_sampler
from dsdistill.engine.prepare import Prepared, make_objectives, prepare
from dsdistill.engine.refusals import check_backend
from dsdistill.engine.run_folder import BASELINE, MODEL, RunFolder
from dsdistill.engine.teacher import LazyTeacher
from dsdistill.engine.train import Trainer, peak_memory_mib
from dsdistill.models.build import check_attention
from dsdistill.models.tracer import Tracer, count_parameters

log = logging.getLogger("dsdistill")

TEACHERS = "runs/teachers"


def train(config: Config) -> dict:
    """Run `config` on the processes that the launcher started (or this one); return the summary on every rank."""
    RunFolder(config.run_dir).check()
    with running(config.run.timeout) as ranks:
        return run(config, ranks)


@contextlib.contextmanager
def running(timeout: float) -> Iterator[Ranks]:
    """Start the ranks of a run, and stop them at its end; raise RunError if a rank does not start or is lost."""
    try:
        yield deepspeed.start(timeout)
    except RunError:
        raise
    except RuntimeError as error:
        if (stopped := stopping.consequence()) is not None:
            raise stopped from None
        if deepspeed.timed_out(error):
            what = f"waited {timeout:g} minutes (run.timeout) for another rank, which did not answer"
        elif deepspeed.lost(error):
            what = "lost another rank"
        elif isinstance(error, dist.DistError):
            what = "could not connect to the other ranks"
        else:
            raise
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"rank {os.environ['RANK']} {what}: {reason}") from None
    finally:
        if (
            not stopping.requested()
        ):  # else closing the group could make ranks wait forever; after a signal the process ends anyway
            deepspeed.stop()


def run(config: Config, ranks: Ranks) -> dict:
    """Train and evaluate as `config` says; for a finished run only return its summary."""
    folder = RunFolder(config.run_dir)
    with ranks.first_alone():
        done = folder.summary()
        finished = done is not None and done.get("finished", False)
        if not finished:
            folder.agree(config)  # before the data is tokenised
            check_backend(config.train, ranks.device)
            for place, section in (("student", config.student), ("teacher", config.teacher)):
                check_attention(section.attn_implementation if section is not None else "auto", place)
        prepared = None if finished else prepare(config, ranks.world_size)
        if ranks.first:
            _open(folder, config, ranks, finished, prepared)
    if prepared is None:
        log.info("%s is finished; nothing to do", folder.path)
        return done
    with prepared.reading():
        if prepared.recipe is not None:
            use_recipe(prepared, folder, ranks)
        summary = _distil(prepared, folder, ranks)
        ranks.barrier()
    return summary


def _open(
    folder: RunFolder,
    config: Config,
    ranks: Ranks,
    finished: bool = False,
    prepared: Prepared | None = None,
) -> None:
    """Claim a run's folder and find the checkpoint to resume from; if the run is refused, its files do not change.

    prepared: given for a run that writes sources.json; None for a baseline, which has the sources of its run.
    """
    folder.claim()
    if not finished:
        folder.tag = checkpoint.check(folder.path, config, ranks.world_size)
    found = origins(prepared) if prepared is not None else {}
    check_origins(folder, found, prepared.data if prepared is not None else None)
    folder.open(config)
    if found:
        write_origins(folder, found)


def use_recipe(prepared: Prepared, run_folder: RunFolder, ranks: Ranks) -> None:
    """Point the config at the teacher that its recipe makes; train that teacher unless it is there."""
    recipe = prepared.recipe
    home = os.path.join(TEACHERS, _fingerprint(recipe))
    model = os.path.join(home, MODEL)
    with ranks.first_alone():
        if ranks.first:
            run_folder.pin_teacher(model)
            RunFolder(home, known=True).wait(model)  # another job may be training it now
    if not ranks.gather(os.path.isdir(model))[0]:
        log.info("training the teacher of %s in %s", prepared.config.teacher.recipe, home)
        recipe.config = with_fields(
            recipe.config, run=with_fields(recipe.config.run, dir=home, resume="auto")
        )
        folder = RunFolder(home, known=True)
        with ranks.first_alone():
            if ranks.first:
                _open(folder, recipe.config, ranks, prepared=recipe)
        if recipe.recipe is not None:
            use_recipe(recipe, folder, ranks)
        _distil(recipe, folder, ranks)
        gc.collect()  # free its engine before the next ones are made
        with ranks.first_alone():
            if ranks.first:
                export(home, model, dtype="fp32")  # a student learns from the weights as they are
                folder.release()  # another job may wait for it
    prepared.config = with_fields(
        prepared.config, teacher=with_fields(prepared.config.teacher, path=model, recipe=None)
    )


def _distil(prepared: Prepared, folder: RunFolder, ranks: Ranks) -> dict:
    config, started = prepared.config, time.time()
    init = student_init(prepared, folder, ranks)
    loaded = None
    if config.teacher is not None:
        loaded = LazyTeacher(config, prepared.teacher, prepared.objectives, ranks, prepared.judged)
    resolve_layers(prepared, init, folder, ranks, loaded)
    prepared.maps = fit_maps(prepared, folder, ranks, loaded)
    prepared.sampler = make_sampler(prepared, folder, ranks, loaded)
    teacher = loaded.tracer(prepared.objectives) if loaded is not None else None
    judge = teacher if prepared.judged else None
    student = _through_stages(prepared, init, teacher, judge, folder, ranks)
    predictions = Predictions()
    scores = student.evaluate(predictions)
    predictions.write(folder.path, prepared, ranks)
    scores["student"] |= stability(scores["student"], folder.path, student.total)
    models = {}
    if judge is not None:
        models["teacher"] = {**scores["teacher"], "parameters": count_parameters(teacher.model)}
    start = ranks.gather(folder.start_scores())[0] if config.run.evaluate_start else {}
    if start:  # without speeds, which a first pass cannot measure
        kept = {name: value for name, value in start.items() if not name.endswith("_per_second")}
        models["start"] = {**kept, "parameters": student.parameters}
    models["student"] = _row(scores["student"], student)
    steps, peak = student.total, max(ranks.gather(peak_memory_mib(ranks)))
    if config.run.baseline:
        del student  # free its engine before the next one is made
        gc.collect()
        models["baseline"] = _baseline(prepared, init, folder, judge, ranks)
    summary = {
        "name": config.run.name,
        "task": config.task,
        "steps": steps,
        "world_size": ranks.world_size,
        "zero_stage": {
            "teacher": config.teacher.zero_stage if config.teacher is not None else None,
            "student": config.student.zero_stage,
        },
        "terms": list(dict.fromkeys(name for objective in prepared.objectives for name in objective.terms)),
        "backends": prepared.objectives[0].backends,
        "models": models,
        "shapes": _shapes(prepared),
        "examples": _examples(prepared),
        **prepared.scored,
        "peak_memory_mib": peak,
        "seconds": round(time.time() - started, 1),
        "finished": True,
        "versions": checkpoint.versions(),
    }
    with ranks.first_alone():
        if ranks.first:
            folder.write_summary(summary)
    return summary


def _through_stages(
    prepared: Prepared,
    init: str | None,
    teacher: Tracer | None,
    judge: Tracer | None,
    folder: RunFolder,
    ranks: Ranks,
) -> Trainer:
    """Train stage after stage, from the newest checkpoint that verifies; return the last stage's trainer."""
    parts = prepared.config.run_stages
    tag = ranks.gather(folder.tag)[0]
    start = checkpoint.read_state(folder.path, tag)["stage"] if tag is not None else 0
    before = stages.weights_path(folder.path, parts[start - 1].name) if start else None
    trainer = None
    for index in range(start, len(parts)):
        if trainer is not None:
            before = stages.hand_over(folder.path, parts[index - 1].name, trainer.end, ranks)
            trainer.engine.destroy()
            del trainer  # free its engine before the next one is made
            gc.collect()
        if len(parts) > 1:
            log.info("stage %s: %s", parts[index].name, ", ".join(prepared.objectives[index].terms))
        trainer = Trainer(prepared, index, init, before, teacher, judge, ranks)
        if index == 0 and tag is None and prepared.config.run.evaluate_start:
            _score_start(trainer, folder, ranks)
        trainer.run(folder, tag)
        tag = None
    return trainer


def _score_start(trainer: Trainer, folder: RunFolder, ranks: Ranks) -> None:
    """Score the student before its first step; the scores are the first line of metrics.jsonl, which a resume keeps."""
    scores = trainer.evaluate()["student"]
    with ranks.first_alone():
        if ranks.first:
            folder.rewind(-1)  # a start that failed may have written this line already
            folder.log({"step": 0, "evaluation": scores})


def _baseline(
    prepared: Prepared, init: str | None, folder: RunFolder, judge: Tracer | None, ranks: Ranks
) -> dict:
    """Train the same student on the task alone, with the same steps and data; return its scores."""
    log.info("training the baseline: the same student without distillation")
    config, task = prepared.config, prepared.config.terms.task
    alone = copy.copy(prepared)
    home = RunFolder(folder / BASELINE, known=True)
    alone.config = with_fields(
        config,
        terms=Terms(task=Task() if task is None else Task(temperature=task.temperature)),
        stages=(),
        student=with_fields(config.student, domain=None),
        train=with_fields(config.train, distill_weight=None),
        run=with_fields(
            config.run,
            dir=home.path,
            name=f"{config.run.name}-baseline",
            baseline=False,
            evaluate_start=False,  # the run's own start scores hold for it too
        ),
    )
    alone.objectives = make_objectives(alone.config, prepared.pair)
    with ranks.first_alone():
        if ranks.first:
            _open(home, alone.config, ranks)
    student = _through_stages(alone, init, None, judge, home, ranks)
    return _row(student.evaluate()["student"], student)


def _row(scores: dict, trainer: Trainer) -> dict:
    progress = trainer.progress
    return {
        **scores,
        "parameters": trainer.parameters,
        "training_tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9), 1),
    }


def _shapes(prepared: Prepared) -> dict[str, dict]:
    """Return each model's type in transformers, its layers, width, heads and vocabulary."""
    found = {}
    for name, model, shape in (
        ("teacher", prepared.teacher, prepared.pair.teacher),
        ("student", prepared.student, prepared.pair.student),
    ):
        if model is not None and shape is not None:
            sizes = {key: getattr(shape, key) for key in ("depth", "width", "heads", "vocabulary")}
            found[name] = {"model_type": model.model_type, **sizes}
    return found


def _examples(prepared: Prepared) -> dict[str, int]:
    """Return how many examples each set has; a streamed train set is left out."""
    data = prepared.data
    counts = {} if isinstance(data.train, Streamed) else {"train": len(data.train)}
    return counts | {f"dev {name}".strip(): len(dev) for name, dev in data.devs.items()}


def _fingerprint(prepared: Prepared) -> str:
    """Return a teacher's name, made of all that determines the teacher: its config and its tokenised data."""
    digest = hashlib.sha256(teacher_identity(prepared.config).encode())
    for part in (prepared.data.train, *prepared.data.devs.values()):
        digest.update(content(part).encode())
    return f"{prepared.config.run.name}-{digest.hexdigest()[:12]}"


def with_fields(section, **changes):
    """Return a copy of a frozen config section with some fields changed."""
    return section.model_copy(update=changes)
