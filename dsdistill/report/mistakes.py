"""Show what the student gets wrong of a classification, where the teacher is right."""

import heapq
from typing import Any

from dsdistill.report.markup import Html, cut, grid, section, tag
from dsdistill.report.run_files import PREDICTIONS, RunFiles, listed, number, part

EXAMPLES = 200  # dev examples that are shown


def mistakes(files: RunFiles) -> Html | None:
    """Return the dev examples that the student gets wrong and the teacher right, the surest mistakes first."""
    if not files.has(PREDICTIONS):
        return None
    total = wrong = taught = 0
    judged, kept = False, list[tuple[float, int, dict[str, Any]]]()
    for place, record in enumerate(files.lines(PREDICTIONS)):
        label, student, teacher = (record.get(key) for key in ("label", "student", "teacher"))
        total += 1
        wrong += student != label
        judged |= teacher is not None
        if student != label and teacher == label:
            taught += 1
            sure = number(part(record, "probability", "student")) or 0.0
            heapq.heappush(kept, (sure, -place, record))
            if len(kept) > EXAMPLES:
                heapq.heappop(kept)
    if not judged:
        told = f"The student is wrong on {wrong:,} of {total:,} dev examples; no teacher was there to compare with."
        return section("Mistakes", tag("p", told), name="examples")
    told = f"Of {total:,} dev examples the student gets {wrong:,} wrong; on {taught:,} of these the teacher is right."
    if taught > len(kept):
        told += f" The {len(kept)} of which the student is surest:"
    rows = [_example(record) for *_, record in sorted(kept, key=lambda entry: entry[:2], reverse=True)]
    head = ["id", "text", "label", "student", "teacher"]
    return section(
        "Where the teacher is right and the student wrong",
        tag("p", told),
        grid(head, rows, "texts") if rows else None,
        name="examples",
    )


def _example(record: dict[str, Any]) -> list[object]:
    body = [tag("div", cut(text)) for text in listed(record.get("texts"))[:2]]
    named = " ".join(str(cut(record[key])) for key in ("set", "id") if record.get(key) is not None)
    guesses = []
    for model in ("student", "teacher"):
        sure = number(part(record, "probability", model))
        guesses.append(str(cut(record.get(model))) + (f" ({sure:.2f})" if sure is not None else ""))
    return [named, tag("div", *body), record.get("label"), *guesses]
