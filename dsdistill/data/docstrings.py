"""Read the built-in data set: docstrings of installed packages, labelled with the package that they come from.

Every machine that runs dsdistill has these packages, so the data set needs no network and no download. Sources are
parsed and never imported. The names of the packages are masked in the texts, and no module has texts in both splits.
"""

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from dsdistill.config.errors import UserError
from dsdistill.data.cache import rows as cache_rows
from dsdistill.data.table import Table

# Classes: the standard library, and packages that our dependencies always bring.
PACKAGES = (
    "deepspeed",
    "huggingface_hub",
    "matplotlib",
    "networkx",
    "numpy",
    "pandas",
    "python",
    "sympy",
    "torch",
    "transformers",
)
PER_PACKAGE = 1500  # most texts of one class
PER_MODULE = 60  # most texts of one module, so that the dev split does not come from a few modules
DEV_PERCENT = 12  # percentage of the modules that are in the dev split
LENGTH = range(40, 401)  # characters

# Docstrings of tests and of vendored packages do not describe the package itself.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "_vendor"}

# Names that would reveal the label: full names as part of any word, aliases only as whole words (np.dot, ds_config).
NAMES = re.compile(
    "deep ?speed|hugging ?face|🤗|matplotlib|py(?:plot|lab)|networkx|numpy|pandas|python|sympy|(?:py)?torch"
    "|transformers"
    "|(?<![a-z0-9])(?:ds|hf|mpl|np|nx|pd|plt)(?![a-z0-9])",
    re.IGNORECASE,
)
MASK = "library"
# Markup such as :class:`Tensor` and underlined headings: a package's style would also reveal the label.
MARKUP = re.compile(r":[\w:+-]+:`~?|`|[-=~^#]{3,}")


def table(split: str, cache: str) -> Table:
    """Return the rows of one split: columns id ("module:name"), text, label.

    They are read from the cache folder; if it lacks them, they are collected (some seconds of parsing) and kept there.

    Raises:
        UserError: no such split, or a package is missing.
    """
    if split not in ("train", "dev"):
        raise UserError("data.train and data.dev", f"{split!r} with source docstrings", "train and dev")
    kept = cache_rows(Path(cache, f"docstrings-{key(PACKAGES)}.jsonl").expanduser(), collect)
    rows = [row for row in kept if row["split"] == split]
    columns = {name: [row[name] for row in rows] for name in ("id", "text", "label")}
    return Table(f"docstrings {split}", columns, range(1, len(rows) + 1), "row")


def collect() -> list[dict[str, str]]:
    """Return all rows, {"split", "id", "text", "label"}, in an order that depends on the texts alone."""
    collecting = gc.isenabled()
    gc.disable()  # syntax trees are large and have no cycles: garbage collection would double the time
    try:
        return _collect()
    finally:
        if collecting:
            gc.enable()


def _collect() -> list[dict[str, str]]:
    rows, seen = [], set()
    for package in PACKAGES:
        taken = 0
        for module, path in modules_of(package):
            if taken >= PER_PACKAGE:
                break
            # Modules are sorted by another hash. If both were the same, the first modules would all be in one split.
            split = "dev" if int(digest(f"split {module}"), 16) % 100 < DEV_PERCENT else "train"
            most = min(taken + PER_MODULE, PER_PACKAGE)
            for name, docstring in docstrings_in(path):
                text = clean(docstring)
                letters = re.sub("[^a-z]+", "", text.lower())  # so that the splits have no near copies
                if len(text) in LENGTH and letters not in seen and taken < most:
                    seen.add(letters)
                    taken += 1
                    rows.append({"split": split, "id": f"{module}:{name}", "text": text, "label": package})
    return sorted(rows, key=lambda row: digest(row["text"]))


def clean(docstring: str) -> str:
    """Return the first paragraph on one line, without markup and with package names masked."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    return " ".join(NAMES.sub(MASK, MARKUP.sub("", paragraph)).split())


def digest(text: str) -> str:
    """Return the SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


def modules_of(package: str) -> list[tuple[str, Path]]:
    """Return the names and files of a package's modules, sorted by the hash of their names."""
    root = _folder(package)
    modules = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                parts = [package, *path.relative_to(root).with_suffix("").parts]
                modules.append((".".join(parts).removesuffix(".__init__"), path))
    return sorted(modules, key=lambda module: digest(module[0]))


def _folder(package: str) -> Path:
    if package == "python":
        return Path(sysconfig.get_path("stdlib"))
    return Path(importlib.util.find_spec(package).submodule_search_locations[0])


def docstrings_in(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and docstring of the module, and of its classes, functions and methods."""
    try:
        stack = [("", ast.parse(path.read_bytes()))]
    except (SyntaxError, ValueError):  # templates and samples of broken code
        return
    while stack:
        name, node = stack.pop()
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield name, docstring
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            stack += [
                (f"{name}.{child.name}".lstrip("."), child)
                for child in node.body
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            ]


def key(packages: Sequence[str], *files: str) -> str:
    """Return a digest of the packages' versions, of these code files and of this file."""
    versions = [_version(package) for package in packages]
    code = [Path(file).read_text(encoding="utf-8") for file in (__file__, *files)]
    return digest(" ".join([*versions, *code]))[:16]


def _version(package: str) -> str:
    if package == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        got = f"docstrings, for which package {package} is missing"
        raise UserError("data.source", got, "an installation with all of dsdistill's dependencies") from error
