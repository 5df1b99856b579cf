"""The frozen teacher: whole on every rank, or sharded by ZeRO-3."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PretrainedConfig

from dsdistill.alignment.objective import Objective
from dsdistill.config.schema import LANGUAGE, Config
from dsdistill.data.batch import Batch
from dsdistill.distributed import deepspeed
from dsdistill.distributed.ranks import Ranks
from dsdistill.models.build import Headless, build
from dsdistill.models.capture import Capture, layer_list
from dsdistill.models.forward import trace
from dsdistill.models.trace import Trace


class Teacher:
    """Makes traces; holds no gradient and draws no random number (dropout is off)."""

    def __init__(
        self,
        config: Config,
        architecture: PretrainedConfig,
        objectives: Sequence[Objective],
        ranks: Ranks,
        hidden: Iterable[int] = (),
    ):
        """hidden: layers to trace beside those that the objectives read."""
        path = config.teacher.path
        needs_head = any("soft_label" in objective.terms for objective in objectives)

        def load() -> torch.nn.Module:
            torch.manual_seed(config.run.seed)  # matters only to a teacher without weights
            model = build(architecture, path, config.task, "teacher", needs_head=needs_head)
            model.config.use_cache = False
            return Headless(model, "teacher") if config.task in LANGUAGE else model

        if config.teacher.zero_stage == 3:
            self.call = deepspeed.shard_teacher(
                load, config, _largest_layer(architecture, config.task), ranks.device
            )
            module = self.call.module
        else:
            module = load().to(ranks.device).eval().requires_grad_(False)
            # Parameters alone: rotary frequencies, which are buffers, would turn positions if they were rounded.
            for parameter in module.parameters():
                parameter.data = parameter.data.to(deepspeed.DTYPES[config.train.dtype])
            self.call = module
        self.model = module.model if isinstance(module, Headless) else module
        self.headless = isinstance(module, Headless)
        seen, attention = (
            frozenset().union(*(objective.layers(kind) for objective in objectives))
            for kind in ("teacher_hidden", "teacher_attention")
        )
        values = any(objective.needs_values for objective in objectives)
        self.capture = Capture(self.model, seen.union(hidden), attention, values)

    @contextmanager
    def trace(self, batch: Batch) -> Iterator[Trace]:
        """The trace of a batch; a language model's head is whole on this rank inside the context only."""
        with torch.no_grad():
            found = trace(self.call, self.model, self.capture, batch)
        if not self.headless:
            yield found
            return
        head = self.model.get_output_embeddings()
        with deepspeed.gathered([p for p in (head.weight, head.bias) if p is not None]):
            found.head, found.head_bias = head.weight, head.bias
            yield found

    @property
    def parameters(self) -> int:
        return count_parameters(self.model)


def count_parameters(model: torch.nn.Module) -> int:
    """Whole parameters, tied ones once, sharded or not."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def _largest_layer(architecture: PretrainedConfig, task: str) -> int:
    """Parameters of the largest block (of all, where it has no list of them), from a model without weights."""
    with torch.device("meta"):
        model = build(architecture, None, task, "teacher", needs_head=False)
    return max(map(count_parameters, layer_list(model) or [model]))
