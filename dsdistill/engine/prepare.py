"""Resolve the parts of a run and check them against each other before any weight is loaded."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import ceil

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dsdistill.alignment.objective import Objective
from dsdistill.alignment.probing import check_pair
from dsdistill.alignment.terms import Pair, Shape
from dsdistill.config import Config, UserError, schema
from dsdistill.config.checks import check_ranks
from dsdistill.config.schema import LANGUAGE
from dsdistill.config.terms import SoftLabel, Task, Terms
from dsdistill.data import Set, Splits, Streamed, load_texts
from dsdistill.data.ngrams import Bigrams, Contrast
from dsdistill.data.samplers import Sampler
from dsdistill.data.sources import names, parts
from dsdistill.distributed import deepspeed
from dsdistill.engine import refusals, stages
from dsdistill.engine.module import brings_head
from dsdistill.engine.resolve import (
    Resolved,
    read_sets,
    resolve,
    words_of,
)
from dsdistill.evaluation.positive import positive_class
from dsdistill.evaluation.scores import Outputs
from dsdistill.evaluation.text import check_packages
from dsdistill.models.build import (
    for_task,
)
from dsdistill.models.cut import check_cut
from dsdistill.models.settings import text_config
from dsdistill.models.tokenizer import entries
from dsdistill.models.trace import Geometry
from dsdistill.models.weights import check_ties, own_ties

log = logging.getLogger("dsdistill")


@dataclass
class Prepared:
    """Prepared holds a config and what it names, checked to fit together."""

    config: Config
    recipe: "Prepared | None"  # the run that trains the teacher first
    tokenizer: PreTrainedTokenizerBase
    data: Splits[Set]
    student: PretrainedConfig
    teacher: PretrainedConfig | None
    pair: Pair
    objectives: tuple[Objective, ...]  # one for each stage
    evaluation: Objective  # task and, with a teacher, KL at τ = 1
    geometry: dict[int, Geometry]  # of the student's attention layers, where a term needs it
    contrast: Contrast | None  # finds terms of the domain, if the data names domain and general texts
    judged: bool  # the teacher has a trained head, so that its scores and the distance to it are meaningful
    maps: dict[str, Tensor] | None = None  # of the teacher's states, once fitted (passes/domain_maps.py)
    sampler: Sampler | None = None  # of the train set, once it is made (passes/teacher_scores.py)
    outputs: dict[str, Outputs] = field(
        default_factory=dict
    )  # the teacher's on dev sets (passes/teacher_outputs.py)

    @property
    def positive(self) -> int | None:
        """Return the index of the class whose F1 is scored, if there are two classes."""
        return positive_class(self.data.labels, self.config.evaluation.positive_class)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Close streamed data at the end of the body; remove its stored parts if the body raised nothing."""
        finished = False
        try:
            yield
            finished = True
        finally:
            prepared: Prepared | None = self
            while prepared is not None:
                if isinstance(prepared.data.train, Streamed):
                    prepared.data.train.close(finished)
                prepared = prepared.recipe

    @property
    def scored(self) -> dict[str, str]:
        """Return what a summary holds besides scores: the name of the class whose F1 is scored."""
        return {} if self.positive is None else {"positive_class": self.data.labels[self.positive]}


def prepare(config: Config, world_size: int, found: Resolved | None = None) -> Prepared:
    """Resolve architectures, tokenizer and data, and check them against each other.

    found: tokenizer and architectures, if they are resolved already. Raises UserError for the first mismatch.
    """
    task, train = config.task, config.train
    check_ranks(train, config.run_stages, config.data.sampler, world_size, task)
    refusals.check_precision(train)
    deepspeed.check_settings(config, world_size)
    if config.evaluation.generate:
        check_packages()
    found = found or resolve(config)
    config = found.config
    data = config.data
    student, teacher, tokenizer = found.student, found.teacher, found.tokenizer
    objectives = objective_layers(config, student, teacher)
    for place, model in (("student", student), ("teacher", teacher)):
        if model is not None:
            trained = place == "teacher" or config.student.from_teacher or config.student.path
            refusals.check_sizes(data, task, model, tokenizer, place, trained=bool(trained))
    lacking = refusals.check_files(
        {"teacher": (config.teacher, teacher), "student": (config.student, student)}, task
    )
    of_teacher, of_student = (lacking.get(place, set()) for place in ("teacher", "student"))
    reads = bool(config.evaluation.rcs or config.evaluation.structure)
    sections = {"student": config.student} | ({"teacher": config.teacher} if config.teacher else {})
    implementations = {place: section.attn_implementation for place, section in sections.items()}
    geometry = check_pair(task, student, teacher, objectives, hidden=reads, implementations=implementations)
    if config.student.from_teacher is not None:
        layers = config.student.from_teacher
        ties = check_cut(student, teacher, layers, task, "student", of_teacher)
        if config.teacher.path is not None:
            check_ties(config.teacher.path, ties, "teacher")
    if config.student.path is not None:
        check_ties(config.student.path, own_ties(student, task, "student"), "student")
    refusals.check_frozen(config.student, config.stages, student, task)
    reads_head = any(objective.needs("head") for objective in objectives)
    refusals.check_lacking(config.teacher, teacher, of_teacher, task, "teacher", needs_head=reads_head)
    refusals.check_lacking(
        config.student, student, of_student, task, "student", needs_head=brings_head(config)
    )
    judged = teacher is not None and (
        found.recipe is not None or refusals.has_head(task, config.teacher, teacher, objectives, of_teacher)
    )
    refusals.check_judge(config.evaluation, data, judged)
    # All checks of the models alone have passed: only now is the data tokenised, which may take long.
    recipe = _recipe(config, world_size, found.recipe)
    splits = read_sets(config, tokenizer, student, teacher)
    refusals.check_domains(data, getattr(splits.train, "names", ()), splits.devs)
    positive_class(splits.labels, config.evaluation.positive_class)  # refuses an unknown class
    stages.ends(config, train.steps or train.epochs * ceil(len(splits.train) / train.batch_size))
    contrast = _contrast(data, tokenizer)
    if task == "classification" and judged and (recipe is not None or config.teacher.path is not None):
        theirs = recipe.data.labels if recipe is not None else refusals.class_names(teacher)
        refusals.check_classes(splits.labels, theirs, data.labels is not None)
    for model in (student, teacher):
        if model is not None:
            for_task(model, task, splits.labels, tokenizer.pad_token_id)
    pair = make_pair(config, student, teacher, entries(tokenizer), splits.labels)
    evaluation = Terms(
        task=Task(),
        soft_label=SoftLabel(temperature=1.0) if judged and task in LANGUAGE else None,
    )
    torch.manual_seed(config.run.seed)  # for the projectors' first weights
    return Prepared(
        config,
        recipe,
        tokenizer,
        splits,
        student,
        teacher,
        pair,
        make_objectives(config, pair),
        Objective(evaluation, replace(pair, smoothing=0.0, class_weights=())),
        geometry,
        contrast,
        judged,
    )


def _recipe(config: Config, world_size: int, found: Resolved | None) -> Prepared | None:
    """Prepare the run that trains the teacher, if the config names one."""
    if found is None:
        return None
    recipe = prepare(found.config, world_size, found)
    if recipe.config.task != config.task:
        raise UserError(f"teacher.recipe: {config.teacher.recipe}: task", recipe.config.task, config.task)
    tell_other_data(config, recipe.config)
    return recipe


def _contrast(data: schema.Data, tokenizer: PreTrainedTokenizerBase) -> Contrast | None:
    if data.domain is None or data.general is None:
        return None
    words = words_of(tokenizer)
    models = (Bigrams(load_texts(data, files, words), words.entries) for files in (data.domain, data.general))
    return Contrast(*models)


def tell_other_data(config: Config, recipe: Config) -> None:
    """Warn if the recipe's data differs: overrides do not reach the recipe, so this is allowed but seldom meant."""
    ours, theirs = _texts(config.data), _texts(recipe.data)
    other = [f"data.{key}: {ours[key]} here, {theirs[key]} there" for key in ours if ours[key] != theirs[key]]
    if other:
        log.warning("%s trains the teacher on other data: %s", config.teacher.recipe, "; ".join(other))


def _texts(data: schema.Data) -> dict:
    """Return what a config's texts are read from."""
    of = [part for *_, part in parts(data)]
    return {
        "source": ", ".join(part.source for part in of),
        "subset": ", ".join(str(part.subset) for part in of),
        "train": ", ".join(os.path.normpath(name) for part in of for name in names(part.train)),
        "text": "; ".join(", ".join(part.text) for part in of),
    }


def make_pair(
    config: Config,
    student: PretrainedConfig,
    teacher: PretrainedConfig | None,
    tokens: int,
    classes: tuple[str, ...] = (),
) -> Pair:
    """Return the Pair: what the terms know of the two models. classes: the data's, if they are known."""
    domain = config.student.domain
    return Pair(
        Shape.of(student),
        Shape.of(teacher) if teacher is not None else None,
        config.task,
        config.train.backend,
        tokens,
        domain.width if domain is not None else 0,
        config.train.label_smoothing,
        class_weights(config.train.class_weights, classes) if classes else (),
        pooling=(
            config.student.pooling or "mean",
            (config.teacher.pooling if config.teacher is not None else None) or "mean",
        ),
    )


def class_weights(
    given: tuple[float, ...] | dict[str, float] | None, classes: tuple[str, ...]
) -> tuple[float, ...]:
    """Return the weight of each class in the task's loss, () where none is given.

    Raises:
        UserError: they are not the data's classes, or all weigh 0.
    """
    if given is None:
        return ()
    place, listed = "train.class_weights", ", ".join(classes[:8]) + ", …" * (len(classes) > 8)
    if isinstance(given, dict):
        if unknown := [name for name in given if name not in classes]:
            raise UserError(f"{place}.{unknown[0]}", "no class", f"one of the classes {listed}")
        given = tuple(given.get(name, 1.0) for name in classes)
    if len(given) != len(classes):
        raise UserError(place, f"{len(given)} weights", f"one for each of the classes {listed}")
    if not any(given):
        raise UserError(place, "only weights of 0", "at least one above 0")
    return given


def make_objectives(config: Config, pair: Pair) -> tuple[Objective, ...]:
    """Return the objective of each stage."""
    return tuple(Objective(stage.terms, pair, config.train.distill_weight) for stage in config.run_stages)


def objective_layers(
    config: Config, student: PretrainedConfig, teacher: PretrainedConfig | None
) -> tuple[Objective, ...]:
    """Return the objectives without weights; this checks layer maps, heads and depths from the architectures alone."""
    tokens = min(text_config(model).vocab_size for model in (student, teacher) if model is not None)
    with torch.device("meta"):
        return make_objectives(config, make_pair(config, student, teacher, tokens))
