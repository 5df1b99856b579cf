"""Count the bytes of each owner (weights, activations, …) while a step runs on tensors without contents.

Under FakeTensorMode every operation makes tensors with shapes but without contents, so that a model of any size runs
on any machine. For any architecture it is then known exactly which tensors are alive at each moment, since autograd,
checkpointing and the terms keep what they would keep in a real step.
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
# All rehearsals share one mode, so that tensors of one, such as a teacher's, can be used in the next.
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


class Ledger(TorchDispatchMode):
    """A Ledger counts the bytes of all living tensors that were made inside it, by owner.

    shape: (B, N) of the batch. If a size depends on contents, the largest possible one is taken: every element of a
    mask counts, every token is in a span, and a sequence has at most as many spans as tokens.

    held: bytes by owner at this moment; peaks: bytes by owner at each phase's highest moment.
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
        """Begin a phase: new tensors belong to `owner`, and the highest moment is kept in peaks[phase]."""
        self._phase, self._owner, self._highest = phase, owner, 0
        self._look()

    def add(self, owner: str, size: float) -> None:
        """Add bytes of something that is not simulated; a negative `size` removes them."""
        self.held[owner] += int(size)
        self._look()

    def give(self, tensors: Iterable[Tensor], owner: str) -> None:
        """Move tensors that were made earlier to another owner."""
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
                # A view of a tensor from before the ledger, such as a weight, takes no new memory.
                given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
                if all(address(x) != place for x in given):
                    self._note(leaf.untyped_storage(), place)
        return result

    def _asks_contents(self, function, args):
        """Return the largest possible result of an operation whose result depends on contents; None for others."""
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
    """Return indices of all elements, in the form of nonzero()."""
    return mask.new_empty(mask.numel(), mask.dim(), dtype=torch.int64)


def address(tensor: Tensor) -> int:
    """Return an id of a tensor's storage that is unique while the storage lives."""
    return tensor.untyped_storage()._cdata
