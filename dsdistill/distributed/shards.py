"""Read a DeepSpeed checkpoint by the names of parameters, whatever number of ranks and ZeRO stage wrote it.

Nothing is converted or written: files are mapped into memory, and a tensor is put together from its pieces when it
is asked for. Stages 1 and 2 cut a parameter group's flat vector into one partition per rank, and each rank notes where
in its partition each parameter is; stage 3 cuts every parameter separately, padded at its end.

DeepSpeed saves pickles, which can run code when they are loaded: use this inside deepspeed.known_pickles().
"""

import re
from collections.abc import Iterator
from math import ceil
from pathlib import Path

import torch
from torch import Tensor


class Shards:
    """Shards reads the files of one checkpoint folder, one of each kind per rank."""

    def __init__(self, folder: str):
        self._optimizers = [
            file["optimizer_state_dict"] for file in _load(folder, "*zero_pp_rank_*_optim_states.pt")
        ]
        self._models = _load(folder, "*_model_states.pt")
        first = self._optimizers[0]
        self.stage, self.ranks = int(first["zero_stage"]), len(self._optimizers)
        self._key, self._base = (
            ("fp32_flat_groups", "optimizer_state_dict")
            if self.stage == 3
            else ("single_partition_of_fp32_groups", "base_optimizer_state")
        )
        self._shapes: dict[str, torch.Size] = {}
        self._places: dict[
            str, tuple[int, int]
        ] = {}  # for each trained parameter at stage 3: group, start on a rank
        for group, shapes in enumerate(self.common["param_shapes"]):
            start = 0
            for name, shape in shapes.items():
                self._shapes[name], self._places[name] = shape, (group, start)
                start += ceil(shape.numel() / self.ranks)

    @property
    def common(self) -> dict:
        """Return what is the same in every rank's file, such as schedule and step counts."""
        return self._models[0]

    @property
    def loss_scaler(self):
        """Return the loss scaler of fp16; for other dtypes None, or one that does nothing."""
        return self._optimizers[0].get("loss_scaler")

    @property
    def settings(self) -> list[dict]:
        """Return the settings of each parameter group: rate, decay and the like."""
        groups = self._optimizers[0][self._base]["param_groups"]
        return [{key: value for key, value in group.items() if key != "params"} for group in groups]

    @property
    def names(self) -> Iterator[str]:
        """Return the names of all parameters and buffers; tied ones have several."""
        return iter(self.common["module"])

    @property
    def moments(self) -> tuple[str, ...]:
        """Return the names of what the optimizer keeps for every element, such as exp_avg."""
        return tuple(key for key, value in self._state().items() if self._is_moment(value))

    @property
    def counts(self) -> dict:
        """Return what the optimizer keeps once, such as its number of steps."""
        return {key: value for key, value in self._state().items() if not self._is_moment(value)}

    def trained(self, name: str) -> bool:
        return name in self._shapes

    def weight(self, name: str) -> Tensor:
        """Return a whole parameter or buffer; in float32 if it is trained, else in the dtype of the forward pass."""
        name = self.common["shared_params"].get(name, name)
        if self.trained(name):
            return self._whole(name, lambda rank, group: rank[self._key][group])
        frozen = self.common["frozen_param_shapes"] or {}
        if self.stage == 3 and name in frozen:
            pieces = torch.cat([model["frozen_param_fragments"][name].flatten() for model in self._models])
            return pieces[: frozen[name].numel()].view(frozen[name])
        return self.common["module"][name]

    def moment(self, name: str, key: str) -> Tensor:
        """Return one of `moments` of a trained parameter, whole."""
        return self._whole(name, lambda rank, group: rank[self._base]["state"][group][key])

    def _whole(self, name: str, flat) -> Tensor:
        shape = self._shapes[name]
        pieces = [
            flat(self._optimizers[rank], group).narrow(0, start, length)
            for rank, group, start, length in self._pieces(name)
        ]
        return torch.cat(pieces).view(shape)

    def _pieces(self, name: str) -> Iterator[tuple[int, int, int, int]]:
        """Yield rank, parameter group, start and length of each piece, in order."""
        for rank, optimizer in enumerate(self._optimizers):
            if self.stage == 3:
                (group, start), size = self._places[name], self._shapes[name].numel()
                whole = ceil(size / self.ranks)
                length = min(whole, size - rank * whole)
                if length > 0:
                    yield rank, group, start, length
                continue
            for group, places in enumerate(optimizer["param_slice_mappings"]):
                if name in places:
                    yield rank, group, places[name].start, places[name].numel

    def _state(self) -> dict:
        """Return the optimizer's state of the first parameter group; empty before the first step."""
        return self._optimizers[0][self._base]["state"].get(0, {})

    def _is_moment(self, value) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0


def _load(folder: str, pattern: str) -> list[dict]:
    """Load the files that match a pattern, in the order of the ranks."""
    paths = sorted(
        Path(folder).glob(pattern),
        key=lambda path: [int(number) for number in re.findall(r"rank_(\d+)", path.name)],
    )
    return [torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in paths]
