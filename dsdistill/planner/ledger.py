"""Who holds how many bytes while a step runs that only pretends to compute.

Under FakeTensorMode every operation makes tensors with shapes but without contents, so that a model of any size runs
on any machine. What is alive at each moment is then known exactly, whatever the architecture: autograd, checkpointing
and the terms keep what they would keep.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# One for all rehearsals, so that what one has made, such as a teacher, serves the next.
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


class Ledger(TorchDispatchMode):
    """Counts the bytes of all living tensors that were made inside it, by owner.

    shape: (B, N) of the batch. Where only contents could tell a number, the largest is taken: every element of a mask
    counts, every token lies in a span, and the most spans of a sequence are its tokens.

    held: bytes by owner, now; peaks: the same at each phase's highest moment.
    """

    def __init__(self, shape: tuple[int, int]):
        super().__init__()
        self.held: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self.fake = FAKE
        self._shape = shape
        self._owner, self._phase = "", ""
        self._highest = 0
        self._storages: dict[int, list] = {}  # by address: owner and bytes
        self._references: dict[int, weakref.ref] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator["Ledger"]:
        with self.fake, self:
            yield self

    def enter(self, phase: str, owner: str) -> None:
        """From here on what is made belongs to `owner`, and the highest moment goes to peaks[phase]."""
        self._phase, self._owner, self._highest = phase, owner, 0
        self._look()

    def add(self, owner: str, size: float) -> None:
        """Bytes of what is not simulated, or less of them where `size` is negative."""
        self.held[owner] += int(size)
        self._look()

    def give(self, tensors: Iterable[Tensor], owner: str) -> None:
        """These tensors, made earlier, belong to `owner`."""
        for tensor in tensors:
            entry = self._storages.get(address(tensor))
            if entry is not None:
                self.held[entry[0]] -= entry[1]
                entry[0] = owner
                self.held[owner] += entry[1]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = self._asks_contents(function, args)
        if result is None:
            result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (place := address(leaf)) not in self._storages:
                # A view of what was there before the ledger, such as a weight, is nothing new.
                given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
                if all(address(x) != place for x in given):
                    self._note(leaf.untyped_storage(), place)
        return result

    def _asks_contents(self, function, args):
        """The answer to an operation whose result depends on contents: the largest there can be."""
        if function is aten.nonzero.default:
            return _everywhere(args[0])
        if function is aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool or self._shape[1]
        if function is aten.bincount.default:
            return args[0].new_empty(args[2] if len(args) > 2 else self._shape[0])
        if function is aten.repeat_interleave.Tensor:
            return args[0].new_empty(self._shape[0] * self._shape[1])
        if function is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1]):
            indices = []
            for index in args[1]:
                boolean = index is not None and index.dtype == torch.bool
                indices += _everywhere(index).unbind(1) if boolean else [index]
            return function(args[0], indices)
        return None

    def _note(self, storage: torch.UntypedStorage, place: int) -> None:
        size = storage.nbytes()
        self._storages[place] = [self._owner, size]
        self._references[place] = weakref.ref(storage, lambda _: self._forget(place))
        self.held[self._owner] += size
        self._look()

    def _forget(self, place: int) -> None:
        owner, size = self._storages.pop(place)
        del self._references[place]
        self.held[owner] -= size

    def _look(self) -> None:
        if self._phase and (total := self.held.total()) > self._highest:
            self._highest = total
            self.peaks[self._phase] = Counter({name: size for name, size in self.held.items() if size})


def _everywhere(mask: Tensor) -> Tensor:
    """Indices of all elements, as nonzero() would give those that are not 0."""
    return mask.new_empty(mask.numel(), mask.dim(), dtype=torch.int64)


def address(tensor: Tensor) -> int:
    """Return what tells a tensor's storage from others, as long as it lives."""
    return tensor.untyped_storage()._cdata
