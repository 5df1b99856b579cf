"""Estimate a run's host memory and disk space on a node, and a rank's memory while models are read.

With T values of the teacher in t bytes each, S values of the student in e bytes each, on W ranks:

  a whole teacher     1.1 · t · T and its largest tensor while it is read; then t · T on the device
  a sharded teacher   1.25 · t · T / W and its largest tensor while it is read; then t · T / W on the device
  a cut student       1.3 · S in the dtype of the teacher's files, on the first rank only; no teacher is built for it
  a student           4 · S at most (float32, the optimizer's first values; half if its files have train.dtype);
                      under ZeRO-3 4 · S / W, sharded while it is read
  offload             optimizer: 16 · S / W (values, two moments and gradients in float32); parameters: t · T / W,
                      e · S / W; pinned memory is rounded up to a power of two, as torch's allocator does
  an unfinished save  the largest part that a rank writes; with run.save_async a copy of all that a node's ranks write,
                      while training goes on

The factors were measured on CPUs with a teacher of 600 M values in bf16, and are assumed for GPUs too.
"""

import math
from collections import Counter
from dataclasses import dataclass

from dsdistill.config import Config
from dsdistill.config.bounded import GIB
from dsdistill.config.schema import LANGUAGE
from dsdistill.distributed import deepspeed
from dsdistill.engine.teacher import teacher_dtype
from dsdistill.planner.sizes import Size
from dsdistill.planner.zero_memory import STATES, Settings

TEACHER, CUT = "teacher, weights", "student, being cut"
PROCESSES, UNROUNDED = "processes", "student, in float32"
OFFLOADED, GRADIENTS, SAVING = "optimizer, offloaded", "gradients, offloaded", "a save"
OFFLOADED_WEIGHTS = "student, offloaded weights"
TRAINING, READING_TEACHER, READING_STUDENT = "training", "reading the teacher", "making the student"

# Bytes of a process: Python and its libraries, 0.6 GiB as measured; what CUDA adds is a guess.
PROCESS = {False: int(0.6 * GIB), True: 3 * GIB}
WHOLE_PEAK, SHARDED_PEAK, CUT_PEAK = 1.1, 1.25, 1.3


@dataclass(frozen=True)
class Parts:
    """Parts holds how many values the models have, and how many of them train."""

    teacher: Size | None
    student: Size
    trained: int


def offload(section) -> tuple[bool, bool]:
    """Return whether an offload section of DeepSpeed uses host memory, and whether that memory is pinned."""
    there = section is not None and section.device == "cpu"
    return there, there and bool(section.pin_memory)


def loading(config: Config, parts: Parts, world_size: int, *, gpu: bool) -> Counter[str]:
    """Return the bytes on a rank's device by owner while the teacher is read; a CPU rank's device is the host."""
    if parts.teacher is None:
        return Counter()
    width, whole = deepspeed.DTYPES[teacher_dtype(config)].itemsize, config.teacher.zero_stage == 0
    kept = width * parts.teacher.total / (1 if whole else world_size)
    if gpu and whole:
        return Counter({TEACHER: int(kept)})
    factor = WHOLE_PEAK if whole else SHARDED_PEAK
    return Counter({TEACHER: int(factor * kept) + width * parts.teacher.largest})


def node_memory(
    config: Config,
    parts: Parts,
    zero: Settings,
    peak: int,
    ranks: int,
    *,
    gpu: bool,
) -> dict[str, Counter[str]]:
    """Return bytes of a node's host memory by owner, for each moment of the run.

    zero: settings of the student's engine. peak: bytes of a rank in a step, which on CPUs is host memory. ranks: those
    of the node. Training data and the system's file cache are not counted.
    """
    world = zero.world_size
    base = Counter({PROCESSES: ranks * PROCESS[gpu]})
    steady: Counter[str] = Counter()
    if config.teacher is not None:
        settings = deepspeed.zero_section({"zero_optimization": _zero(config.teacher.deepspeed)})
        there, pinned = offload(settings.offload_param)
        t = deepspeed.DTYPES[teacher_dtype(config)].itemsize
        share = t * parts.teacher.total / (world if config.teacher.zero_stage == 3 else 1)
        if there or not gpu:
            steady[TEACHER] = ranks * _rounded(share, pinned)
    moments = {}
    if parts.teacher is not None:
        held = loading(config, parts, world, gpu=False)
        if gpu and not steady and config.teacher.zero_stage == 3:  # shards are on the devices
            held = Counter({TEACHER: int(held[TEACHER] - share)})
        moments[READING_TEACHER] = base + Counter({name: ranks * size for name, size in held.items()})
    sharded = zero.stage == 3
    made = Counter({UNROUNDED: int(ranks * 4 * parts.student.total / (world if sharded else 1))})
    if config.student.from_teacher is not None:
        made = max(
            made, Counter({CUT: int(CUT_PEAK * _stored(config) * parts.student.total)}), key=Counter.total
        )
    elif _drawn(config):
        made = max(made, Counter({UNROUNDED: 4 * parts.student.total}), key=Counter.total)
    moments[READING_STUDENT] = base + steady + made
    training = base + steady
    if gpu:
        training += _offloaded(config, parts, zero, ranks)
    else:
        training = base + Counter({"a step": ranks * peak})
    moments[TRAINING] = training
    held = _copied(parts, zero, ranks) if config.run.save_async else _saving(parts, zero, ranks)
    moments["saving"] = training + Counter({SAVING: int(held)})
    return moments


def _zero(settings: dict) -> dict:
    return settings.get("zero_optimization") or {}


def _offloaded(config: Config, parts: Parts, zero: Settings, ranks: int) -> Counter[str]:
    section = deepspeed.zero_section(
        {"zero_optimization": {"stage": zero.stage, **_zero(config.student.deepspeed)}}
    )
    held: Counter[str] = Counter()
    share = parts.trained / zero.world_size
    there, pinned = offload(section.offload_optimizer)
    if there:
        held[OFFLOADED] = ranks * sum(_rounded(4 * share, pinned) for _ in range(1 + STATES[zero.optimizer]))
        held[GRADIENTS] = ranks * _rounded(4 * share, pinned)
    there, pinned = offload(section.offload_param)
    if there:
        held[OFFLOADED_WEIGHTS] = ranks * _rounded(zero.width * parts.student.total / zero.world_size, pinned)
    return held


def _rounded(size: float, pinned: bool) -> int:
    return 1 << max(0, math.ceil(size) - 1).bit_length() if pinned else int(size)


def _saving(parts: Parts, zero: Settings, ranks: int) -> float:
    """Return the bytes of a node that a save takes: a copy of the part that each of its ranks is writing."""
    return ranks * 4 * parts.trained / zero.world_size


def _copied(parts: Parts, zero: Settings, ranks: int) -> float:
    """Return bytes of a node's copy of a checkpoint: its ranks' parts, and the weights, which rank 0 writes."""
    shared = 4 * (1 + STATES[zero.optimizer]) * parts.trained / zero.world_size
    return ranks * shared + zero.width * (_fixed(parts) + (0 if zero.stage == 3 else parts.trained))


def _stored(config: Config) -> int:
    """Return the assumed bytes per value in the teacher's files, which a plan does not read.

    2 (half precision) for a language model with a path; 4 (float32) for other tasks and without a path.
    """
    return 2 if config.teacher.path is not None and config.task in LANGUAGE else 4


def disk_space(config: Config, parts: Parts, zero: Settings) -> dict[str, int]:
    """Return bytes of the run's folder: by what is written, and `at most`, with one checkpoint more than are kept.

    A checkpoint has the weights in train.dtype (except under ZeRO-3, where the optimizer's suffice), and the
    optimizer's values and moments in float32; `export` writes train.dtype too.
    """
    weights = zero.width * (_fixed(parts) + (0 if zero.stage == 3 else parts.trained))
    one = weights + 4 * (1 + STATES[zero.optimizer]) * parts.trained
    first = 0
    if config.student.from_teacher is not None:
        first = _stored(config) * parts.student.total
    elif _drawn(config):
        first = 4 * parts.student.total
    exported = zero.width * parts.student.total
    return {
        "a checkpoint": one,
        "first weights": first,
        "an export": exported,
        "at most": (config.run.keep + 1) * one + first + exported,
    }


def _drawn(config: Config) -> bool:
    """Return whether rank 0 draws the whole student and writes it, because ZeRO-3 shards it or it has adapters."""
    section = config.student
    if section.path is not None:
        return False
    return section.lora is not None or (section.zero_stage == 3 and section.domain is None)


def _fixed(parts: Parts) -> int:
    """Return how many values of the student do not train but are in checkpoints, unlike those below adapters."""
    return max(0, parts.student.total - parts.student.below - parts.trained)
