"""Everything that can be refused is refused here, before any weight is loaded."""

import fnmatch
import logging
import os
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dsdistill import config as configs
from dsdistill.alignment.objective import Objective, available_backends
from dsdistill.alignment.terms import Pair, Shape
from dsdistill.config import Config, UserError
from dsdistill.config.schema import LANGUAGE
from dsdistill.config.schema import Data as DataSettings
from dsdistill.config.terms import SoftLabel, Task, Terms
from dsdistill.data import Data, Examples, load, read, tokenize
from dsdistill.data.ngrams import Bigrams, Contrast
from dsdistill.data.samplers import GROUP, Sampler
from dsdistill.data.sources import read_texts
from dsdistill.data.wordpiece import train_tokenizer
from dsdistill.distributed import deepspeed
from dsdistill.engine import stages
from dsdistill.evaluation.text import check_packages
from dsdistill.models.build import (
    architecture,
    build,
    check_cut,
    cut_architecture,
    for_task,
    load_tokenizer,
    override,
)
from dsdistill.models.probe import probe, rotates_queries
from dsdistill.models.tokenizer import check_vocabulary, entries
from dsdistill.models.trace import Geometry
from dsdistill.models.weights import check_weights

log = logging.getLogger("dsdistill")

# RoBERTa and its family start counting positions after the padding token.
_POSITIONS_AFTER_PADDING = frozenset(
    "roberta camembert xlm-roberta xlm-roberta-xl data2vec-text roberta-prelayernorm mpnet longformer".split()
)


@dataclass
class Prepared:
    """A config whose parts fit together."""

    config: Config
    recipe: "Prepared | None"  # the run that trains the teacher first
    tokenizer: PreTrainedTokenizerBase
    data: Data[Examples]
    student: PretrainedConfig
    teacher: PretrainedConfig | None
    pair: Pair
    objectives: tuple[Objective, ...]  # one for each stage
    evaluation: Objective  # task and, with a teacher, KL at τ = 1
    geometry: dict[int, Geometry]  # of the student's attention layers, where a term needs it
    contrast: Contrast | None  # what sets the domain apart, where the data tells
    judged: bool  # the teacher has a trained head: its scores and the distance to it mean something
    maps: dict[str, Tensor] | None = (
        None  # of the teacher's states, once fitted (engine/passes/domain_maps.py)
    )
    sampler: Sampler | None = None  # of the train set, once it is made (engine/passes/teacher_scores.py)


def prepare(config: Config, world_size: int) -> Prepared:
    """Resolve architectures, tokenizer and data, and check them against each other.

    Raises UserError for the first thing that does not fit.
    """
    check_ranks(config, world_size)
    if config.train.dtype == "fp16" and not torch.cuda.is_available():
        raise UserError("train.dtype", "fp16 without a GPU", "fp32 or bf16")
    deepspeed.check_settings(config, world_size)
    if config.evaluation.generate:
        check_packages()
    recipe = None
    if config.teacher is not None and config.teacher.path is None and config.teacher.recipe is not None:
        recipe = prepare(recipe_of(config), world_size)
        if recipe.config.task != config.task:
            raise UserError(f"teacher.recipe: {config.teacher.recipe}: task", recipe.config.task, config.task)
        tell_other_data(config, recipe.config)
    teacher = _teacher_architecture(config, recipe)
    student = student_architecture(config, teacher)
    objectives = objective_layers(config, student, teacher)
    tokenizer = _tokenizer(config, recipe)
    for place, model in (("student", student), ("teacher", teacher)):
        if model is not None:
            _check_sizes(config, model, tokenizer, place)
    _check_weights(config, student, teacher)
    geometry = probe_models(config, student, teacher, objectives)
    check_frozen(config, student)
    data = load(config.data, config.task, tokenizer, config.run.seed, config.needs_spans)
    stages.ends(
        config, config.train.steps or config.train.epochs * ceil(len(data.train) / config.train.batch_size)
    )
    contrast = _contrast(config, tokenizer)
    judged = _has_head(config, teacher, recipe)
    if config.evaluation.rcs and not judged:
        raise UserError(
            "evaluation.rcs",
            f"{config.evaluation.rcs} with a teacher whose head is not trained",
            "one that is, whose KL stands beside it, or 0",
        )
    if config.data.sampler == "entropy" and not judged:
        raise UserError(
            "data.sampler", "entropy with a teacher whose head is not trained", "one that is, or another"
        )
    if config.task == "classification" and judged and (recipe is not None or config.teacher.path is not None):
        _check_classes(data.labels, teacher, recipe)
    for model in (student, teacher):
        if model is not None:
            for_task(model, config.task, data.labels, tokenizer.pad_token_id)
    pair = make_pair(config, student, teacher, entries(tokenizer))
    evaluation = Terms(
        task=Task(),
        soft_label=SoftLabel(temperature=1.0) if judged and config.task in LANGUAGE else None,
    )
    torch.manual_seed(config.run.seed)  # of the projectors
    return Prepared(
        config,
        recipe,
        tokenizer,
        data,
        student,
        teacher,
        pair,
        make_objectives(config, pair),
        Objective(evaluation, pair),
        geometry,
        contrast,
        judged,
    )


def check_backend(config: Config, device: torch.device) -> None:
    """Raise UserError for a backend that no operator has here; what one term lacks its first call tells."""
    here = ["auto", *(name for name in available_backends() if name != "cpp" or device.type == "cpu")]
    if config.train.backend not in here:
        raise UserError("train.backend", f"{config.train.backend}, which cannot run here", ", ".join(here))


def _contrast(config: Config, tokenizer: PreTrainedTokenizerBase) -> Contrast | None:
    if config.data.domain is None or config.data.general is None:
        return None
    models = (
        Bigrams(
            tokenize(read_texts(config.data, files), tokenizer, config.data.max_length, "masked_lm"),
            entries(tokenizer),
        )
        for files in (config.data.domain, config.data.general)
    )
    return Contrast(*models)


def recipe_of(config: Config) -> Config:
    """The config that trains the teacher; its data is read from where this run's is."""
    recipe = configs.load([config.teacher.recipe])
    if config.data.root is None or recipe.data.root is not None or recipe.data.source == "docstrings":
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": config.data.root})})


def tell_other_data(config: Config, recipe: Config) -> None:
    """Overrides of the run's data do not reach its recipe: a teacher of other texts is allowed, but seldom meant."""
    ours, theirs = _texts(config.data), _texts(recipe.data)
    other = [f"data.{key}: {ours[key]} here, {theirs[key]} there" for key in ours if ours[key] != theirs[key]]
    if other:
        log.warning("%s makes a teacher of other data: %s", config.teacher.recipe, "; ".join(other))


def _texts(data: DataSettings) -> dict:
    """What they are read from."""
    files = [data.train] if isinstance(data.train, str) else data.train
    return {
        "source": data.source,
        "subset": data.subset,
        "train": ", ".join(map(os.path.normpath, files)),
        "text": ", ".join(data.text),
    }


def check_ranks(config: Config, world_size: int) -> None:
    at_once = config.train.micro_batch_size * world_size
    if config.train.batch_size % at_once:
        raise UserError(
            "train.batch_size",
            config.train.batch_size,
            f"a multiple of train.micro_batch_size × ranks = {config.train.micro_batch_size} × {world_size}",
        )
    for name, term in (item for stage in config.parts for item in stage.terms.named().items()):
        if term.relates and at_once == 1:
            raise UserError(
                f"terms.{name}",
                "one example at once (train.micro_batch_size 1 on 1 rank)",
                "at least 2: the term relates examples that meet in a micro-batch",
            )
    if config.data.sampler == "hard_negative" and at_once % GROUP:
        raise UserError(
            "train.micro_batch_size",
            f"{at_once} examples at once on {world_size} rank(s)",
            f"a multiple of {GROUP}: hard_negative keeps an example and its neighbours together",
        )


def _teacher_architecture(config: Config, recipe: Prepared | None) -> PretrainedConfig | None:
    if config.teacher is None:
        return None
    if recipe is not None:
        made = type(recipe.student).from_dict(recipe.student.to_dict())
        return override(made, config.teacher.config or {}, "teacher")
    return architecture(config.teacher.path, config.teacher.config, "teacher")


def student_architecture(config: Config, teacher: PretrainedConfig | None) -> PretrainedConfig:
    student = config.student
    if student.from_teacher is not None:
        return cut_architecture(teacher, student.from_teacher, student.config, "student")
    return architecture(student.path, student.config, "student")


def _check_weights(config: Config, student: PretrainedConfig, teacher: PretrainedConfig | None) -> None:
    teacher_path = config.teacher.path if config.teacher is not None else None
    for place, path, model in (("teacher", teacher_path, teacher), ("student", config.student.path, student)):
        if path is not None:
            check_weights(path, model, config.task, place)


def shape(model: PretrainedConfig) -> Shape:
    heads = model.num_attention_heads
    return Shape(
        depth=model.num_hidden_layers,
        width=model.hidden_size,
        heads=heads,
        key_heads=getattr(model, "num_key_value_heads", None) or heads,
        head_width=getattr(model, "head_dim", None) or model.hidden_size // heads,
        vocabulary=model.vocab_size,
    )


def make_pair(
    config: Config, student: PretrainedConfig, teacher: PretrainedConfig | None, tokens: int
) -> Pair:
    domain = config.student.domain
    return Pair(
        shape(student),
        teacher and shape(teacher),
        config.task,
        config.train.backend,
        tokens,
        domain.width if domain is not None else 0,
    )


def make_objectives(config: Config, pair: Pair) -> tuple[Objective, ...]:
    """Of each stage."""
    return tuple(Objective(stage.terms, pair, config.train.distill_weight) for stage in config.parts)


def objective_layers(
    config: Config, student: PretrainedConfig, teacher: PretrainedConfig | None
) -> tuple[Objective, ...]:
    """The objectives without weights: checks layer maps, heads and depths, from the architectures alone."""
    tokens = min(model.vocab_size for model in (student, teacher) if model is not None)
    with torch.device("meta"):
        return make_objectives(config, make_pair(config, student, teacher, tokens))


def check_frozen(config: Config, student: PretrainedConfig) -> None:
    """Refuse patterns that name no parameter, or that leave none to train."""
    if not any(stage.freeze for stage in config.parts):
        return
    with torch.device("meta"):
        model = build(student, None, config.task, "student", needs_head=False)
    names = [name for name, _ in model.named_parameters()]
    stages = {f"stages.{index}.freeze": stage.freeze for index, stage in enumerate(config.stages)}
    for place, patterns in {"student.freeze": config.student.freeze, **stages}.items():
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise UserError(place, f"{pattern}, which names nothing", f"a name such as {names[0]}")
        # A stage freezes what the whole run does as well.
        if all(frozen(name, (*config.student.freeze, *patterns)) for name in names):
            raise UserError(place, "every parameter", "some left to train")


def frozen(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a stage leaves this parameter of the student as it is."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _tokenizer(config: Config, recipe: Prepared | None) -> PreTrainedTokenizerBase:
    if config.data.tokenizer is not None:
        return load_tokenizer(config.data.tokenizer, "data.tokenizer")
    if config.data.train_tokenizer is not None:
        texts = (text for texts in read(config.data, config.task).train.texts for text in texts)
        return load_tokenizer(
            train_tokenizer(texts, config.data.train_tokenizer, config.data.cache), "data.train_tokenizer"
        )
    teacher = config.teacher.path if config.teacher is not None else None
    paths = [
        (place, path) for place, path in (("teacher", teacher), ("student", config.student.path)) if path
    ]
    if not paths and recipe is None:
        raise UserError(
            "data.tokenizer", "nothing, and no model with a path", "a folder or hub id with a tokenizer"
        )
    found = [recipe.tokenizer] if recipe is not None else []
    found += [load_tokenizer(path, f"{place}.path") for place, path in paths]
    if len(found) == 2 and found[0].get_vocab() != found[1].get_vocab():
        raise UserError(
            "student.path",
            f"a tokenizer of {len(found[1])} entries unlike the teacher's {len(found[0])}",
            "the same one",
        )
    return found[0]


def _check_sizes(
    config: Config, model: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, place: str
) -> None:
    pairs = len(config.data.text) == 2 and config.task != "causal_lm"
    check_vocabulary(tokenizer, model, place, pairs)
    positions = getattr(model, "max_position_embeddings", None)
    if positions is not None:
        usable = positions
        if model.model_type in _POSITIONS_AFTER_PADDING:
            usable -= (model.pad_token_id or 0) + 1
        if config.data.max_length > usable:
            raise UserError(
                "data.max_length", config.data.max_length, f"at most the {place}'s {usable} positions"
            )


def probe_models(
    config: Config,
    student: PretrainedConfig,
    teacher: PretrainedConfig | None,
    objectives: tuple[Objective, ...],
) -> dict[int, Geometry]:
    """Check that what the terms need can be captured; returns which keys each student layer sees."""
    attention = any(objective.layers("student_attention") for objective in objectives)
    hidden = bool(config.evaluation.rcs or config.evaluation.structure) or any(
        objective.layers("student_hidden") for objective in objectives
    )
    lens = any("fdd" in objective.terms for objective in objectives)
    models = {
        place: model for place, model in (("student", student), ("teacher", teacher)) if model is not None
    }
    seen = [
        probe(model, config.task, place, attention=attention, hidden=hidden, lens=lens)
        for place, model in models.items()
    ]
    for objective in objectives:
        if "attention" in objective.terms:
            term = objective.terms["attention"]
            term.check_geometry(*seen)
            if term.unrotated:
                term.check_rotation(
                    {
                        place: model.model_type
                        for place, model in models.items()
                        if rotates_queries(model, config.task)
                    }
                )
    if config.student.from_teacher is not None:
        check_cut(student, teacher, config.student.from_teacher, config.task, "student")
    return seen[0]


def _has_head(config: Config, teacher: PretrainedConfig | None, recipe: Prepared | None) -> bool:
    """Whether the teacher's head is trained for the task: a teacher of hidden states alone may have none yet."""
    if teacher is None:
        return False
    if (
        recipe is not None
        or config.task == "causal_lm"  # its head is the embeddings, or comes with them
        or any("soft_label" in stage.terms.named() for stage in config.parts)  # the weights must bring it
    ):
        return True
    heads = {"masked_lm": ("MaskedLM", "PreTraining", "LMHead")}.get(config.task, ("SequenceClassification",))
    discriminators = ("ElectraForPreTraining", "FunnelForPreTraining")  # these tell tokens from replaced ones
    return config.teacher.path is not None and any(
        head in name for name in teacher.architectures or () for head in heads if name not in discriminators
    )


def _check_classes(
    labels: tuple[str, ...], teacher: PretrainedConfig | None, recipe: Prepared | None
) -> None:
    """The teacher's classes must be the data's, in the same order."""
    if recipe is not None:
        theirs = recipe.data.labels
    else:
        theirs = tuple(str(teacher.id2label[index]) for index in sorted(teacher.id2label))
    unnamed = all(name == f"LABEL_{index}" for index, name in enumerate(theirs))
    if len(theirs) != len(labels) or (not unnamed and theirs != labels):
        raise UserError(
            "teacher", f"a teacher of the classes {list(theirs)[:8]}", f"the data's {list(labels)[:8]}"
        )
