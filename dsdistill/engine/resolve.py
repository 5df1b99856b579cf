"""Resolve what a config's data depends on, and read its sets, with or without a run."""

import contextlib
from dataclasses import dataclass
from typing import Protocol

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dsdistill.config import Config, UserError, schema
from dsdistill.config.load import recipe_of
from dsdistill.config.schema import EMBEDDING
from dsdistill.data import Set, Splits, Words, load_data
from dsdistill.data.bytes_bpe import train_bytes_tokenizer
from dsdistill.data.chat_template import read_template
from dsdistill.data.sources import texts
from dsdistill.data.table import Bad
from dsdistill.data.wordpiece import train_tokenizer
from dsdistill.engine import refusals
from dsdistill.engine.row_sharing import packs
from dsdistill.models.build import architecture, load_tokenizer, locate, override
from dsdistill.models.cut import cut_architecture
from dsdistill.models.sentence import Sentence, named_prompts, read_sentence
from dsdistill.models.tokenizer import entries, fingerprint


class Made(Protocol):
    """Made is the result of a recipe: its student is the run's teacher."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    student: PretrainedConfig


@dataclass
class Resolved:
    """Resolved holds the tokenizer and the architectures of a config."""

    config: Config  # with pooling and prompts from the folders of sentence encoders
    tokenizer: PreTrainedTokenizerBase
    student: PretrainedConfig
    teacher: PretrainedConfig | None
    recipe: "Resolved | None"  # the teacher's


def resolve(config: Config, bad: Bad | None = None) -> Resolved:
    """Return tokenizer and architectures of a config, and of its teacher's recipe; weights are not read.

    bad: called for rows that cannot be read, if a tokenizer is trained on them.
    """
    recipe = None
    if config.teacher is not None and config.teacher.path is None and config.teacher.recipe is not None:
        recipe = resolve(recipe_of(config), bad)
    teacher = teacher_architecture(config.teacher, recipe)
    student = student_architecture(config.student, teacher)
    tokenizer = tokenizer_of(config, recipe, bad)
    if config.data.chat_template is not None:  # the export has the template that the student learns
        tokenizer.chat_template = read_template(config.data.chat_template)
    config = with_sentences(config, tokenizer, recipe)
    return Resolved(config, tokenizer, student, teacher, recipe)


def with_sentences(config: Config, tokenizer: PreTrainedTokenizerBase, recipe: Made | None = None) -> Config:
    """Return the config; for task embedding, fill in poolings and prompts from the folders of its models.

    recipe: the teacher's. Raises UserError for a folder of another kind of sentence encoder.
    """
    if config.task != EMBEDDING:
        return config
    sections = {"teacher": config.teacher, "student": config.student}
    found = {
        place: read_sentence(locate(section.path, f"{place}.path"), f"{place}.path")
        for place, section in sections.items()
        if section is not None and section.path is not None
    }
    for place, sentence in found.items():
        if sentence is not None and sentence.lower and tokenizer.tokenize("A") != tokenizer.tokenize("a"):
            got = f"{sections[place].path} with do_lower_case, but a tokenizer that keeps capitals"
            raise UserError(f"{place}.path", got, "a tokenizer that converts texts to lower case")
    if recipe is not None:
        prompts = recipe.config.data.prompts or ()
        found["teacher"] = Sentence(recipe.config.student.pooling or "mean", *named_prompts(prompts))
    changes, pooling = {}, None
    for place, section in sections.items():
        if section is not None:
            own = found.get(place)
            pooling = section.pooling or (own.pooling if own is not None else None) or pooling or "mean"
            changes[place] = section.model_copy(update={"pooling": pooling})
    prompts = config.data.prompts
    if prompts is None:
        source = next((sentence for sentence in found.values() if sentence is not None), Sentence())
        prompts = source.prompts_of(len(config.data.text))
    changes["data"] = config.data.model_copy(update={"prompts": prompts})
    return config.model_copy(update=changes)


def read_sets(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    student: PretrainedConfig,
    teacher: PretrainedConfig | None,
    bad: Bad | None = None,
) -> Splits[Set]:
    """Return all sets of a config, tokenised, as its models are to read them; `bad` as in `load_data`."""
    return load_data(
        config.data,
        config.task,
        words_of(tokenizer),
        seed=config.run.seed,
        with_spans=config.needs_spans,
        packed=packs(config, {"student": student, "teacher": teacher}),
        bad=bad,
        run=config.run_dir,
    )


def words_of(tokenizer: PreTrainedTokenizerBase) -> Words:
    """Return a tokenizer with its number of entries and its fingerprint."""
    return Words(tokenizer, entries(tokenizer), fingerprint(tokenizer))


def teacher_architecture(teacher: schema.Teacher | None, recipe: Made | None) -> PretrainedConfig | None:
    """Return the architecture of the teacher; recipe: the run that trains it."""
    if teacher is None:
        return None
    if recipe is not None:
        made = type(recipe.student).from_dict(recipe.student.to_dict())
        return override(made, teacher.config or {}, "teacher")
    return architecture(teacher.path, teacher.config, "teacher")


def student_architecture(student: schema.Student, teacher: PretrainedConfig | None) -> PretrainedConfig:
    """Return the architecture of the student; teacher: the one that it may be cut from."""
    if student.from_teacher is not None:
        return cut_architecture(teacher, student.from_teacher, student.config, "student")
    return architecture(student.path, student.config, "student")


def tokenizer_of(config: Config, recipe: Made | None, bad: Bad | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a run; raise UserError if a model of the run has a different one."""
    paths = {"teacher": config.teacher and config.teacher.path, "student": config.student.path}
    paths = {place: path for place, path in paths.items() if path}
    own = {"teacher": recipe.tokenizer} if recipe is not None else {}
    if config.data.tokenizer is not None:
        place = "data.tokenizer"
        chosen = load_tokenizer(config.data.tokenizer, place)
        others = {name: path for name, path in paths.items() if path != config.data.tokenizer}
        own |= _own_tokenizers(others)
    elif config.data.train_tokenizer is not None:
        place = "data.train_tokenizer"
        make = train_bytes_tokenizer if config.data.tokenizer_kind == "bytes" else train_tokenizer
        folder = make(texts(config.data, config.task, bad), config.data.train_tokenizer, config.data.cache)
        chosen = load_tokenizer(folder, place)
        own |= _own_tokenizers(paths)
    else:
        own |= {name: load_tokenizer(path, f"{name}.path") for name, path in paths.items()}
        if not own:
            raise UserError(
                "data.tokenizer", "null, and no model with a path", "a folder or hub id with a tokenizer"
            )
        # Teacher and student read the same ids.
        place = "student.path"
        chosen = own.pop("teacher") if "teacher" in own else own.pop("student")
        if "student" in own:
            refusals.check_tokenizer(own["student"], chosen, place, "teacher")
        return chosen
    for name, tokenizer in own.items():
        refusals.check_tokenizer(chosen, tokenizer, place, name)
    return chosen


def _own_tokenizers(paths: dict[str, str]) -> dict[str, PreTrainedTokenizerBase]:
    """Return the models' own tokenizers, by place; a tokenizer that is missing or fails to load is left out."""
    found = {}
    for name, path in paths.items():
        with contextlib.suppress(UserError):
            found[name] = load_tokenizer(path, f"{name}.path")
    return found
