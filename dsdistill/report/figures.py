"""Make what the page's script needs to draw charts: a figure for each, and their points."""

from collections.abc import Sequence
from typing import Any

from dsdistill.report.curves import SIDE_BY_SIDE, Chart, points_each
from dsdistill.report.markup import Html, data, section, tag


def charts_section(
    title: str, charts: Sequence[Chart], marks: Sequence[dict[str, Any]], *notes: object
) -> list[Html]:
    """Return the section of a page that shows charts, and the data that its script reads; a page has one of these.

    marks: {x: step, kind: bad, spike or stage, text}, drawn as lines.
    """
    if not charts:
        return []
    figures = tag("div", *map(_figure, charts), class_="charts")
    sized = zip(charts, points_each(charts), strict=True)
    plain = {"charts": {chart.name: chart.plain(most) for chart, most in sized}, "marks": list(marks)}
    return [section(title, *notes, figures, name="curves"), data("data", plain)]


def _figure(chart: Chart) -> Html:
    unit = tag("span", chart.unit, class_="unit") if chart.unit else None
    left_out = sum(map(bool, chart.curves)) - len(chart.drawn)
    more = (
        f"{left_out} more curves are not drawn" if len(chart.drawn) == SIDE_BY_SIDE and left_out > 0 else None
    )
    box = tag("label", Html('<input type="checkbox"> log scale'))
    return tag(
        "figure",
        tag("figcaption", chart.title, unit, box),
        tag("div", class_="legend"),
        tag("div", class_="plot"),
        tag("p", more, class_="note") if more else None,
        id=chart.name,
    )
