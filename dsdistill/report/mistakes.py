"""Show where the student is wrong and the teacher right: classes, searches, or scores that are far off."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsdistill.report.markup import Html, cut, grid, section, tag
from dsdistill.report.run_files import PREDICTIONS, RunFiles, listed, number, part

EXAMPLES = 200  # most dev examples that are shown


def mistakes(files: RunFiles) -> Html | None:
    """Return the dev examples that the student gets wrong and the teacher right, the worst mistakes first."""
    if not files.has(PREDICTIONS):
        return None
    kind: _Kind = _CLASSES
    total = wrong = taught = 0
    judged, kept = False, list[tuple[float, int, dict[str, Any]]]()
    for place, record in enumerate(files.lines(PREDICTIONS)):
        kind = _SEARCH if "rank" in record else _VALUES if "value" in record else _CLASSES
        mistaken, right = kind.judge(record)
        total += 1
        wrong += mistaken
        judged |= right is not None
        if mistaken and right:
            taught += 1
            heapq.heappush(kept, (kind.badness(record), -place, record))
            if len(kept) > EXAMPLES:
                heapq.heappop(kept)
    if not judged and kind is _VALUES:
        return None  # errors of scores are only judged against the teacher's
    told = kind.wrong.format(total, wrong)
    if not judged:
        told += "; there is no teacher to compare with."
        return section("Mistakes", tag("p", told), name="examples")
    told += kind.taught.format(taught)
    if taught > len(kept):
        told += f" The {len(kept)} {kind.worst} are shown:"
    rows = [kind.row(record) for *_, record in sorted(kept, key=lambda entry: entry[:2], reverse=True)]
    table = grid(kind.head, rows, "texts") if rows else None
    return section(kind.title, tag("p", told), table, name="examples")


def _named(record: dict[str, Any]) -> str:
    return " ".join(str(cut(record[key])) for key in ("set", "id") if record.get(key) is not None)


def _body(record: dict[str, Any]) -> Html:
    return tag("div", *(tag("div", cut(text)) for text in listed(record.get("texts"))[:2]))


def _judge_class(record: dict[str, Any]) -> tuple[bool, bool | None]:
    label, student, teacher = (record.get(key) for key in ("label", "student", "teacher"))
    return student != label, None if teacher is None else teacher == label


def _class(record: dict[str, Any]) -> list[object]:
    guesses = []
    for model in ("student", "teacher"):
        sure = number(part(record, "probability", model))
        guesses.append(str(cut(record.get(model))) + (f" ({sure:.2f})" if sure is not None else ""))
    return [_named(record), _body(record), record.get("label"), *guesses]


def _rank(record: dict[str, Any], model: str) -> float | None:
    return number(part(record, "rank", model))


def _judge_search(record: dict[str, Any]) -> tuple[bool, bool | None]:
    student, teacher = _rank(record, "student"), _rank(record, "teacher")
    return student is not None and student > 1, None if teacher is None else teacher <= 1


def _search(record: dict[str, Any]) -> list[object]:
    query, document = (*listed(record.get("texts")), "", "")[:2]
    first = part(record, "first", "student") or ""
    return [_named(record), query, document, f"{_rank(record, 'student'):,.0f}", first]


def _error(record: dict[str, Any], model: str) -> float | None:
    label, value = number(record.get("label")), number(part(record, "value", model))
    return None if label is None or value is None else abs(value - label)


def _judge_value(record: dict[str, Any]) -> tuple[bool, bool | None]:
    """Return whether the student's error is more than twice the teacher's; the teacher then counts as right."""
    student, teacher = _error(record, "student"), _error(record, "teacher")
    far = student is not None and teacher is not None and student > 2 * teacher
    return far, None if teacher is None else far


def _value(record: dict[str, Any]) -> list[object]:
    values = [record.get("label"), *(part(record, "value", model) for model in ("student", "teacher"))]
    return [_named(record), _body(record), *values]


@dataclass(frozen=True)
class _Kind:
    """A _Kind says how mistakes of one kind of output are found and shown."""

    judge: Callable[
        [dict[str, Any]], tuple[bool, bool | None]
    ]  # the student is wrong; the teacher right, if known
    badness: Callable[[dict[str, Any]], float]
    row: Callable[[dict[str, Any]], list[object]]
    head: tuple[str, ...]
    title: str
    wrong: str
    taught: str
    worst: str


_CLASSES = _Kind(
    _judge_class,
    lambda record: number(part(record, "probability", "student")) or 0.0,
    _class,
    ("id", "text", "label", "student", "teacher"),
    "Examples that the teacher gets right and the student wrong",
    "The student gets {1:,} of {0:,} dev examples wrong",
    "; on {:,} of these the teacher is right.",
    "in which the student is most confident",
)
_SEARCH = _Kind(
    _judge_search,
    lambda record: _rank(record, "student") or 0.0,
    _search,
    ("id", "query", "right document", "rank of the student", "document that the student ranks first"),
    "Queries whose document the teacher ranks first and the student does not",
    "For {1:,} of {0:,} queries the student does not rank the right document first",
    "; for {:,} of these the teacher does.",
    "whose document the student ranks lowest",
)
_VALUES = _Kind(
    _judge_value,
    lambda record: _error(record, "student") or 0.0,
    _value,
    ("id", "text", "label", "student", "teacher"),
    "Examples where the student's error is large",
    "On {1:,} of {0:,} dev examples the student's error is more than twice the teacher's",
    ".",
    "with the largest errors",
)
