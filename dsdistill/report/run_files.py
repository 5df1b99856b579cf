"""Read the files of a run folder as far as possible: runs are killed, and folders may come from elsewhere."""

import json
import math
import os
from collections.abc import Iterator
from typing import Any

import yaml

from dsdistill.config import dump, load_saved
from dsdistill.config.bounded import open_file, read_json, read_yaml
from dsdistill.config.errors import UserError
from dsdistill.config.secrets import redacted

CONFIG, METRICS, SUMMARY, BASELINE = "config.yaml", "metrics.jsonl", "summary.json", "baseline"
BAD, SPIKES, PREDICTIONS = "bad_steps.jsonl", "spikes.jsonl", "predictions.jsonl"
_LOG_BYTES, _LINE_BYTES, _JSON_BYTES = 2**36, 2**24, 2**24


class RunFiles:
    """RunFiles reads one run folder; what cannot be read is left out and listed in `problems`."""

    def __init__(self, path: str):
        self.path = path
        self.problems: list[str] = []

    def has(self, name: str) -> bool:
        """Return whether the folder has such a file."""
        return os.path.isfile(os.path.join(self.path, name))

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the JSON objects of a file with one per line; other lines are counted; the file may be missing."""
        place, bad = os.path.join(self.path, name), 0
        if not os.path.lexists(place):
            return
        try:
            with open_file(place, _LOG_BYTES, "the longest log that is read") as file:
                while line := file.readline(_LINE_BYTES):
                    if line.isspace():
                        continue
                    try:
                        record = json.loads(line.decode("utf-8"))
                    except (ValueError, RecursionError):
                        record = None
                    if isinstance(record, dict):
                        yield record
                    else:
                        bad += 1
        except (OSError, UserError) as error:
            self.problems.append(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}")
        if bad:
            self.problems.append(f"{name}: {bad:,} line{'s' * (bad > 1)} cannot be read")

    def object(self, name: str) -> dict[str, Any]:
        """Return the JSON object of a file, {} if there is none."""
        place = os.path.join(self.path, name)
        if not os.path.lexists(place):
            return {}
        try:
            return read_json(place, _JSON_BYTES)
        except UserError:
            self.problems.append(f"{name} cannot be read")
            return {}

    def settings(self) -> dict[str, Any]:
        """Return the settings in config.yaml, unchecked and without secrets, {} if it cannot be read."""
        place = os.path.join(self.path, CONFIG)
        if not os.path.lexists(place):
            return {}
        try:
            settings = yaml.safe_load(read_yaml(place))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            settings = None
        if not isinstance(settings, dict):
            self.problems.append(f"{CONFIG} cannot be read")
            return {}
        return redacted(settings)

    def changed(self, settings: dict[str, Any]) -> tuple[str, bool]:
        """Return as YAML the settings that differ from their defaults, and True; or all of them, and False.

        All are returned if the config names plugins, since a run's code is not run just to show it, or if this version
        cannot read the config.
        """
        if not settings:
            return "", True
        if not settings.get("plugins"):
            try:
                return dump(load_saved(os.path.join(self.path, CONFIG)), full=False), True
            except UserError as error:
                self.problems.append(str(error))
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), False

    def checkpoint(self) -> dict[str, Any]:
        """Return the state of the newest checkpoint, {} if there is none; no tensor is read."""
        home = "checkpoints"
        place = os.path.join(self.path, home)
        names = sorted(os.listdir(place), reverse=True) if os.path.isdir(place) else []
        for name in names:
            state = os.path.join(home, name, "state.json")
            if name.startswith("step-") and self.has(state):
                return self.object(state)
        return {}


def number(value: object) -> float | None:
    """Return a finite number as a float; None for anything else: logs may have NaN, words or nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def part(settings: object, *keys: str) -> Any:
    """Return the value at a path of keys in nested mappings, None if one of them lacks its key."""
    for key in keys:
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings


def mapping(value: object) -> dict[str, Any]:
    """Return a mapping as it is; for anything else return an empty one."""
    return value if isinstance(value, dict) else {}


def listed(value: object) -> list[Any]:
    """Return a list as it is; for anything else return an empty one."""
    return value if isinstance(value, list) else []


def scores_of(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return those scores of each model in a summary that are finite numbers."""
    found = {}
    for model, scores in mapping(summary.get("models")).items():
        values = {name: number(value) for name, value in mapping(scores).items()}
        found[model] = {name: value for name, value in values.items() if value is not None}
    return found
