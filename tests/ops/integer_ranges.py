"""Bound every integer that a Triton kernel computes, from its intermediate code and the arguments of one launch."""

from __future__ import annotations

import re
from collections.abc import Mapping

Range = tuple[int, int]
RESULT = re.compile(r"^\s*%(\w+)(?:, %\w+)* = \"?([a-z_]+\.\w+)\b\"?(.*?)(?: loc\(.*)?$")
LOOP = re.compile(r"scf\.for %(\w+) = %(\w+) to %(\w+) step %(\w+)")
NAMES = re.compile(r"%(\w+)")
# Each takes the ranges of its operands and returns that of its result.
SAME = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.trans", "tt.reshape", "arith.extsi"}


def _corners(operation):
    def bounds(a: Range, b: Range) -> Range:
        values = [operation(x, y) for x in a for y in b]
        return min(values), max(values)

    return bounds


def _quotient(x: int, y: int) -> int:
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def _remainder(a: Range, b: Range) -> Range:
    largest = max(abs(b[0]), abs(b[1])) - 1
    return (0 if a[0] >= 0 else -largest), min(largest, max(a[1], 0)) if a[0] >= 0 else largest


ARITHMETIC = {
    "arith.addi": _corners(lambda x, y: x + y),
    "arith.subi": _corners(lambda x, y: x - y),
    "arith.muli": _corners(lambda x, y: x * y),
    "arith.divsi": _corners(_quotient),
    "arith.remsi": _remainder,
    "arith.minsi": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "arith.maxsi": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
}
GROWING = ("arith.addi", "arith.subi", "arith.muli")  # all others stay within the bounds of their operands


def bits(line: str) -> int:
    """Return the width of the integers that a line computes; 0 where it computes none."""
    kind = re.search(r": (?:tensor<[\dx]*)?i(\d+)>?\s*(?:loc\(.*)?$", line)
    return int(kind[1]) if kind else 0


def overflows(code: str, arguments: Mapping[str, object], programs: int) -> list[str]:
    """Return the lines whose result may leave its type, or whose operands have no bound.

    code: Triton's own intermediate code ("ttir") of one kernel. arguments: of the launch, by name.
    """
    known: dict[str, Range] = {k: (v, v) for k, v in arguments.items() if type(v) is int}
    found = []
    for line in code.splitlines():
        loop = LOOP.search(line)
        if loop:
            first, last = known.get(loop[2]), known.get(loop[3])
            if first and last:  # the bounds of an empty loop do not matter
                known[loop[1]] = (first[0], max(first[0], last[1] - 1))
            continue
        result = RESULT.match(line)
        if not result:
            continue
        name, operation, rest = result.groups()
        operands = [known.get(operand) for operand in NAMES.findall(rest)]
        bounds = None
        if operation == "arith.constant":
            value = re.search(r"(?:dense<)?(-?\d+)>? : (?:tensor<[\dx]*)?i\d", rest)
            bounds = (int(value[1]), int(value[1])) if value else None
        elif operation == "tt.get_program_id":
            bounds = (0, programs - 1)
        elif operation == "tt.make_range":
            end, start = re.search(r"end = (\d+)", rest), re.search(r"start = (\d+)", rest)
            bounds = (int(start[1]), int(end[1]) - 1)
        elif operation in SAME or operation == "tt.reduce":
            bounds = operands[0]  # a minimum or maximum: integers are reduced in no other way here
        elif operation == "tt.load" and "ptr<i32>" in line:
            bounds = (-1 - arguments["N"], arguments["N"])  # a value of triton_schedule.reach, or a label
        elif operation == "arith.extui" and "i1" in line:
            bounds = (0, 1)
        elif operation == "arith.select" and operands[1] and operands[2]:
            bounds = min(operands[1][0], operands[2][0]), max(operands[1][1], operands[2][1])
        elif operation in ARITHMETIC and bits(line) > 1:
            if operands[0] is None or operands[1] is None:
                if operation in GROWING:
                    found.append(f"no bound: {line.strip()}")
                continue
            bounds = ARITHMETIC[operation](operands[0], operands[1])
            limit = 1 << (bits(line) - 1)
            if not -limit <= bounds[0] <= bounds[1] < limit:
                found.append(f"{bounds}: {line.strip()}")
        if bounds is not None:
            known[name] = bounds
    return found
