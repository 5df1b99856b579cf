"""Read the plan of a comparison: methods or the values of an axis, seeds, and the numbers that a paper prints."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dsdistill.config import UserError
from dsdistill.config.bounded import read_yaml
from dsdistill.report.study import TRENDS, Claim, Study

OURS = "ours"  # the only method of a plan that has an axis but no methods
SCALES = ("small", "node")
_KNOWN = ("title", "seeds", "scale", "methods", "axis", "metrics", "published", "claims", "left_out")
Cells = dict[str, list[str]]  # config files and overrides by name


def read_plan(path: str, scale: str = "small") -> tuple[list[int], Cells, Study]:
    """Return the seeds, the sources of each cell (one method, or one value of the axis), and the study.

    The file is YAML; sources are files and KEY=VALUE as for `train`, or {small: [...], node: [...]}:

        title: name of the paper's table or figure
        seeds: [0, 1, 2]
        scale: sources that come before those of every method
        methods: {NAME: sources}               # not needed if there is an axis
        axis: {KEY: [VALUE, ...]}              # a setting, or {TITLE: {VALUE: sources}}
        metrics: [SCORE, ...]                  # columns, in the paper's order; default: all
        published: {NAME or VALUE: [NUMBER or null, ...]}
        claims: [{metric: SCORE, order: [BEST, ...]}, or best: NAME, or trend: up | down | better | worse]
        left_out: {NAME: reason}

    Raises:
        UserError: the file cannot be read, or does not fit this form.
    """
    settings = _read(path)
    seeds = settings.get("seeds")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError(f"{path}: seeds", seeds, "a list of whole numbers")
    base = _sources(settings.get("scale", []), f"{path}: scale", scale, empty="methods" in settings)
    methods = settings.get("methods", {OURS: []} if "axis" in settings else None)
    if not isinstance(methods, dict) or not methods:
        raise UserError(f"{path}: methods", methods, "a mapping of names to lists of sources")
    absent: dict[str, str] = {}
    chosen = {
        name: [*base, *_sources(of, f"{path}: methods.{name}", scale, empty=bool(base))]
        for name, of in _there(methods, scale, absent).items()
    }
    cells, place = dict(chosen), {}
    if "axis" in settings:
        title, values = _axis(settings["axis"], path, scale, absent)
        alone = list(chosen) == [OURS]
        cells, place = {}, {"axis": title}
        of: list[tuple[Any, str]] = []
        for method, sources in chosen.items():
            for value, further in values.items():
                cells[f"{value}" if alone else f"{method}, {value}"] = [*sources, *further]
                of.append((value, "" if alone else method))
        place |= {"values": tuple(value for value, _ in of), "series": tuple(name for _, name in of)}
    folders = _folders(cells, path)
    study = Study(
        cells=tuple(cells),
        folders=folders,
        title=str(settings.get("title", "")),
        metrics=_texts(settings.get("metrics", []), f"{path}: metrics"),
        left_out={str(name): str(why) for name, why in _mapping(settings, "left_out", path).items()} | absent,
        **place,
    )
    return seeds, cells, _with_paper(study, settings, path, absent)


def folder(name: str) -> str:
    """Return the name of a cell's folder."""
    return re.sub(r"\W+", "-", name)


def _read(path: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(read_yaml(path))
    except UserError:
        raise
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(path, str(error).split("\n")[0], "a readable YAML file") from None
    if not isinstance(settings, dict):
        raise UserError(path, f"a {type(settings).__name__}", "a mapping with seeds and methods")
    if unknown := [key for key in settings if key not in _KNOWN]:
        raise UserError(path, unknown, f"only {', '.join(_KNOWN)}")
    if "seeds" not in settings or not {"methods", "axis"} & settings.keys():
        raise UserError(path, list(settings), "seeds and methods, or seeds and axis")
    return settings


def _sources(given: Any, place: str, scale: str, *, empty: bool = False) -> list[str]:
    """Return a list of files and overrides; if each scale has its own list, return that of `scale`."""
    if isinstance(given, dict) and given and set(given) <= set(SCALES):
        if scale not in given:
            raise UserError("--scale", f"{scale}, which {place} does not have", ", ".join(given))
        given = given[scale]
    if not isinstance(given, list) or not (given or empty) or not all(isinstance(s, str) for s in given):
        raise UserError(place, given, "a list of config files and key=value overrides")
    return given


def _there(given: Mapping[Any, Any], scale: str, absent: dict[str, str]) -> dict[str, Any]:
    """Return the entries of a mapping that exist at this scale; note the others in `absent`."""
    found = {}
    for name, sources in given.items():
        if isinstance(sources, dict) and sources and set(sources) <= set(SCALES) - {scale}:
            absent[str(name)] = f"only at scale {', '.join(sources)}"
        else:
            found[str(name)] = sources
    if not found:
        raise UserError("--scale", f"{scale}, for which the plan has nothing", ", ".join(SCALES))
    return found


def _axis(given: Any, path: str, scale: str, absent: dict[str, str]) -> tuple[str, dict[Any, list[str]]]:
    """Return the title of an axis and the sources of each value."""
    place = f"{path}: axis"
    if not isinstance(given, dict) or len(given) != 1:
        raise UserError(place, given, "one setting or one title, with its values")
    title, values = next(iter(given.items()))
    if isinstance(values, dict) and len(values) > 1:
        there = _there(values, scale, absent)
        return str(title), {
            value: _sources(there[str(value)], f"{place}.{value}", scale, empty=True)
            for value in values
            if str(value) in there
        }
    if isinstance(values, list) and len(values) > 1 and all(isinstance(v, str | int | float) for v in values):
        return str(title), {value: [f"{title}={value}"] for value in values}
    raise UserError(f"{place}.{title}", values, "two or more values, or a mapping of values to sources")


def _folders(cells: Cells, path: str) -> tuple[str, ...]:
    found: dict[str, str] = {}
    for name in cells:
        other = found.setdefault(folder(name), name)
        if other != name:
            raise UserError(
                f"{path}: methods", f"{other!r} and {name!r}", "names that differ in letters or digits"
            )
    return tuple(found)


def _with_paper(study: Study, settings: Mapping[str, Any], path: str, absent: Mapping[str, str]) -> Study:
    """Return the study with the published numbers and the claims, each checked against its cells."""
    published: dict[str, tuple[float | None, ...]] = {}
    for name, values in _mapping(settings, "published", path).items():
        if str(name) in absent:
            continue
        place = f"{path}: published.{name}"
        cell = _cell(name, study, place)
        if not isinstance(values, list) or len(values) != len(study.metrics):
            raise UserError(place, values, f"{len(study.metrics)} numbers or null, one for each of metrics")
        if not all(value is None or type(value) in (int, float) for value in values):
            raise UserError(place, values, "numbers or null")
        published[cell] = tuple(None if value is None else float(value) for value in values)
    given = settings.get("claims", [])
    if not isinstance(given, list):
        raise UserError(f"{path}: claims", type(given).__name__, "a list")
    claims = [_claim(of, study, f"{path}: claims.{index}", absent) for index, of in enumerate(given)]
    kept = tuple(claim for claim in claims if claim is not None)
    return Study(**{**vars(study), "published": published, "claims": kept})


def _claim(given: Any, study: Study, place: str, absent: Mapping[str, str]) -> Claim | None:
    """Return a claim without the methods that are absent at this scale; None if nothing is left to compare."""
    kinds = {"order", "best", "trend"}
    if not isinstance(given, dict) or "metric" not in given or len(kinds & given.keys()) != 1:
        raise UserError(place, given, "metric and one of order, best and trend")
    if unknown := given.keys() - kinds - {"metric"}:
        raise UserError(place, sorted(unknown), "metric and one of order, best and trend")
    score = str(given["metric"])
    if "trend" in given:
        if not study.axis or given["trend"] not in TRENDS:
            raise UserError(f"{place}.trend", given["trend"], f"{', '.join(TRENDS)}, in a plan with an axis")
        return Claim(score, trend=given["trend"])
    if "best" in given:
        if str(given["best"]) in absent:
            return None
        return Claim(score, best=_cell(given["best"], study, f"{place}.best"))
    order = given["order"]
    if not isinstance(order, list) or len(order) < 2:
        raise UserError(f"{place}.order", order, "two or more methods, the best first")
    there = [_cell(name, study, f"{place}.order") for name in order if str(name) not in absent]
    return Claim(score, order=tuple(there)) if len(there) > 1 else None


def _cell(name: Any, study: Study, place: str) -> str:
    if str(name) not in study.cells:
        raise UserError(place, name, f"one of {', '.join(study.cells)}")
    return str(name)


def _mapping(settings: Mapping[str, Any], key: str, path: str) -> dict[Any, Any]:
    found = settings.get(key, {})
    if not isinstance(found, dict):
        raise UserError(f"{path}: {key}", type(found).__name__, "a mapping")
    return found


def _texts(given: Any, place: str) -> tuple[str, ...]:
    if (
        not isinstance(given, Sequence)
        or isinstance(given, str)
        or not all(isinstance(x, str) for x in given)
    ):
        raise UserError(place, given, "a list of scores' names")
    return tuple(given)
