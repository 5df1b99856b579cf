"""Tell what a student that is cut from its teacher takes over outside its layers."""

from collections.abc import Collection

from torch import Tensor, nn
from transformers import PreTrainedModel

from dsdistill.config import UserError
from dsdistill.config.schema import LANGUAGE
from dsdistill.models.capture import layer_list


def check_rest(
    student: PreTrainedModel, teacher: PreTrainedModel, task: str, place: str, missing: Collection[str] = ()
) -> None:
    """Raise UserError where a weight of the student outside its layers is not the teacher's to give.

    Only a head of classes may be new. missing: weights that the teacher has at random, as its files lack them.
    """
    given = teacher.state_dict()
    for own, names in outside(student, teacher, missing):
        if names or (task not in LANGUAGE and not own[0].startswith(f"{student.base_model_prefix}.")):
            continue
        shape = list(student.state_dict()[own[0]].shape)
        there = (
            f"the teacher's weights, which lack {own[0]}"
            if own[0] in missing
            else f"{own[0]} of shape {shape}, where the teacher has {list(given[own[0]].shape)}"
            if own[0] in given
            else f"{own[0]}, which the teacher has not"
        )
        raise UserError(f"{place}.from_teacher", there, "a student that is the teacher's outside its layers")


def outside(
    student: PreTrainedModel, teacher: PreTrainedModel, missing: Collection[str]
) -> list[tuple[list[str], list[str]]]:
    """Return each weight and buffer of the student outside its layers as two lists of names.

    They are the student's own names of it, several where it is tied, and those of them under which the teacher has
    what can be copied there.
    """
    layers = layer_list(student)
    assert layers is not None  # check_cut has refused models without a list of layers
    inside = {id(value) for value in _tensors(layers).values()}
    saved, given = student.state_dict(), _tensors(teacher)
    tied: dict[int, list[str]] = {}
    for name, value in _tensors(student).items():
        if name in saved and id(value) not in inside:
            tied.setdefault(id(value), []).append(name)
    return [
        (
            own,
            [
                name
                for name in own
                if name in given and name not in missing and given[name].shape == saved[own[0]].shape
            ],
        )
        for own in tied.values()
    ]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, tied ones under each of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def untied(first: str, second: str, model: str) -> UserError:
    """Return what is said where a student ties two weights that differ in the model that it is made from."""
    got = f"weights that are tied, where the {model}'s {first} and {second} differ"
    return UserError("student.config.tie_word_embeddings", got, "false, as those weights are")
