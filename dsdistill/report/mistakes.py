"""Show what the student gets wrong of a classification, or does not find first, where the teacher is right."""

import heapq
from typing import Any

from dsdistill.report.markup import Html, cut, grid, section, tag
from dsdistill.report.run_files import PREDICTIONS, RunFiles, listed, number, part

EXAMPLES = 200  # dev examples that are shown


def mistakes(files: RunFiles) -> Html | None:
    """Return the dev examples that the student gets wrong and the teacher right, the worst mistakes first."""
    if not files.has(PREDICTIONS):
        return None
    total = wrong = taught = 0
    judged = searched = False
    kept = list[tuple[float, int, dict[str, Any]]]()
    for place, record in enumerate(files.lines(PREDICTIONS)):
        searched |= "rank" in record
        right = {model: _is_right(record, model) for model in ("student", "teacher")}
        total += 1
        wrong += right["student"] is False
        judged |= right["teacher"] is not None
        if right["student"] is False and right["teacher"]:
            taught += 1
            heapq.heappush(kept, (_badness(record), -place, record))
            if len(kept) > EXAMPLES:
                heapq.heappop(kept)
    what = (
        "queries the student does not find {:,} first"
        if searched
        else "dev examples the student gets {:,} wrong"
    )
    told = f"Of {total:,} {what.format(wrong)}"
    if not judged:
        told = f"{told}; no teacher was there to compare with."
        return section("Mistakes", tag("p", told), name="examples")
    told += (
        f"; {taught:,} of these the teacher finds."
        if searched
        else f"; on {taught:,} of these the teacher is right."
    )
    if taught > len(kept):
        told += f" The {len(kept)} that the student {'ranks lowest' if searched else 'is surest of'}:"
    records = [record for *_, record in sorted(kept, key=lambda entry: entry[:2], reverse=True)]
    if searched:
        head = ["id", "query", "its document", "rank of the student", "what the student puts first"]
        title, rows = (
            "Where the teacher finds the document first and the student does not",
            map(_search, records),
        )
    else:
        head = ["id", "text", "label", "student", "teacher"]
        title, rows = "Where the teacher is right and the student wrong", map(_example, records)
    table = grid(head, rows, "texts") if records else None
    return section(title, tag("p", told), table, name="examples")


def _is_right(record: dict[str, Any], model: str) -> bool | None:
    """Return whether a model is right, or finds the document first; None where the record does not say."""
    if "rank" in record:
        rank = number(part(record, "rank", model))
        return None if rank is None else rank <= 1
    return record.get(model) == record.get("label") if model in record or model == "student" else None


def _badness(record: dict[str, Any]) -> float:
    """Return how sure the student is of its class, or how low it ranks the document."""
    keys = ("rank", "student") if "rank" in record else ("probability", "student")
    return number(part(record, *keys)) or 0.0


def _named(record: dict[str, Any]) -> str:
    return " ".join(str(cut(record[key])) for key in ("set", "id") if record.get(key) is not None)


def _search(record: dict[str, Any]) -> list[object]:
    query, document = (*listed(record.get("texts")), "", "")[:2]
    rank = number(part(record, "rank", "student"))
    return [_named(record), query, document, f"{rank:,.0f}", part(record, "first", "student") or ""]


def _example(record: dict[str, Any]) -> list[object]:
    body = [tag("div", cut(text)) for text in listed(record.get("texts"))[:2]]
    guesses = []
    for model in ("student", "teacher"):
        sure = number(part(record, "probability", model))
        guesses.append(str(cut(record.get(model))) + (f" ({sure:.2f})" if sure is not None else ""))
    return [_named(record), tag("div", *body), record.get("label"), *guesses]
