"""Count the instructions that the main loops of a compiled GPU kernel issue, from the output of cuobjdump -sass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
TARGET = re.compile(r"0x([0-9a-f]+)")
# Shapes of products. One warp's: m16n8k16, m16n8k8 and m16n8k4. A warp group's (four warps): 64 × columns × depth.
WARP = {"HMMA.16816": (16, 8, 16), "HMMA.1688": (16, 8, 8), "HMMA.1684": (16, 8, 4)}
GROUP = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")


@dataclass
class Count:
    """A Count holds numbers of instructions of one warp.

    These are all instructions, special functions (exp2, log2, 1/x, …), only exp2, loads, and accesses to the stack.
    products: multiply-adds on tensor cores times 2, by (instruction, operand type), such as ("HGMMA", "TF32").
    """

    all: int = 0
    special: int = 0
    exp2: int = 0
    loads: int = 0
    stack: int = 0
    tensor: int = 0
    products: dict[tuple[str, str], float] = field(default_factory=dict)

    def add(self, name: str) -> None:
        self.all += 1
        self.special += name.startswith("MUFU")
        self.exp2 += name.startswith("MUFU.EX2")
        self.loads += name.startswith(("LDG", "UTMALDG", "UBLKCP"))
        self.stack += name.startswith(("LDL", "STL"))
        work = flops(name)
        if work:
            key = (name.split(".")[0], "TF32" if "TF32" in name else "half")
            self.tensor += 1
            self.products[key] = self.products.get(key, 0.0) + work

    @property
    def flops(self) -> float:
        return sum(self.products.values())


def flops(name: str) -> float:
    """Return the floating-point operations of one warp's tensor-core instruction; 0 for every other instruction."""
    group = GROUP.match(name)
    if group:
        rows, columns, depth = map(int, group.groups())
        return 2 * rows * columns * depth / 4
    rows, columns, depth = WARP.get(".".join(name.split(".")[:2]), (0, 0, 0))
    return 2 * rows * columns * depth


def instructions(listing: str) -> list[tuple[int, str, str]]:
    """Return (address, name, operands) of each instruction of one kernel."""
    return [(int(address, 16), name, rest) for address, name, rest in LINE.findall(listing)]


def loops(code: Sequence[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """Return the first and last address of each innermost loop: a backward branch ends it."""
    found = []
    for address, name, rest in code:
        target = TARGET.search(rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            found.append((int(target[1], 16), address))
    return [
        (first, last)
        for first, last in found
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in found)
    ]


def count(listing: str) -> tuple[Count, list[Count]]:
    """Return the counts outside the main loops, and those of each main loop.

    A main loop is an innermost loop with products on tensor cores; in a kernel without such products, one with loads.
    Other loops count as outside, once.
    """
    code = instructions(listing)
    inner = [(first, last, Count()) for first, last in loops(code)]
    outside = Count()
    for address, name, _ in code:
        for first, last, loop in inner:
            if first <= address <= last:
                loop.add(name)
    products = any(flops(name) for _, name, _ in code)
    main = [given for given in inner if (given[2].tensor if products else given[2].loads)]
    for address, name, _ in code:
        if name != "NOP" and not any(first <= address <= last for first, last, _ in main):
            outside.add(name)
    return outside, [loop for _, _, loop in main]
