"""Count a model's parameters, and those that are multiplied for each token, from its architecture alone."""

import functools
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from dsdistill.alignment.objective import Objective
from dsdistill.alignment.terms import Shape
from dsdistill.config.schema import LANGUAGE, Lora, Stage, Student
from dsdistill.engine.module import frozen
from dsdistill.models.adapters import add_adapters
from dsdistill.models.build import skeleton
from dsdistill.models.capture import layer_list
from dsdistill.models.probe import Keyed, keyed
from dsdistill.models.settings import setting, text_config


@dataclass(frozen=True)
class Size:
    """A Size counts a model's values.

    named: values of each parameter, by name. multiplied: values of the matrices that multiply a token below a language
    model's head; in a mixture of experts, of those that a token is sent to. head: values of a language model's head.
    base: names of the weights below adapters; resting: how many of the multiplied values belong to them.
    """

    named: tuple[tuple[str, int], ...]
    multiplied: float
    head: int
    base: frozenset[str] = frozenset()
    resting: float = 0.0

    @property
    def total(self) -> int:
        return sum(size for _, size in self.named)

    @property
    def below(self) -> int:
        """Return how many values are below adapters: they never train, and no checkpoint holds them."""
        return sum(size for name, size in self.named if name in self.base)

    @property
    def largest(self) -> int:
        return max(size for _, size in self.named)


def size_of(config: PretrainedConfig, task: str, student: Student | None = None) -> Size:
    """Return the size of a model for a task; a process computes it only once.

    student: the section of a student, which may have adapters; None for a teacher.
    """
    if student is None or student.lora is None:
        return _size_of(keyed(config), task, None, False)
    return _size_of(keyed(config), task, student.lora, student.new_head)


@functools.lru_cache(maxsize=64)
def _size_of(keyed: Keyed, task: str, lora: Lora | None, new_head: bool) -> Size:
    model = skeleton(keyed.config, task, "model")
    base = frozenset[str]()
    if lora is not None:
        base = add_adapters(model, lora, task, 0, new_head=new_head)
    text = text_config(keyed.config)
    head = model.get_output_embeddings() if task in LANGUAGE else None
    apart = {id(head.weight)} if head is not None else set()
    share, multiplied, resting = _experts_share(text), 0.0, 0.0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            apart |= {id(parameter) for parameter in module.parameters()}
    again = text.num_hidden_layers if layer_list(model) is None else 1  # a single layer may run many times
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and id(parameter) not in apart:
            own = again * parameter.numel() * (share if parameter.dim() == 3 else 1)
            multiplied += own
            resting += own if name in base else 0
    named = tuple((name, parameter.numel()) for name, parameter in model.named_parameters())
    return Size(named, multiplied, head.weight.numel() if head is not None else 0, base, resting)


def _experts_share(text: PretrainedConfig) -> float:
    """Return the share of a mixture's experts that a token is sent to; their weights have three axes."""
    chosen = setting(text, "num_experts_per_tok")
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if chosen and (count := setting(text, name)):
            return min(1.0, chosen / count)
    return 1.0


def trained(size: Size, stage: Stage, objective: Objective) -> int:
    """Return how many values a stage trains: those of the student that it does not freeze, and the terms' own.

    All weights below adapters are frozen.
    """
    own = sum(count for name, count in size.named if name not in size.base and not frozen(name, stage.freeze))
    return own + terms_own(objective)


def terms_own(objective: Objective) -> int:
    """Return how many values the terms train: those of projectors."""
    return sum(parameter.numel() for parameter in objective.parameters())


def attention_operations(config: PretrainedConfig, task: str, tokens: int) -> list[float]:
    """Return each layer's operations in forward attention per token: 4 · H · d for each key that the token sees.

    In causal attention a token sees half the keys on average; a sliding window also limits the number of keys.
    """
    text, shape = text_config(config), Shape.of(config)
    kinds = setting(text, "layer_types") or [None] * shape.depth
    window = setting(text, "sliding_window") or tokens
    found = []
    for place, kind in enumerate(kinds, start=1):
        seen = tokens / 2 if task == "causal_lm" else tokens
        if kind is not None and "sliding" in str(kind):
            seen = min(seen, window)
        found.append(4.0 * shape.heads * shape.head_width * seen if place in shape.attending else 0.0)
    return found
