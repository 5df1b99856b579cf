"""Refuse impossible settings before any weight is loaded; each check takes the part of the config that it needs."""

import fnmatch
from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dsdistill.alignment.objective import Objective, available_backends
from dsdistill.config import UserError
from dsdistill.config.schema import EMBEDDING, Data, Evaluation, Stage, Student, Teacher, Train
from dsdistill.engine.module import frozen
from dsdistill.models.adapters import add_adapters
from dsdistill.models.build import check_missing, skeleton
from dsdistill.models.positions import check_length, check_padding
from dsdistill.models.tokenizer import check_vocabulary, difference
from dsdistill.models.weights import check_weights


def check_precision(train: Train) -> None:
    if train.dtype == "fp16" and not torch.cuda.is_available():
        raise UserError("train.dtype", "fp16 without a GPU", "fp32 or bf16")


def check_backend(train: Train, device: torch.device) -> None:
    """Refuse a backend that no operator has here; if only some term lacks it, that term raises at its first call."""
    here = ["auto", *(name for name in available_backends() if name != "cpp" or device.type == "cpu")]
    if train.backend not in here:
        raise UserError("train.backend", f"{train.backend}, which cannot run here", ", ".join(here))


def check_sizes(
    data: Data,
    task: str,
    model: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    place: str,
    *,
    trained: bool,
) -> None:
    """Refuse a model with fewer embeddings than the tokenizer has entries, or fewer positions than a text may have.

    trained: whether the model has trained weights, so that its tokens' positions must not shift.
    """
    pairs = len(data.text) == 2 and task not in ("causal_lm", EMBEDDING)
    check_vocabulary(tokenizer, model, place, pairs)
    padding = tokenizer.pad_token_id if task != "causal_lm" else None  # see for_task()
    check_length(model, task, data.max_length, padding, place)
    if trained and padding is not None:
        check_padding(model, task, padding, place)


def check_tokenizer(
    used: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, place: str, model: str
) -> None:
    """Refuse a tokenizer that gives a model other ids than the model's own: they would mean other words to it."""
    if (unlike := difference(used, own)) is not None:
        raise UserError(
            place,
            f"a tokenizer {unlike} in the {model}'s tokenizer",
            f"the {model}'s tokenizer, or an equal one",
        )


def check_files(
    sections: dict[str, tuple[Teacher | Student | None, PretrainedConfig | None]], task: str
) -> dict[str, set[str]]:
    """Refuse weights that are damaged or have other shapes; return the names that local files lack, by place.

    sections: each model's section and architecture, by place.
    """
    return {
        place: check_weights(section.path, model, task, place)
        for place, (section, model) in sections.items()
        if section is not None and section.path is not None
    }


def check_lacking(
    section: Teacher | Student | None,
    model: PretrainedConfig | None,
    missing: Collection[str],
    task: str,
    place: str,
    *,
    needs_head: bool,
) -> None:
    """Refuse a model whose files lack weights that it needs; needs_head: as in build_model."""
    if missing:
        check_missing(skeleton(model, task, place), missing, section.path, task, place, needs_head=needs_head)


def check_frozen(student: Student, stages: Sequence[Stage], model: PretrainedConfig, task: str) -> None:
    """Refuse adapters that fit no layer, and freeze patterns that match no parameter or leave none to train.

    stages: as in the config, without student.freeze.
    """
    by_place = {f"stages.{index}.freeze": stage.freeze for index, stage in enumerate(stages)}
    by_place = {"student.freeze": student.freeze, **by_place}
    if student.lora is None and not any(by_place.values()):
        return
    made = skeleton(model, task, "student")
    names = [name for name, _ in made.named_parameters()]
    trained = names
    if student.lora is not None:
        base = add_adapters(made, student.lora, task, 0, new_head=student.new_head)
        trained = [name for name, _ in made.named_parameters() if name not in base]
    for place, patterns in by_place.items():
        for pattern in patterns:
            if not fnmatch.filter([*names, *trained], pattern):
                raise UserError(place, f"{pattern}, which matches no parameter", f"a name such as {names[0]}")
        # A stage also freezes what the whole run freezes.
        if all(frozen(name, (*student.freeze, *patterns)) for name in trained):
            raise UserError(place, "patterns that match every parameter", "some parameters left to train")


def has_head(
    task: str,
    teacher: Teacher,
    model: PretrainedConfig,
    objectives: Sequence[Objective],
    missing: Collection[str],
) -> bool:
    """Return whether the teacher's head is trained for the task; a head that no term reads may be untrained.

    missing: weights that its files lack.
    """
    if task == EMBEDDING or any(objective.needs("head") for objective in objectives):
        return True  # it has no head, or its files must contain it
    if missing:
        return False
    if task == "causal_lm":
        return True  # such a model has no other head
    heads = {"masked_lm": ("MaskedLM", "PreTraining", "LMHead")}.get(task, ("SequenceClassification",))
    discriminators = ("ElectraForPreTraining", "FunnelForPreTraining")  # they detect replaced tokens
    return teacher.path is not None and any(
        head in name for name in model.architectures or () for head in heads if name not in discriminators
    )


def check_judge(evaluation: Evaluation, data: Data, judged: bool) -> None:
    """Refuse settings that need a teacher with a trained head, if it has none."""
    if judged:
        return
    if evaluation.rcs:
        raise UserError(
            "evaluation.rcs",
            f"{evaluation.rcs} with a teacher whose head is not trained",
            "a teacher with a trained head, or 0",
        )
    if data.sampler in ("entropy", "ddk"):
        got = f"{data.sampler} with a teacher whose head is not trained"
        raise UserError("data.sampler", got, "one with a trained head, or another sampler")


def check_domains(data: Data, sources: Sequence[str], devs: Collection[str]) -> None:
    """Refuse data.sampler ddk without a dev set of each source's name."""
    missing = [name for name in sources if name not in devs]
    if data.sampler == "ddk" and missing:
        raise UserError(
            "data.dev", f"no set named {missing[0]}", f"one for each source: {', '.join(sources)}"
        )


def check_classes(labels: tuple[str, ...], theirs: tuple[str, ...], given: bool) -> None:
    """Refuse a teacher with other classes than the data's, or in another order.

    given: `data.labels` gives the order; a teacher whose classes have no names needs it.
    """
    unnamed = all(name == f"LABEL_{index}" for index, name in enumerate(theirs))
    if len(theirs) != len(labels) or (not unnamed and theirs != labels):
        raise UserError(
            "teacher",
            f"a teacher with the classes {list(theirs)[:8]}",
            f"those of the data, {list(labels)[:8]}",
        )
    if unnamed and not given and not all(map(str.isdecimal, labels)):
        got = f"a teacher whose classes have no names, and data with {list(labels)[:8]}"
        raise UserError("teacher", got, "data.labels with the names in the teacher's order")


def class_names(model: Any) -> tuple[str, ...]:
    """Return the classes that an architecture names, in the order of their indices."""
    return tuple(str(model.id2label[index]) for index in sorted(model.id2label))
