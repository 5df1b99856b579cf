"""Put low-rank adapters (LoRA) into a student's linear layers, merge them, or write them in the format of peft.

With a frozen weight W a layer computes (W + alpha / rank · B A) x: Hu et al. 2021, arXiv 2106.09685, section 4.1. A is
random and B starts at zero, so that the student's outputs do not change at first. The library peft replaces the layers
in place. The model keeps its class, but a layer's weight is then called `base_layer.weight`.
"""

import contextlib
import re
import warnings
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dsdistill.config import UserError
from dsdistill.config.checks import check_peft
from dsdistill.config.schema import EMBEDDING, LANGUAGE, Lora
from dsdistill.models.build import first_line
from dsdistill.models.capture import body, layer_list, replaced
from dsdistill.models.settings import text_config

if TYPE_CHECKING:
    from peft import LoraConfig

TARGETS = "student.lora.targets"
WEIGHTS = "adapter_model.safetensors"
_NAME = "default"  # peft's name of the only adapter
# The names that peft has for the tasks; it has none for masked language models.
_TASKS = {
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "causal_lm": "CAUSAL_LM",
    EMBEDDING: "FEATURE_EXTRACTION",
}


def target_names(model: PreTrainedModel, lora: Lora) -> list[str]:
    """Return the names of the linear layers that get adapters; all of them are inside the model's layers.

    `auto` takes the layers that peft chooses for the model type; if peft does not know the type, all linear layers.
    Raises UserError for a name that matches no such layer, and if peft is not installed.
    """
    check_peft()
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOSEN

    there = _linear_layers(model)
    if lora.targets == "auto":
        kinds = (model.config.model_type, text_config(model.config).model_type)
        chosen = next((CHOSEN[kind] for kind in kinds if kind in CHOSEN), ())
        if isinstance(chosen, str):  # a pattern that matches whole names
            found = [name for name in there if re.fullmatch(chosen, name)]
        else:
            found = [name for name in there if _fits(name, chosen)]
        found = found or there
    else:
        for target in lora.targets:
            if not any(_fits(name, [target]) for name in there):
                raise UserError(TARGETS, f"{target}, which names nothing", f"auto, or some of {_ends(there)}")
        found = [name for name in there if _fits(name, lora.targets)]
    if not found:
        got = f"model type {model.config.model_type}, whose layers hold no linear layer"
        raise UserError("student.lora", got, "a model with linear layers")
    return found


def _ends(names: Iterable[str]) -> str:
    """Return the last parts of layers' names, without repetition."""
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _fits(name: str, targets: Collection[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of the linear layers inside the model's layers, without heads, poolers and embeddings.

    A model that runs one layer repeatedly (ALBERT) holds it in another list.
    """
    layers = layer_list(model)
    lists = [module for module in body(model).modules() if isinstance(module, nn.ModuleList)]
    inside = {part for each in ([layers] if layers is not None else lists) for part in each.modules()}
    return [
        name
        for name, module in model.named_modules()
        if module in inside and isinstance(module, nn.Linear | Conv1D)
    ]


def add_adapters(
    model: PreTrainedModel, lora: Lora, task: str, seed: int, *, new_head: bool = False
) -> frozenset[str]:
    """Put adapters into a model in place; afterwards only they and a head for classes or scores require gradients.

    seed: the adapters' first values depend on this number and on nothing else. new_head: a language model's head also
    trains, if it is not tied to the embeddings. Returns the names of all weights that never train: the base.
    """
    names = target_names(model, lora)
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=names,
        fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
    )
    first = next(model.parameters())
    # Values are drawn on the CPU for every device, so that they are the same everywhere.
    device = torch.device("meta" if first.is_meta else "cpu")
    # The planner's tensors cannot be moved, and they are already where they belong.
    hollow = replaced(nn.Module, "to", _stay) if isinstance(first, FakeTensor) else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), device, hollow:
        warnings.simplefilter("ignore")  # layers of both kinds: peft corrects the setting for the others
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(settings, model)
        except ValueError as error:  # such as a layer that a kernel reads without calling it (Mamba)
            got = f"{_ends(names)} of model type {model.config.model_type} ({first_line(error)[:100]})"
            raise UserError(TARGETS, got, "names of layers that peft can adapt") from None
    made = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if made != names:  # peft knows other names for experts
        got = f"{_ends(names)} of model type {model.config.model_type}, some of which peft does not adapt"
        raise UserError(TARGETS, got, f"some of {_ends(name for name in names if name in made)}")
    for parameter in _head(model, task, new_head).values():
        parameter.requires_grad_(True)
    return frozenset(
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    )


def _stay(module: nn.Module, *_, **__) -> nn.Module:
    return module


def _head(model: PreTrainedModel, task: str, new_head: bool) -> dict[str, nn.Parameter]:
    """Return the parameters of a head that trains without adapters, by name; none if the student keeps its head."""
    if task == EMBEDDING or (task in LANGUAGE and not new_head):
        return {}
    inside = {id(parameter) for parameter in body(model).parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in inside}


def check_names(model: PreTrainedModel, given: Collection[str], base: Collection[str], place: str) -> None:
    """Raise UserError unless `given` names all weights of a model with adapters except its base, and no others."""
    own = set(model.state_dict())
    wrong = sorted((own - set(base) - set(given)) | (set(given) - own))
    if wrong:
        raise UserError(place, f"weights that do not fit in {wrong[0]}", "those of this run's student")


def merge(model: PreTrainedModel) -> PreTrainedModel:
    """Add each adapter to the weight that it adapts, and return the model, which then has no adapters."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()  # type: ignore[operator]  # each kind of LoraLayer has it
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def save_adapter(model: PreTrainedModel, task: str, base: str, dtype: torch.dtype, folder: str) -> None:
    """Write a model's adapters, and the head that trained, as a folder for `peft.PeftModel.from_pretrained`.

    base: name or folder of the model without adapters; the written folder refers to it. dtype: type of the weights.
    """
    known: Any = model.peft_config
    settings: LoraConfig = known[_NAME]
    heads = {name for name in _trained(model) if f".{_NAME}." not in name}
    settings.task_type = _TASKS.get(task)  # type: ignore[assignment]  # peft takes names, too
    settings.base_model_name_or_path = base
    settings.inference_mode = True
    settings.modules_to_save = sorted({name.partition(".")[0] for name in heads}) or None
    settings.save_pretrained(folder)
    weights = {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": value.to(dtype).contiguous()
        for name, value in _trained(model).items()
    }
    save_file(weights, f"{folder}/{WEIGHTS}", metadata={"format": "pt"})


def _trained(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights that train in a model with adapters, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
