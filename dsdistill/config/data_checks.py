"""Check the rules between the settings of a run's data."""

from typing import TYPE_CHECKING, Any

from dsdistill.config.data_section import Data, Part
from dsdistill.config.errors import UserError

if TYPE_CHECKING:
    from dsdistill.config.schema import Config


def check_data(data: Data, task: str) -> None:
    """Raise UserError for settings of the data that contradict each other, or the task."""
    _check_sources(data)
    _check_language(data, task)
    _check_packing(data, task)
    if (data.domain is None) != (data.general is None):
        raise UserError("data.domain and data.general", "only one of them", "both or neither")
    for name in ("domain", "general"):
        if getattr(data, name) is not None and data.source != "files":
            raise UserError(f"data.{name}", f"files with data.source {data.source}", "data.source files")
    if data.tokenizer is not None and data.train_tokenizer is not None:
        raise UserError("data.train_tokenizer", "a size together with data.tokenizer", "only one of the two")
    if data.tokenizer_kind != "wordpiece" and data.train_tokenizer is None:
        raise UserError(
            "data.tokenizer_kind",
            f"{data.tokenizer_kind} without data.train_tokenizer",
            "data.train_tokenizer, the vocabulary size",
        )


def check_streaming(config: "Config") -> None:
    """Refuse settings that need all examples of a streamed set."""
    data = config.data
    if not data.streaming:
        return
    if config.train.steps is None:
        raise UserError(
            "data.streaming", "true without train.steps", "train.steps: the length of an epoch is unknown"
        )
    if data.source in ("docstrings", "files") or data.root is not None:
        root = "" if data.root is None else " and data.root"
        raise UserError("data.streaming", f"true with data.source {data.source}{root}", "a hub data set")
    if config.task not in ("causal_lm", "masked_lm"):
        raise UserError("data.streaming", f"true with task {config.task}", "task causal_lm or masked_lm")
    if not isinstance(data.train, str):
        raise UserError("data.streaming", "true with several sources in data.train", "one split")
    sampler = data.sampler not in ("uniform", "random_masked")
    for place, given, wanted in (
        ("data.sampler", sampler, "uniform or random_masked: others read all examples first"),
        ("data.fraction", data.fraction < 1, "1: train.steps decides how much is used"),
        ("data.max_train", data.max_train is not None, "null: train.steps decides how much is used"),
        (
            "data.holdout",
            data.holdout is not None,
            "null: the examples of a streamed set are not known in advance",
        ),
        ("data.train_tokenizer", data.train_tokenizer is not None, "null, and data.tokenizer"),
        ("train.group_by_length", config.train.group_by_length, "false"),
        ("run.evaluate_every", config.run.evaluate_every == "epoch", "a number of steps"),
        ("student.domain", config.student.domain is not None, "null"),
    ):
        if given:
            section, name = place.split(".")
            got = getattr(getattr(config, section), name)
            shown = got if isinstance(got, str | int | float) else "a section"
            raise UserError(place, f"{str(shown).lower()} with data.streaming true", wanted)


def _check_sources(data: Data) -> None:
    if data.subset is not None and data.source in ("docstrings", "files"):
        raise UserError("data.subset", f"{data.subset} with data.source {data.source}", "a hub data set")
    if data.root is not None and data.source == "docstrings":
        raise UserError("data.root", f"{data.root} with data.source docstrings", "files or a hub data set")
    if data.holdout is not None:
        if isinstance(data.dev, dict) and "holdout" in data.dev:
            raise UserError("data.dev", "a set named holdout together with data.holdout", "another name")
        if not isinstance(data.train, str) and isinstance(data.train[0], Part):
            raise UserError(
                "data.holdout", f"{data.holdout} with several sources in data.train", "one source"
            )
    if isinstance(data.train, str):
        return
    if not isinstance(data.train[0], Part):
        if data.source != "files":
            raise UserError(
                "data.train", f"a list with data.source {data.source}", "one split, or source: files"
            )
        return
    if data.sampler not in ("uniform", "random_masked", "ddk"):
        raise UserError(
            "data.sampler",
            f"{data.sampler} with several sources",
            "uniform (the sources' weights decide) or ddk",
        )
    for index, part in enumerate(data.train):
        place, source = f"data.train.{index}", part.source or data.source
        if part.train is None and part.source is None and part.subset is None:
            raise UserError(place, "neither source, subset nor train", "at least one of them")
        if part.train is None and source == "files":
            raise UserError(f"{place}.train", "nothing with source files", "a file, or a list of files")
        if part.train is not None and not isinstance(part.train, str) and source != "files":
            raise UserError(f"{place}.train", f"a list with source {source}", "one split, or source: files")
        if part.subset is not None and source in ("docstrings", "files"):
            raise UserError(f"{place}.subset", f"{part.subset} with source {source}", "a hub data set")


def _check_language(data: Data, task: str) -> None:
    """Refuse settings of language models' data with another task, where they would have no effect."""
    if task != "causal_lm":
        for name in ("messages", "chat_template", "layout", "overlong"):
            if getattr(data, name) is not None and not (name == "layout" and data.layout == "separator"):
                raise UserError(f"data.{name}", f"{getattr(data, name)} with task {task}", "task causal_lm")
        if data.template_options:
            raise UserError("data.template_options", f"options with task {task}", "task causal_lm")
    elif _is_plain(data):
        defaults: list[tuple[str, Any]] = [
            ("chat_template", None),
            ("template_options", {}),
            ("turns", "split"),
            ("train_on", "assistant"),
        ]
        for name, default in defaults:
            if getattr(data, name) != default:
                got = f"{getattr(data, name)} with plain text"
                raise UserError(
                    f"data.{name}", got, "data.messages, or two columns in data.text: prompt and response"
                )
    if task in ("causal_lm", "masked_lm") and data.drop_unlabelled:
        raise UserError("data.drop_unlabelled", f"true with task {task}", "a task with labels")


def _is_plain(data: Data) -> bool:
    """Return whether the data is one source of single texts."""
    one_source = isinstance(data.train, str) or not isinstance(data.train[0], Part)
    return one_source and data.messages is None and len(data.text) == 1


def _check_packing(data: Data, task: str) -> None:
    if _is_plain(data) and data.packing is False and data.overlong is not None:
        got = f"{data.overlong} with data.packing false, which continues a text in the next block"
        raise UserError("data.overlong", got, "packing auto or true, or no overlong")
    if data.packing is not True:
        return
    if task != "causal_lm":
        raise UserError("data.packing", f"true with task {task}", "task causal_lm")
    if data.sampler != "uniform":
        raise UserError("data.packing", f"true with data.sampler {data.sampler}", "auto, or sampler: uniform")
