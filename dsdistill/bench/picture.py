"""Draw the README's picture from committed figures: memory of a step against sequence length, for light and dark pages.

python -m dsdistill.bench.picture          # writes memory-light.svg and memory-dark.svg beside the figures

The lines are measured by `dsdistill bench step` with soft labels, hidden states and attention together: ours, the same
losses from whole attention maps, and TextBrewer. The SVG is written without a library, so that every version makes the
same file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from dsdistill import disk

FOLDER = Path(__file__).parent / "results" / "step"
FIGURES = FOLDER / "6-to-3.json"
ARMS = {"attention": "dsdistill", "textbrewer": "TextBrewer", "eager": "eager PyTorch"}
WIDTH, HEIGHT = 780, 330
LEFT, RIGHT, TOP, BOTTOM = 60, 590, 70, 280  # of the axes
FONT = "font-family=\"-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\""


class Theme(NamedTuple):
    """A Theme holds the colours of a page: text, secondary text, grid lines, and a colour for each arm."""

    text: str
    muted: str
    grid: str
    arms: dict[str, str]


THEMES = {
    "light": Theme(
        "#1f2328", "#59636e", "#d1d9e0", {"attention": "#0969da", "textbrewer": "#8250df", "eager": "#bc4c00"}
    ),
    "dark": Theme(
        "#f0f6fc", "#9198a1", "#3d444d", {"attention": "#4493f8", "textbrewer": "#ab7df8", "eager": "#db6d28"}
    ),
}


def curves(report: dict) -> dict[str, list[tuple[int, float]]]:
    """Return (tokens, MiB) by arm, sorted by tokens, with every layer of the student mapped."""
    rows = [row for row in report["rows"] if row["mapped"] == report["sizes"]["student"]]
    return {
        arm: sorted((row["tokens"], row["memory_mib"]) for row in rows if row["arm"] == arm) for arm in ARMS
    }


def draw(report: dict, theme: Theme) -> str:
    """Return the picture as SVG on a transparent background; x is logarithmic, y begins at 0.

    report: output of `dsdistill bench step --json`.
    """
    found = curves(report)
    tokens = [n for n, _ in found["attention"]]
    top = 250 * math.ceil(max(mib for curve in found.values() for _, mib in curve) / 250)
    low, span = math.log2(tokens[0]), math.log2(tokens[-1] / tokens[0])

    def place(n: float, mib: float) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * (math.log2(n) - low) / span
        return round(x, 1), round(BOTTOM - (BOTTOM - TOP) * mib / top, 1)

    def text(x: float, y: float, words: str, colour: str, size: int = 13, **attributes: str) -> str:
        more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
        return f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}"{more}>{words}</text>'

    sizes = report["sizes"]
    about = f"{sizes['teacher']} → {sizes['student']} layers, {sizes['step']:,} tokens a step, CPU, {report['dtype']}"
    title = "Memory of a step that distils outputs, hidden states and attention"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" {FONT}>',
        f"<title>{title}</title>",
        text(LEFT, 24, title, theme.text, 16, font_weight="600"),
        text(LEFT, 46, f"peak MiB over weights and gradients; {about}", theme.muted),
    ]
    for mib in range(0, top + 1, 250):
        y = place(tokens[0], mib)[1]
        parts.append(f'<path d="M{LEFT} {y}H{RIGHT}" stroke="{theme.grid}"/>')
        parts.append(text(LEFT - 8, y + 4, f"{mib:,}", theme.muted, text_anchor="end"))
    for n in tokens:
        parts.append(text(place(n, 0)[0], BOTTOM + 20, str(n), theme.muted, text_anchor="middle"))
    middle = (LEFT + RIGHT) / 2
    parts.append(text(middle, BOTTOM + 42, "tokens of a sequence", theme.muted, text_anchor="middle"))
    for arm, curve in found.items():
        colour, ours = theme.arms[arm], arm == "attention"
        points = [place(*point) for point in curve]
        line = "L".join(f"{x} {y}" for x, y in points)
        parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="{4 if ours else 2}"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="{5 if ours else 3.5}" fill="{colour}"/>' for x, y in points]
        (x, y), mib = points[-1], curve[-1][1]
        weight = "700" if ours else "400"
        parts.append(text(x + 12, y + 5, f"{ARMS[arm]}, {mib:.0f} MiB", colour, 14, font_weight=weight))
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Write both pictures."""
    report = json.loads(FIGURES.read_text(encoding="utf-8"))
    for name, theme in THEMES.items():
        path = FOLDER / f"memory-{name}.svg"
        with disk.writing(path) as file:
            file.write(draw(report, theme))
        print(path)


if __name__ == "__main__":
    main()
