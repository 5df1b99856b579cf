"""Check the rules of task embedding: what it needs, and which settings would have no effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsdistill.config.data_section import Data, Part
from dsdistill.config.errors import UserError
from dsdistill.config.terms import Embedding, Task, Term

if TYPE_CHECKING:  # the schema calls the checks
    from dsdistill.config.schema import Config

TASK = "embedding"


def check_embedding(config: Config) -> None:
    """Raise UserError for settings of task embedding that contradict each other or belong to another task."""
    if config.task != TASK:
        _check_other(config)
        return
    data = config.data
    for place, term in _terms(config):
        if term.needs_head:
            raise UserError(place, "task embedding, whose models have no head", "terms.embedding")
        if isinstance(term, Task):
            _check_pairs(data, place)
    if config.run.baseline:
        _check_pairs(data, "run.baseline")
    if data.label is not None and len(data.text) < 2:
        raise UserError(
            "data.label", f"{data.label} with single texts", "two columns in data.text, or no label"
        )
    if data.label is not None and data.source == "docstrings":
        got = f"{data.label} with data.source docstrings, which has no scores"
        raise UserError("data.label", got, "no label, or another source")
    if data.drop_unlabelled and data.label is None:
        raise UserError("data.drop_unlabelled", "true without data.label", "false")
    if isinstance(data.label, dict):
        sets = list(data.dev) if isinstance(data.dev, dict) else []
        unknown = sorted(data.label.keys() - set(sets))
        if unknown:
            wanted = f"names of dev sets: {', '.join(sets) or 'data.dev: {NAME: FILE, ...}'}"
            raise UserError("data.label", f"a column for {', '.join(unknown)}", wanted)
    if data.labels is not None:
        raise UserError("data.labels", "class names with task embedding", "no data.labels")
    if data.prompts is not None and len(data.prompts) != len(data.text):
        got = f"{len(data.prompts)} for {len(data.text)} columns of data.text"
        raise UserError("data.prompts", got, "one prompt for each column")
    if data.sampler in ("hard_negative", "domain_aware") and data.train_columns == 2:
        raise UserError("data.sampler", f"{data.sampler} with pairs", "uniform, or single texts")
    if config.student.domain is not None:
        raise UserError("student.domain", "task embedding", "a task with a head")
    _check_parts(data)


def relates(term: Term, task: str) -> bool:
    """Return whether a term's value depends on which examples share a micro-batch, as in the contrast of pairs."""
    return term.relates or (task == TASK and isinstance(term, Task))


def _check_other(config: Config) -> None:
    """Refuse settings of task embedding with another task, where they would have no effect."""
    for place, model in (("teacher", config.teacher), ("student", config.student)):
        if model is not None and model.pooling is not None:
            raise UserError(f"{place}.pooling", f"{model.pooling} with task {config.task}", "task embedding")
    if isinstance(config.data.label, dict):
        raise UserError("data.label", f"columns by dev set with task {config.task}", "one column for all")
    if config.data.prompts is not None:
        raise UserError("data.prompts", f"prompts with task {config.task}", "task embedding")
    for place, term in _terms(config):
        if isinstance(term, Embedding):
            raise UserError(place, f"task {config.task}", "task embedding")
        if isinstance(term, Task) and term.temperature != Task.model_fields["temperature"].default:
            got = f"{term.temperature} with task {config.task}"
            raise UserError(f"{place}.temperature", got, "task embedding")


def _check_parts(data: Data) -> None:
    """Refuse parts of the train set that mix pairs and single texts, and parts without a matching prompt."""
    for index, part in enumerate(() if isinstance(data.train, str) else data.train):
        columns = part.text if isinstance(part, Part) and part.text is not None else data.text
        place = f"data.train.{index}.text"
        if len(columns) > len(data.text):
            raise UserError(place, "pairs, where data.text has single texts", "single texts")
        if len(columns) != data.train_columns:
            got = f"{len(columns)} column(s), where the part before has {data.train_columns}"
            raise UserError(place, got, "pairs in all parts, or single texts in all")
        if len(columns) < len(data.text) and any(data.prompts or ()) and columns[0] not in data.text:
            got = f"column {columns[0]}, for which data.prompts has no prompt"
            raise UserError(place, got, " or ".join(data.text))


def _terms(config: Config) -> list[tuple[str, Term]]:
    """Return the terms of all stages as (place in the config, term)."""
    if not config.stages:
        return [(f"terms.{name}", term) for name, term in config.terms.named().items()]
    return [
        (f"stages.{index}.terms.{name}", term)
        for index, stage in enumerate(config.stages)
        for name, term in stage.terms.named().items()
    ]


def _check_pairs(data: Data, place: str) -> None:
    """Refuse a contrast without pairs, or among pairs with scores of similarity."""
    if data.train_columns < 2:
        wanted = "data.text: [query, document], or other terms"
        raise UserError(place, "single texts, which form no pairs to contrast", wanted)
    # If some dev set has no label (it is used for search), the labels belong to the other dev sets, not to train pairs.
    searched = isinstance(data.label, dict) and data.label.keys() != set(data.dev)
    if data.label is not None and not searched:
        got = f"pairs with scores (data.label: {data.label}), some of which are not similar"
        raise UserError(place, got, "pairs without a label, or other terms")
