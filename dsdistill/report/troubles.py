"""List the steps of a run that were skipped because something was not finite, or whose loss jumped."""

from typing import Any

from dsdistill.report.markup import Html, grid, section, tag
from dsdistill.report.run_files import BAD, SPIKES, RunFiles, listed, number

LISTED, NAMED, LONGEST = 50, 5, 100  # most steps, examples of each, and characters of their names


def troubles_of(files: RunFiles) -> list[dict[str, Any]]:
    """Return the steps that were not finite or whose loss jumped, each once, in order."""
    found: dict[tuple[float, str], dict[str, Any]] = {}
    for name, kind in ((BAD, "bad"), (SPIKES, "spike")):
        for record in files.lines(name):
            step = number(record.get("step"))
            if step is None:
                continue
            if kind == "bad":
                broken = listed(record.get("in"))
                text = f"not finite, in {', '.join(map(str, broken)) or 'an unknown term'}"
            else:
                loss, mean = number(record.get("loss")), number(record.get("average"))
                text = (
                    "loss jumped" if loss is None or mean is None else f"loss {loss:.4g}, average {mean:.4g}"
                )
            told = {"text": text, "examples": listed(record.get("examples"))}
            found[step, kind] = {"x": step, "kind": kind, **told}
    return [found[key] for key in sorted(found)]


def trouble_table(troubles: list[dict[str, Any]]) -> Html | None:
    """Return the first of these steps as a table, None if there are none."""
    if not troubles:
        return None
    rows = []
    for mark in troubles[:LISTED]:
        names = [str(name)[:LONGEST] for name in mark["examples"][:NAMED]]
        more = len(mark["examples"]) - len(names)
        kind = tag("span", {"bad": "skipped", "spike": "jump"}[mark["kind"]], class_=mark["kind"])
        rows.append(
            [
                f"{mark['x']:,.0f}",
                kind,
                mark["text"],
                ", ".join(names) + (f" and {more} more" if more else ""),
            ]
        )
    left = len(troubles) - len(rows)
    note = tag("p", f"{left:,} more are in {BAD} and {SPIKES}.", class_="note") if left else None
    return section(
        "Skipped steps and jumps of the loss",
        grid(["step", "", "reason", "examples"], rows, "texts"),
        note,
        name="troubles",
    )
