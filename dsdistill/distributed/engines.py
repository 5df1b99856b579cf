"""Make DeepSpeed's engines for teacher and student, and shard models by ZeRO-3 while they are read.

There are two ways to shard; in both a rank holds one whole tensor besides its parts. A model that is mapped from its
files takes no memory at first, and `partition` shards it tensor by tensor. If transformers must compute weights from
what it reads, the model is sharded while it is built (`constructing`): only rank 0 reads, and sends every tensor to
the others.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations import deepspeed as library_deepspeed

from dsdistill.config.schema import Config
from dsdistill.distributed.adagrad import AdaGrad
from dsdistill.distributed.deepspeed import (
    DTYPES,
    deepspeed,
    limit_waits,
    own_part,
    quiet,
    safe_set_local_fp32_param,
    set_master,
    student_settings,
    zero_section,
)
from dsdistill.distributed.groups import parameter_groups
from dsdistill.distributed.ranks import Ranks
from dsdistill.distributed.writer import Writer


@contextlib.contextmanager
def constructing(settings: dict) -> Iterator[None]:
    """Shard the weights of models that transformers makes or loads in the block.

    settings: those of the DeepSpeed engine that is to run them; they determine the dtype of a rank's parts.
    """
    others = library_deepspeed._hf_deepspeed_config_weak_ref  # perhaps a Trainer's
    living = HfDeepSpeedConfig(copy.deepcopy(settings))  # transformers looks for it while it loads
    try:
        yield
    finally:
        del living  # else the next model would be sharded too
        library_deepspeed._hf_deepspeed_config_weak_ref = others


def partition(module: nn.Module, settings: dict, dtype: torch.dtype, device: torch.device) -> None:
    """Shard every parameter of a module: each rank keeps its part, as `dtype` on `device`.

    settings: those of the DeepSpeed engine that is to run it.
    """
    first = None
    for parameter in module.parameters():
        # A copy, since DeepSpeed overwrites the values in place with rank 0's: pages of a mapped file
        # would stay in memory.
        parameter.data = parameter.detach().to(device, dtype, copy=True)
        if first is None:
            first = parameter
            deepspeed.zero.Init(module=nn.ParameterList([first]), config_dict_or_path=settings)
        else:
            first.convert_to_zero_parameters(param_list=[parameter])
    for buffer in module.buffers():
        buffer.data = buffer.to(device)


def shard(
    load: Callable[[], nn.Module],
    settings: Callable[[int], dict],
    largest_layer: Callable[[nn.Module], int],
    mapped: tuple[torch.dtype, torch.device] | None = None,
):
    """Return a frozen ZeRO-3 engine around the module that load() makes; its weights are sharded while they are read.

    settings: returns the engine's settings, given the largest layer's parameter count, which matters after loading.
    mapped: dtype and device of the parts, if load() maps the module from files.
    """
    if mapped is not None:
        module = load()
        partition(module, settings(1), *mapped)
    else:
        with constructing(settings(1)):
            module = load()
    module.eval().requires_grad_(False)
    with quiet():
        engine, *_ = deepspeed.initialize(model=module, config=settings(largest_layer(module)))
    limit_waits()
    engine.eval()
    return engine


def student_engine(
    module: nn.Module,
    terms: list[nn.Parameter],
    config: Config,
    rate: float,
    ranks: Ranks,
    scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
    base: frozenset[str] = frozenset(),
):
    """Return the engine that trains `module`.

    terms: parameters of the objective, which may have a learning rate of their own; rate: that of all others. base:
    names of weights below adapters; if there are any, checkpoints hold only what trains, and the buffers. The
    optimizer's float32 master weights begin with the exact values of `module`, whatever dtype the engine computes in.
    Float32 weights are rounded only after that, also if they are sharded already.
    """
    settings = student_settings(config, ranks.world_size)
    dtype = DTYPES[config.train.dtype]
    # Kept on the CPU. If they are there already they are not copied, since rounding replaces the tensors.
    unrounded = {
        name: p.detach().cpu()
        for name, p in module.named_parameters()
        if p.requires_grad and p.dtype != dtype and not is_sharded(p)
    }
    parts = round_parts(module, dtype)
    groups = parameter_groups(module, terms, config, rate)
    # DeepSpeed allocates a bucket of 5e8 gradients, however few there are. This takes 1 or 2 GB of a GPU; on a CPU the
    # heap grows, since blocks of 2 GB are allocated and freed in it at every step.
    everyone = sum(getattr(p, "ds_numel", p.numel()) for group in groups for p in group["params"])
    bucket = min(zero_section(settings).reduce_bucket_size, everyone)
    settings["zero_optimization"]["reduce_bucket_size"] = bucket
    optimizer = _optimizer(config, settings)(groups, lr=rate)
    with quiet():
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=settings,
            dist_init_required=False,
        )
    limit_waits()
    for name, parameter in engine.module.named_parameters():
        if name in unrounded:
            set_master(parameter, unrounded.pop(name))
        elif name in parts:
            safe_set_local_fp32_param(parameter, parts.pop(name))
    # If a step fails at the smallest loss scale, step_gradient reports it, and the run ends in one line that says why.
    engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    engine.checkpoint_engine = Writer()
    # DeepSpeed would copy its conversion scripts next to the checkpoints. `export` needs none, and a failed copy would
    # leave the other ranks waiting.
    engine._copy_recovery_script = lambda save_path: None
    if base:
        # DeepSpeed leaves out a frozen weight under one name only, but a tied weight has several.
        state = engine.module_state_dict
        engine.module_state_dict = lambda **options: {
            name: value for name, value in state(**options).items() if name not in base
        }
        engine.save_checkpoint = functools.partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        engine.load_checkpoint = functools.partial(engine.load_checkpoint, load_module_strict=False)
    return engine


class StepGradient(NamedTuple):
    """A StepGradient tells whether a step's gradient is finite; it is the same on every rank."""

    norm: float | Tensor
    skipped: bool  # DeepSpeed has left the weights unchanged
    searching: bool  # fp16's loss scale is dynamic and can still fall

    def finite(self) -> bool:
        """Return whether the gradient is finite; this waits for the device if the norm is on it.

        DeepSpeed skips steps whose gradient is not finite, without a limit. In fp16 it finds its loss scale that way,
        so that such a step is no fault as long as the scale can still fall.
        """
        return (not self.skipped and math.isfinite(self.norm)) or self.searching


def step_gradient(engine, skipped: int) -> StepGradient:
    """Return the gradient of the latest step; skipped: engine.skipped_steps before that step."""
    scaler = engine.optimizer.loss_scaler
    searching = bool(scaler.dynamic and scaler.cur_scale > scaler.min_scale)
    return StepGradient(engine.get_global_grad_norm(), engine.skipped_steps != skipped, searching)


def _optimizer(config: Config, settings: dict) -> Callable[..., torch.optim.Optimizer]:
    if settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none") == "none":
        return {
            "adamw": functools.partial(torch.optim.AdamW, fused=True),  # one pass over memory, not ten
            "adam": functools.partial(torch.optim.Adam, fused=True),
            "adagrad": AdaGrad,
            "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
        }[config.train.optimizer]
    return deepspeed.ops.adam.DeepSpeedCPUAdam  # computes AdamW by default; compiled at first use


def is_sharded(parameter: nn.Parameter) -> bool:
    """Return whether each rank holds only its part of the parameter."""
    return hasattr(parameter, "ds_id")


def gathered(parameters: list[nn.Parameter]):
    """Return a context in which the parameters are whole on every rank, sharded or not."""
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    return deepspeed.zero.GatheredParameters(sharded) if sharded else contextlib.nullcontext()


def whole(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's whole values on the CPU; every rank must call this for the same parameters."""
    with gathered([parameter]):
        values = parameter.detach().cpu()
        return values.clone() if is_sharded(parameter) else values


def fill(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Set the parameters and buffers that `values` names, sharded or not; others of the module stay unchanged."""
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name, value in values.items():
            if (tensor := own.get(name)) is None:
                continue  # another name of a tied weight
            if isinstance(tensor, nn.Parameter) and is_sharded(tensor):
                tensor.ds_tensor.copy_(own_part(tensor, value))
            else:
                tensor.copy_(value)


def round_parts(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast a module's sharded parameters to `dtype`; return this rank's unrounded parts of those that train, by name.

    The returned parts are on the CPU; parameters that have that dtype already are left out. DeepSpeed expects sharded
    parameters to have the dtype that its engine computes in, and casts only the others.
    """
    before = {}
    if not any(map(is_sharded, module.parameters())):
        return before
    for name, parameter in module.named_parameters():
        if not is_sharded(parameter):
            parameter.data = parameter.data.to(dtype)
        elif parameter.dtype != dtype:
            if parameter.requires_grad:
                before[name] = parameter.ds_tensor.detach().cpu()
            rounded = parameter.ds_tensor.data.to(dtype)
            if parameter.ds_tensor.is_pinned():  # with offloaded parameters
                rounded = rounded.pin_memory()
            parameter.ds_tensor.data, parameter.data = rounded, parameter.data.to(dtype)
    return before


def register_external(module: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Tell ZeRO-3 which sharded parameters `module` uses outside the forward pass of the submodule that holds them."""
    known = module.ds_external_parameters() if hasattr(module, "ds_external_parameters") else ()
    known = {id(parameter) for _, parameter in known}
    for parameter in parameters:
        if id(parameter) not in known:
            deepspeed.zero.register_external_parameter(module, parameter)
