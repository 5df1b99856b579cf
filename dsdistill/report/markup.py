"""Make HTML in which only our own tags are markup: every text is escaped when it is added."""

import html
import json
from collections.abc import Iterable, Sequence

LONGEST = 500  # most characters of a text


class Html(str):
    """Html is text that is markup already; any other text is escaped before it joins a page."""

    __slots__ = ()


def tag(name: str, *children: object, **attributes: object) -> Html:
    """Return an element; `class_` becomes `class`, `data_x` becomes `data-x`; None leaves out a child or attribute."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>{joined(children)}</{name}>")


def joined(children: Iterable[object]) -> Html:
    """Return all children joined; those that are not markup are escaped."""
    return Html(
        "".join(
            child if isinstance(child, Html) else html.escape(str(child))
            for child in children
            if child is not None
        )
    )


def cut(text: object) -> object:
    """Return a text's first LONGEST characters; markup is returned unchanged."""
    if isinstance(text, Html) or len(told := str(text)) <= LONGEST:
        return text
    return f"{told[:LONGEST]}…"


def section(title: str, *children: object, name: str) -> Html:
    """Return a part of the page with its heading; `name` is its id."""
    return tag("section", tag("h2", title), *children, id=name)


def grid(head: Sequence[object], rows: Iterable[Sequence[object]], kind: str = "") -> Html:
    """Return a table that scrolls by itself if it is wider than the page; each row's first cell is its name.

    kind: scores (numbers), parts (a column for each model) or texts, which a narrow screen shows below each other.
    """
    made = [
        tag(
            "tr",
            tag("th", cut(row[0]), scope="row"),
            *(tag("td", cut(cell), data_head=cut(of)) for of, cell in zip(head[1:], row[1:], strict=True)),
        )
        for row in rows
    ]
    top = tag("thead", tag("tr", *(tag("th", cut(cell), scope="col") for cell in head)))
    return tag("div", tag("table", top, tag("tbody", *made), class_=kind or None), class_="wide")


def data(name: str, content: object) -> Html:
    """Return JSON for the page's script to read; it contains nothing that an HTML parser could take for a tag."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json" id="{html.escape(name)}">{text}</script>')
