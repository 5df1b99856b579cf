"""Start DeepSpeed, make the settings of its engines, and read what they save; engines.py makes the engines."""

import contextlib
import copy
import datetime
import logging
import os
import typing
import warnings

import torch
import torch.distributed as dist
from torch import nn

from dsdistill.config import UserError
from dsdistill.config.checks import nearest
from dsdistill.config.schema import Config
from dsdistill.config.secrets import shown
from dsdistill.distributed import stopping
from dsdistill.distributed.ranks import Ranks, environment, private_store
from dsdistill.distributed.shards import Shards

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported; stops its search
os.environ.setdefault("DS_LOG_LEVEL", "warning")

import deepspeed
import pydantic
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum
from deepspeed.utils import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from deepspeed.utils.tensor_fragment import fragment_address

PATIENCE = datetime.timedelta(days=1)  # timeout while rank 0 downloads or tokenises alone
PICKLED = [fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler]  # DeepSpeed's, in checkpoints
FROZEN = "frozen.pt"  # file of a checkpoint: weights that do not train, before they were rounded
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Sections whose unknown keys DeepSpeed refuses, though only after the models are loaded.
STRICT = {
    "zero_optimization": DeepSpeedZeroConfig,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
}


def start(timeout: float = 10.0) -> Ranks:
    """Join the process group; call stop() at the end.

    timeout: minutes that a rank waits for the others before it gives up.
    """
    environment()
    device = _device()
    cuda = device.type == "cuda"
    if (
        not cuda and "OMP_NUM_THREADS" not in os.environ
    ):  # ranks that each use every core slow each other down
        beside = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // beside))
    global _limit
    _limit = datetime.timedelta(minutes=timeout)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        store = private_store(_limit)
        if store is not None:
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            bound = device if cuda and size > 1 else None  # as DeepSpeed does
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=_limit, device_id=bound
            )
        deepspeed.init_distributed(  # uses the existing group
            dist_backend=backend, timeout=_limit, auto_mpi_discovery=False, verbose=False
        )
    size = dist.get_world_size()
    stopping.connect(dist.distributed_c10d._get_default_store(), size)
    patient = dist.new_group(backend="gloo", timeout=PATIENCE, group_desc=_PATIENT) if size > 1 else None
    return Ranks(dist.get_rank(), size, device, patient)


def join() -> torch.device:
    """Return this rank's device; start torch.distributed from the launcher's variables unless it is running."""
    if not dist.is_initialized():
        environment()
    device = _device()
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )
    return device


def _device() -> torch.device:
    """Return the device of this rank, and make it torch's current device."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Only tensor-parallel inference uses this extension, and it costs a minute of compilation at first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


_PATIENT = "patient"
_limit: datetime.timedelta | None = None  # timeout of the run's collectives


def limit_waits() -> None:
    """Give DeepSpeed's process groups the timeout of the run; their default is half an hour."""
    for group in dist.distributed_c10d._world.pg_map if _limit is not None else ():
        if group.group_desc != _PATIENT:
            dist.distributed_c10d._set_pg_timeout(_limit, group)


def timed_out(error: Exception) -> bool:
    """Return whether a collective timed out; torch has no exception type for it."""
    return isinstance(error, RuntimeError) and "timed out" in str(error).lower()


def lost(error: Exception) -> bool:
    """Return whether a collective found that another rank is gone; torch has no exception type for that either."""
    signs = (
        "connection closed by peer",
        "connection reset by peer",
        "remote process exited",
    )  # the last: NCCL
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def stop() -> None:
    """Leave the process group; otherwise some runs crash after their work is done."""
    stopping.disconnect()
    if dist.is_initialized():
        dist.destroy_process_group()


def precision(dtype: str) -> dict:
    """Return the settings of an engine that computes in `dtype` (fp32, bf16 or fp16)."""
    return {"bf16": {"enabled": dtype == "bf16"}, "fp16": {"enabled": dtype == "fp16"}}


def _merge(ours: dict, users: dict) -> dict:
    merged = dict(ours)
    for key, value in users.items():
        merged[key] = (
            _merge(merged[key], value)
            if isinstance(merged.get(key), dict) and isinstance(value, dict)
            else value
        )
    return merged


def teacher_settings(
    dtype: str, residency: str, further: dict, largest_layer: int, device: torch.device
) -> dict:
    """Return the DeepSpeed settings of a sharded teacher.

    further: the user's settings. largest_layer: parameter count of its largest layer. DeepSpeed's defaults would keep
    almost all of a model of BERT's size gathered; with these limits a rank holds its shard and one layer (tight) or two
    (overlap).
    """
    overlap = residency == "overlap" or (residency == "auto" and device.type == "cuda")
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 2 * largest_layer if overlap else 0,
        "stage3_prefetch_bucket_size": largest_layer if overlap else 0,
    }
    ours = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **precision(dtype)}
    return _merge(ours, further)


def student_settings(config: Config, world_size: int) -> dict:
    train = config.train
    ours = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.batch_size // (train.micro_batch_size * world_size),
        "gradient_clipping": train.clip,
        "zero_optimization": {"stage": config.student.zero_stage},
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,  # SGD and AdaGrad update each element separately
        **precision(train.dtype),
    }
    return _merge(ours, config.student.deepspeed)


def zero_section(settings: dict) -> DeepSpeedZeroConfig:
    """Return the ZeRO settings of an engine with DeepSpeed's defaults filled in."""
    return DeepSpeedZeroConfig(**settings["zero_optimization"])


def check_settings(config: Config, world_size: int) -> None:
    """Raise UserError for a `deepspeed:` section that DeepSpeed would refuse; no process group is needed."""
    _check_sections(student_settings(config, world_size), "student")
    place, given = "student.deepspeed", config.student.deepspeed
    zero = given.get("zero_optimization", {})
    if not zero.get("compute_grad_norm", True):
        place = f"{place}.zero_optimization.compute_grad_norm"
        raise UserError(place, "false", "true: otherwise a gradient that is not finite destroys the weights")
    if zero.get("elastic_checkpoint", False):
        raise UserError(
            f"{place}.zero_optimization.elastic_checkpoint",
            "true",
            "false: every checkpoint can be loaded on another number of ranks",
        )
    kinds = given.get("data_types", {})
    if config.train.dtype == "bf16" and config.student.zero_stage == 1 and kinds:
        raise UserError(
            f"{place}.data_types", f"{kinds} in bf16 at stage 1", "student.zero_stage=2, which accepts them"
        )
    if config.teacher is not None and config.teacher.zero_stage == 3:
        teacher = config.teacher
        made = teacher_settings(
            config.train.dtype, teacher.residency, teacher.deepspeed, 1, torch.device("cpu")
        )
        _check_sections(made, "teacher")


def _check_sections(settings: dict, model: str) -> None:
    for name, section in STRICT.items():
        place, given = f"{model}.deepspeed.{name}", settings.get(name, {})
        if not isinstance(given, dict):
            raise UserError(place, type(given).__name__, "a mapping")
        try:
            section(**given)
        except pydantic.ValidationError as error:
            raise _explain(section, error.errors()[0], place) from None
        except (AssertionError, TypeError) as error:  # an old key beside its new name, a number as a key
            raise UserError(place, str(error), "settings that DeepSpeed accepts") from None


def _explain(section: type[pydantic.BaseModel], error: dict, place: str) -> UserError:
    location = list(map(str, error["loc"]))
    if not location:  # the error concerns several keys: the input is the whole section
        return UserError(place, error["msg"], "settings that DeepSpeed accepts")
    dotted = ".".join([place, *location])
    if error["type"] != "extra_forbidden":
        return UserError(
            dotted, shown(dotted, error["input"])[:60], error["msg"].lower().removeprefix("input should be ")
        )
    for parent in location[:-1]:
        types = typing.get_args(section.model_fields[parent].annotation) or (
            section.model_fields[parent].annotation,
        )
        section = next(t for t in types if isinstance(t, type) and issubclass(t, pydantic.BaseModel))
    known = [field.alias or name for name, field in section.model_fields.items()]
    return UserError(dotted, "an unknown DeepSpeed key", "a known one" + nearest(location[-1], known))


@contextlib.contextmanager
def known_pickles():
    """Make every torch.load in the block accept only tensors, plain Python and PICKLED; no other code is run."""
    asked = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in asked}
    os.environ.update(asked)
    try:
        with torch.serialization.safe_globals(PICKLED):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def foreign(path: str) -> str | None:
    """Return why a file cannot be one that a run saves, None if it may be loaded; nothing in it is run."""
    try:
        with torch.serialization.safe_globals(PICKLED):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # many kinds are possible: the bytes may be anything
        return "is no file that torch.save writes"
    return f"would run {', '.join(sorted(names))}" if names else None


def load_same(engine, folder: str, tag: str) -> None:
    """Restore the whole engine from a checkpoint of the same number of ranks and the same ZeRO stage."""
    with known_pickles():
        engine.load_checkpoint(folder, tag=tag)


def read_shards(folder: str) -> Shards:
    with known_pickles():
        return Shards(folder)


def whole_weights(folder: str, tag: str) -> dict[str, torch.Tensor]:
    """Return a checkpoint's weights in float32, by name in the student's module; frozen ones are not rounded.

    The weights below a student's adapters are not included, since no checkpoint holds them.
    """
    shards = read_shards(os.path.join(folder, tag))
    frozen = {}
    if os.path.exists(path := os.path.join(folder, tag, FROZEN)):
        frozen = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    weights = {name: shards.weight(name) for name in shards.names if name not in frozen} | frozen
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def load_reshaped(engine, folder: str) -> None:
    """Restore weights, optimizer and schedule from a checkpoint of another number of ranks or ZeRO stage.

    DeepSpeed's universal checkpoints need the same stage and Adam, and write everything again. Here each rank reads
    the shards as they are and keeps its own part. Values equal the saved ones to the last bit.
    """
    shards, optimizer = read_shards(folder), engine.optimizer
    sharded = engine.zero_optimization_stage() == 3
    _load_optimizer(optimizer, shards, sharded)
    if sharded:
        optimizer.checkpoint_event_prologue()  # shards the small parameters too, which are kept whole otherwise
    kept = set(shards.names)
    for name, parameter in engine.module.named_parameters():
        if name not in kept:  # frozen, and not saved: the engine was made with it
            continue
        whole = shards.weight(name)
        if sharded:
            _fill_partition(parameter, whole, shards, name)
            continue
        parameter.data.copy_(whole)
        if parameter.requires_grad:
            set_master(parameter, whole.float())
            for key in shards.moments:
                safe_set_full_optimizer_state(parameter, shards.moment(name, key), key)
    if sharded:
        optimizer.checkpoint_event_epilogue()
    for name, buffer in engine.module.named_buffers():
        if name in kept:
            buffer.copy_(shards.weight(name))
    if shards.loss_scaler is not None:
        optimizer.loss_scaler = shards.loss_scaler
    engine.lr_scheduler.load_state_dict(shards.common["lr_scheduler"])
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, shards.common[name])


def _load_optimizer(optimizer, shards: Shards, sharded: bool) -> None:
    """Restore rates and step counts; create the moments as zeros, as DeepSpeed would at the first step."""
    base = optimizer.optimizer
    if sharded:
        optimizer._set_fp32_optimizer_param_groups()  # DeepSpeed removes these groups after each use
    flat = [partition for group in base.param_groups for partition in group["params"]]
    state = base.state_dict()
    state["state"] = {
        index: {key: torch.zeros_like(partition) for key in shards.moments} | copy.deepcopy(shards.counts)
        for index, partition in enumerate(flat)
    }
    for group, saved in zip(state["param_groups"], shards.settings, strict=True):
        group.update(saved)
    base.load_state_dict(state)
    if sharded:
        optimizer._clear_fp32_optimizer_param_groups()
    else:
        optimizer._lazy_init_hp_params_optimizer_state()  # links the parameters to their moments


def _fill_partition(parameter: nn.Parameter, whole: torch.Tensor, shards: Shards, name: str) -> None:
    """Set this rank's part of a parameter that ZeRO-3 shards, with its master and moments."""
    parameter.ds_tensor.data.copy_(own_part(parameter, whole))
    if parameter.requires_grad:
        set_master(parameter, whole)
        for key in shards.moments:
            safe_set_local_optimizer_state(parameter, own_part(parameter, shards.moment(name, key)), key)


def set_master(parameter: nn.Parameter, whole: torch.Tensor) -> None:
    """Set this rank's part of a parameter's float32 master weights, in any ZeRO stage."""
    if hasattr(parameter, "ds_id"):
        safe_set_local_fp32_param(parameter, own_part(parameter, whole))
    else:
        safe_set_full_fp32_param(parameter, whole)


def own_part(parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of the value of a parameter that ZeRO-3 shards, padded at its end."""
    size = parameter.ds_tensor.numel()
    part = whole.flatten()[dist.get_rank() * size : (dist.get_rank() + 1) * size]
    return nn.functional.pad(part, (0, size - len(part)))


@contextlib.contextmanager
def quiet():
    """Suppress the library's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
