"""Read the built-in pairs of texts: the first paragraph of a docstring is the query, the rest of it is its document.

As in data/docstrings.py, the texts come from installed packages, whose names are masked, and need no network. No module
has texts in both `train` and `dev`. The split `unseen` has the texts of packages that no other split has.
"""

import gc
import re
from pathlib import Path

from dsdistill.config.errors import UserError
from dsdistill.data import docstrings
from dsdistill.data.cache import rows as cache_rows
from dsdistill.data.docstrings import MARKUP, MASK, NAMES, PACKAGES, digest, docstrings_in, key, modules_of
from dsdistill.data.table import Table

SPLITS = ("train", "dev", "unseen")
COLUMNS = ("query", "document")
UNSEEN = ("networkx", "scipy")  # packages of the split `unseen`
PER_PACKAGE, PER_MODULE = 1000, 60  # most pairs of one package, and of one module
DEV_PERCENT = 12  # percentage of the modules that are in the dev split
QUERY = range(20, 201)  # characters
DOCUMENT = 80  # fewest characters
MOST = 1000  # characters of a document; what follows is cut off
_OTHER_NAMES = re.compile("scipy", re.IGNORECASE)  # names that NAMES lacks
_PARAGRAPHS = re.compile(r"\n[ \t]*\n")  # the text between two paragraphs
_RULES = re.compile(r"(^|\s)[-=~^#*.+|]{2,}(?=\s|$)")  # lines under headings and around tables


def table(split: str, cache: str) -> Table:
    """Return the pairs of one split: columns id ("module:name"), query and document.

    They are read from the cache folder; if it lacks them, they are collected (some seconds of parsing) and kept there.

    Raises:
        UserError: no such split, or a package is missing.
    """
    if split not in SPLITS:
        got = f"{split!r} with pairs of source docstrings"
        raise UserError("data.train and data.dev", got, ", ".join(SPLITS))
    name = f"docstring-pairs-{key([*PACKAGES, *UNSEEN], __file__)}.jsonl"
    kept = cache_rows(Path(cache, name).expanduser(), collect)
    rows = [row for row in kept if row["split"] == split]
    columns = {name: [row[name] for row in rows] for name in ("id", *COLUMNS)}
    return Table(f"docstring pairs {split}", columns, range(1, len(rows) + 1), "row")


def collect() -> list[dict[str, str]]:
    """Return all rows, {"split", "id", "query", "document"}, in an order that depends on the texts alone."""
    collecting = gc.isenabled()
    gc.disable()  # as docstrings.collect does
    try:
        return _collect()
    finally:
        if collecting:
            gc.enable()


def divided(docstring: str) -> tuple[str, str]:
    """Return the first paragraph of a docstring and the rest, each on one line and with package names masked."""
    first, _, rest = _PARAGRAPHS.sub("\n\n", docstring.strip()).partition("\n\n")
    return docstrings.clean(_OTHER_NAMES.sub(MASK, first)), _line(rest)


def _line(text: str) -> str:
    text = _OTHER_NAMES.sub(MASK, NAMES.sub(MASK, _RULES.sub(" ", MARKUP.sub("", text))))
    return " ".join(text.split())


def _collect() -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    seen: set[str] = set()  # letters of all queries and documents, so that no two splits have near copies
    for package in dict.fromkeys([*PACKAGES, *UNSEEN]):
        taken = 0
        for module, path in modules_of(package):
            if taken >= PER_PACKAGE:
                break
            if package in UNSEEN:
                split = "unseen"
            else:
                split = "dev" if int(digest(f"split {module}"), 16) % 100 < DEV_PERCENT else "train"
            most = min(taken + PER_MODULE, PER_PACKAGE)
            for name, docstring in docstrings_in(path):
                if taken >= most or not _PARAGRAPHS.search(docstring):  # most have only one paragraph
                    continue
                query, document = divided(docstring)
                letters = {re.sub("[^a-z]+", "", text.lower()) for text in (query, document)}
                if len(query) not in QUERY or len(document) < DOCUMENT or letters & seen:
                    continue
                seen |= letters
                taken += 1
                cut = document[:MOST].rstrip()
                rows.append({"split": split, "id": f"{module}:{name}", "query": query, "document": cut})
    return sorted(rows, key=lambda row: digest(row["query"]))
