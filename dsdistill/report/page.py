"""Put together the page of a run or of a comparison: one HTML file that needs no other file."""

import base64
import hashlib
import os
from collections.abc import Iterable
from importlib.resources import files as package_files

from dsdistill import __version__, disk
from dsdistill.config.errors import UserError
from dsdistill.report import comparison_page, run_page
from dsdistill.report.markup import Html, tag
from dsdistill.report.methods import is_run, runs_of

PAGE = "report.html"
_OWN = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="dsdistill'
)


def write_page(path: str) -> str:
    """Write the page of a run or of a comparison into its folder; return the file's path.

    Raises:
        UserError: the folder is neither, cannot be written, or holds a report.html that this project did not write.
        Unwritable: the disk is full.
    """
    if not os.path.isdir(path):
        raise UserError(path, "no such folder", "the folder of a run or of a comparison")
    target = os.path.join(path, PAGE)
    if os.path.lexists(target) and not _ours(target):
        raise UserError(target, "a file that dsdistill did not write", "no file of this name: rename it")
    disk.check_writable(path, path)
    if is_run(path):
        title, parts = run_page.content(path)
    elif runs := runs_of(path):
        title, parts = comparison_page.content(path, runs)
    else:
        wanted = "the folder of a run, or of a comparison (METHOD/seed-N)"
        raise UserError(path, "a folder without config.yaml, metrics.jsonl and summary.json", wanted)
    with disk.writing(target, binary=True) as file:
        file.write(page(title, parts).encode("utf-8", errors="replace"))  # a lone surrogate has no UTF-8
    return target


def _ours(target: str) -> bool:
    if os.path.islink(target) or not os.path.isfile(target):
        return False
    with open(target, encoding="utf-8", errors="replace") as file:
        return file.read(len(_OWN)) == _OWN


def page(title: str, parts: Iterable[Html]) -> str:
    """Return a whole page; its security policy allows only the page's own style and script, and loads nothing."""
    style, script = (_asset(name) for name in ("page.css", "page.js"))
    allowed = f"style-src {_hash(style)}; script-src {_hash(script)}"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    return (
        f'{_OWN} {__version__}"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">{tag("title", title)}'
        f"<style>{style}</style></head>\n<body>{tag('main', *parts)}"
        "<noscript><p>A script of this page draws the curves.</p></noscript>"
        f"<script>{script}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return package_files("dsdistill.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
