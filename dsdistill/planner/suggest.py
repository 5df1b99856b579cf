"""Propose settings that fit, as overrides for the command line: `dsdistill plan CONFIG --suggest`."""

import itertools
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dsdistill.config import Config, UserError
from dsdistill.config.bounded import GIB
from dsdistill.config.checks import check_ranks
from dsdistill.planner import zero_memory
from dsdistill.planner.plan import RESERVE, Forecast, peak

log = logging.getLogger("dsdistill")

OFFLOAD = "student.deepspeed.zero_optimization.offload_optimizer={device: cpu, pin_memory: true}"


@dataclass(frozen=True)
class Proposal:
    """A Proposal is a set of overrides, with the bytes that it needs on a rank, reserve included, and on a host.

    host: None if what a rank always holds is already too much; `needs` then counts only that.
    """

    overrides: tuple[str, ...]
    needs: int
    host: int | None
    fits: bool


def suggest(
    make: Callable[[Sequence[str]], Config],
    world_size: int,
    memory: int,
    *,
    gpu: bool,
    ranks: int,
    host_memory: int | None = None,
) -> list[Proposal]:
    """Return the proposals that were tried, in order; the last one fits, if any does.

    make: returns the config under some overrides. memory: bytes of a rank; ranks: those of a node; host_memory: bytes
    of a node.

    The order is: the optimizer on the device before in host memory, activations kept before checkpointing, a whole
    teacher on each rank before a sharded one, and the student's ZeRO stages from 1 to 3, since lower ones send less.
    The first that fits gets the largest micro-batch that fits and divides the batch evenly. Settings are not rehearsed
    if what a rank always holds is already too much.
    """
    reserve, refused = RESERVE if gpu else 0, None
    room = memory - reserve
    tried = []
    for overrides in _settings(make(()), world_size):
        try:
            config = make((*overrides, "train.micro_batch_size=1"))
            sizes = _sizes(config, world_size)
            forecast = Forecast(make((*overrides, f"train.micro_batch_size={sizes[0]}")), world_size, gpu=gpu)
        except UserError as error:  # such as an optimizer that cannot be offloaded
            log.info("some settings are not proposed: %s", error)
            refused = error
            continue
        least, node = _least(forecast), peak(forecast.node(ranks, 0))
        if least > room:
            tried.append(Proposal(overrides, least + reserve, None, False))
            continue
        if host_memory is not None and node > host_memory:
            tried.append(Proposal(overrides, least + reserve, node, False))
            continue
        need, node = _need(forecast, sizes[0], ranks)
        fits = need <= room and (host_memory is None or node <= host_memory)
        if not fits:
            tried.append(Proposal(overrides, need + reserve, node, False))
            continue
        size, need, node = _largest(forecast, sizes, room, ranks, host_memory, need, node)
        tried.append(Proposal((f"train.micro_batch_size={size}", *overrides), need + reserve, node, True))
        break
    if not tried and refused is not None:
        raise refused
    return tried


def _sizes(config: Config, world_size: int) -> list[int]:
    """Return the sizes of micro-batches that divide the batch evenly and that the terms and the sampler accept.

    Raises UserError if there is none.
    """
    found, refused = [], None
    for size in range(1, config.train.batch_size // world_size + 1):
        train = config.train.model_copy(update={"micro_batch_size": size})
        try:
            check_ranks(train, config.run_stages, config.data.sampler, world_size)
        except UserError as error:
            refused = refused or error
        else:
            found.append(size)
    if not found:
        raise refused or UserError("train.batch_size", config.train.batch_size, f"at least {world_size}")
    return found


def _settings(config: Config, world_size: int) -> Iterator[tuple[str, ...]]:
    whole = config.teacher is not None and not config.teacher.deepspeed and config.teacher.residency == "auto"
    teachers = (None,) if config.teacher is None else ("0", "3") if whole else ("3",)
    stages = (1, 2, 3)
    if world_size == 1:  # one rank cannot shard anything
        teachers, stages = teachers[:1], stages[:1]
    for offload, again, teacher, stage in itertools.product((False, True), (False, True), teachers, stages):
        found = [f"student.zero_stage={stage}", f"student.gradient_checkpointing={str(again).lower()}"]
        if teacher is not None:
            found.insert(0, f"teacher.zero_stage={teacher}")
        if offload:
            found.append(OFFLOAD)
        yield tuple(found)


def _least(forecast: Forecast) -> int:
    """Return the bytes that a rank always holds, without those of a step."""
    zero, parts, config = forecast.rank.zero, forecast.parts, forecast.config
    held = zero.width * parts.student.total / (zero.world_size if zero.stage == 3 else 1)
    if config.student.deepspeed.get("zero_optimization", {}).get("offload_param"):
        held = 0.0
    if not zero.offloaded:
        held += 4 * (1 + zero_memory.STATES[zero.optimizer]) * parts.trained / zero.world_size
    if parts.teacher is not None and not forecast.rank.teacher_offloaded:
        of = 1 if config.teacher.zero_stage == 0 else zero.world_size
        held += forecast.rank.teacher_dtype.itemsize * parts.teacher.total / of
    return int(held)


def _need(forecast: Forecast, size: int, ranks: int) -> tuple[int, int]:
    """Return the bytes of a rank and of a node's host with micro-batches of `size`."""
    need = max(map(peak, forecast.stages(size).values()))
    return need, peak(forecast.node(ranks, need))


def _largest(
    forecast: Forecast,
    sizes: Sequence[int],
    room: int,
    ranks: int,
    host_memory: int | None,
    need: int,
    node: int,
) -> tuple[int, int, int]:
    """Return the largest micro-batch of `sizes` that fits, and its `_need`; need, node: those of the smallest."""
    least, *larger = sizes
    best = least, need, node
    if not larger:
        return best
    second = _need(forecast, larger[0], ranks)
    rise = max(1.0, (second[0] - need) / (larger[0] - least))
    for size in reversed(larger):
        if size > larger[0] and need + rise * (size - least) > 1.05 * room:
            continue  # memory grows almost linearly
        found = second if size == larger[0] else _need(forecast, size, ranks)
        if found[0] <= room and (host_memory is None or found[1] <= host_memory):
            return size, *found
    return best


def proposals(tried: Sequence[Proposal], memory: int) -> str:
    """Return the proposal as text: overrides to type after the config, and what those tried before would need."""
    if tried and tried[-1].fits:
        lines = [f"proposed: {_words(tried[-1])}", f"  {_needs(tried[-1], memory)}"]
    else:
        lines = [
            "proposed: nothing, as none of these fits; use more ranks, shorter sequences or smaller models"
        ]
    others = [one for one in tried if not one.fits]
    lines += [f"  not {_words(one)}: {_needs(one, memory)}" for one in others]
    return "\n".join(["", *lines]) + "\n"


def _words(one: Proposal) -> str:
    return " ".join(shlex.quote(word) for word in one.overrides)


def _needs(one: Proposal, memory: int) -> str:
    if one.host is None:
        return f"more than {one.needs / GIB:.2f} of {memory / GIB:.2f} GiB per rank"
    return f"{one.needs / GIB:.2f} of {memory / GIB:.2f} GiB per rank, {one.host / GIB:.2f} GiB of host memory per node"
