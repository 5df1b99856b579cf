"""Make a Config from files and key=value; every mistake is reported in one line that names file and key."""

import io
import os
import re
from collections.abc import Sequence
from typing import Any, cast

import pydantic
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsdistill.config.bounded import check_yaml, read_yaml
from dsdistill.config.changes import changed
from dsdistill.config.errors import UserError
from dsdistill.config.explain import explain
from dsdistill.config.formats import FORMAT, complete, take_format
from dsdistill.config.plugins import import_plugins
from dsdistill.config.schema import SAVED, Config
from dsdistill.config.secrets import REDACTED, is_secret, mentions, places, redacted, without

KEY_DEPTH = 32  # most levels of a dotted key
EXPANDED = 2**24  # most characters and values, with every interpolation expanded
_REFERENCE = re.compile(r"\$\{\s*([^${}:\s]+)\s*\}")
_KNOWN = re.compile(_REFERENCE.pattern + r"|\$\{\s*oc\.env:[^${}]*\}")
_INTERPOLATION = re.compile(r"(\\*)\$\{")  # with the backslashes before it, which OmegaConf halves


def load(sources: Sequence[str]) -> Config:
    """Merge files and overrides from left to right.

    sources: YAML files and key=value overrides, such as ["configs/quickstart.yaml", "train.steps=5"]. Each file adds to
    or replaces earlier settings. With `replace: [terms]` a file's terms replace those of earlier files instead of being
    added to them. Keys of overrides are dotted, with numbers from 0 for entries of lists; their values are YAML.
    """
    if not sources or _is_override(sources[0]):
        raise UserError(
            "config", sources[0] if sources else "nothing", "a YAML file first, then key=value overrides"
        )
    merged, origin = OmegaConf.create({}), sources[0]
    for source in sources:
        try:
            if _is_override(source):
                key, value = source.split("=", 1)
                check_yaml(value, _shown(source))
                if key.count(".") + key.count("[") > KEY_DEPTH:
                    raise UserError(
                        _shown(source), f"a key of more than {KEY_DEPTH} levels", "a key of the config"
                    )
                parsed = _container(OmegaConf.from_dotlist([f"value={value}"]))
                OmegaConf.update(merged, key, parsed["value"], merge=True)
            else:
                added = _read(source)
                for section in _replaced(source, added):
                    merged.pop(section, None)
                merged = cast(DictConfig, OmegaConf.merge(merged, added))  # since both are DictConfigs
        except UserError:
            raise
        except (
            OmegaConfBaseException,
            yaml.YAMLError,
            LookupError,
            TypeError,
            ValueError,
            RecursionError,
        ) as error:
            form = "key=value" if _is_override(source) else "valid YAML"
            raise UserError(
                _shown(source), _first_line(error), f"{form} that fits the settings before it"
            ) from None
    settings = _plain(merged, origin)
    if hidden := places(settings):
        wanted = "the value itself, such as ${oc.env:NAME} from the environment: run folders do not hold it"
        raise UserError(f"{origin}: {hidden[0]}", REDACTED, wanted)
    complete(settings, take_format(settings, origin))
    return make_config(settings, origin)


def recipe_of(config: Config) -> Config:
    """Return the config that trains the teacher; its data has this run's root unless it names its own."""
    assert config.teacher is not None and config.teacher.recipe is not None
    recipe = load([config.teacher.recipe])
    if config.data.root is None or recipe.data.root is not None or recipe.data.source == "docstrings":
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": config.data.root})})


def as_begun(config: Config, saved: str) -> Config:
    """Return the config of a resumed run, read by the rules of the format with which the run began.

    saved: the file that `dump` wrote when the run began. Settings that `config` does not set have the defaults of that
    format.
    """
    written = take_format(_plain(_read(saved), saved), saved, saved=True)
    if written == FORMAT:
        return config
    given = config.model_dump(mode="json", exclude_unset=True)
    complete(given, written)
    return make_config(given, saved)


def load_saved(path: str) -> Config:
    """Return the config that `dump` wrote for a run, without its secrets.

    Settings that an earlier format lacks get its defaults. Rules between fields are not checked again: a
    baseline, which has lost its terms, may break them. Raises UserError for a format newer than this version's.
    """
    settings = without(_plain(_read(path), path))
    complete(settings, take_format(settings, path, saved=True))
    return make_config(settings, path, saved=True)


def make_config(settings: dict[str, Any], origin: str = "config", *, saved: bool = False) -> Config:
    """Return a Config made from plain settings, after importing the plugins that they name.

    `origin` names the file in messages. saved: skip the rules between fields. Raises UserError for the first mistake.
    """
    import_plugins(settings.get("plugins"), origin)
    try:
        return Config.model_validate(settings, context=SAVED if saved else None)
    except UserError as error:  # from checks
        raise error.within(origin) from None
    except pydantic.ValidationError as error:
        raise explain(error.errors(), Config, origin) from None


class _Dumper(yaml.SafeDumper):
    """Quote texts that OmegaConf, unlike PyYAML, takes for numbers (12e4567), and U+0085, which would become a space.

    Interpolations are escaped.
    """


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    escaped = _INTERPOLATION.sub(lambda match: 2 * match[1] + "\\${", value)
    quote = '"' if "\x85" in escaped else "'" if escaped[:1] in tuple("+-.0123456789") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", escaped, style=quote)


_Dumper.add_representer(str, _text)


def holds_secrets(path: str) -> bool:
    """Return whether a config file has secrets in plain text, as earlier versions wrote them."""
    settings = _plain(_read(path), path)
    return repr(redacted(settings)) != repr(settings)


def dump(config: Config, *, full: bool = True) -> str:
    """Return the resolved config as YAML, its format first and its secrets redacted.

    If it has no secrets, `load` reads it back to an equal config. full: include settings at their defaults.
    """
    settings = {"format": FORMAT} | redacted(config.model_dump(mode="json") if full else changed(config))
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _container(settings: DictConfig, *, resolve: bool = False) -> dict[str, Any]:
    """Return settings as plain Python; resolve: replace interpolations by their values."""
    return cast(dict[str, Any], OmegaConf.to_container(settings, resolve=resolve))


def _plain(settings: DictConfig, origin: str) -> dict[str, Any]:
    try:
        _check_interpolations(_container(settings), origin)
        return _container(settings, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(origin, _first_line(error), "interpolations that resolve") from None


def _shown(source: str) -> str:
    """Return a file's name or an override as messages show it, without secrets."""
    key, equals, value = source.partition("=")
    if not equals or not _is_override(source):
        return source
    return f"{key}={REDACTED}" if is_secret(key, value) or mentions(value) else source


def _check_interpolations(settings: dict[str, Any], origin: str) -> None:
    """Raise UserError for interpolations that repeat each other and so expand beyond EXPANDED."""
    known: dict[tuple, int] = {}  # characters and values of each key's subtree, expanded

    def size(path: tuple) -> int:
        if path not in known:
            known[path] = 0  # OmegaConf refuses interpolations that lead back to themselves
            known[path] = written = measure(_at(settings, path), path)
            if written > EXPANDED:
                key = ".".join(map(str, path))
                raise UserError(
                    f"{origin}: {key}",
                    f"interpolations of {written:.1e} characters",
                    f"at most {EXPANDED:.1e}",
                )
        return known[path]

    def measure(value: object, path: tuple) -> int:
        if isinstance(value, dict | list):
            keys = value if isinstance(value, dict) else range(len(value))
            return 1 + sum(size((*path, key)) for key in keys)
        if not isinstance(value, str):
            return 1
        rest = _KNOWN.sub("", value)
        if any(len(match[1]) % 2 == 0 for match in _INTERPOLATION.finditer(rest)):
            key = ".".join(map(str, path))
            raise UserError(
                f"{origin}: {key}",
                "an unsupported interpolation",
                "${KEY}, ${oc.env:NAME}, or \\${ for the characters ${",
            )
        return len(value) + sum(size(_target(name, path)) for name in _REFERENCE.findall(value))

    size(())


def _target(name: str, path: tuple) -> tuple:
    """Return the path of keys that `${name}` at `path` refers to; leading dots are relative to its parents."""
    bare = name.lstrip(".")
    dots = len(name) - len(bare)
    keys = (int(key) if key.isdecimal() else key for key in re.split(r"[.\[\]]+", bare) if key)
    return (*path[: max(0, len(path) - dots)], *keys) if dots else tuple(keys)


def _at(settings: object, path: tuple) -> object:
    """Return the value at a path of keys, or None."""
    for key in path:
        if isinstance(settings, dict):
            settings = settings.get(key, settings.get(str(key)))
        elif isinstance(settings, list) and isinstance(key, int) and key < len(settings):
            settings = settings[key]
        else:
            return None
    return settings


def _is_override(source: str) -> bool:
    return "=" in source and not os.path.exists(source)


def _read(path: str) -> DictConfig:
    try:
        settings = OmegaConf.load(io.StringIO(read_yaml(path)))
    except UserError:
        raise
    except (OmegaConfBaseException, yaml.YAMLError, OSError, LookupError, TypeError, ValueError) as error:
        raise UserError(path, _first_line(error), "valid YAML") from None
    if not isinstance(settings, DictConfig):
        raise UserError(path, "a list or a single value", "a mapping of settings")
    return settings


def _replaced(source: str, settings: DictConfig) -> list[str]:
    """Take `replace` out of a file's settings: it names the sections that replace those of earlier files."""
    names = _container(OmegaConf.create({"of": settings.pop("replace", [])}))["of"]
    sections = list(Config.model_fields)  # a list, since names may not be hashable
    if not isinstance(names, list) or any(name not in sections for name in names):
        raise UserError(f"{source}: replace", names, f"a list of {', '.join(sections)}")
    return names


def _first_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or next(
        iter(str(error).strip().splitlines()), type(error).__name__
    )
    return f"{text} (line {mark.line + 1})" if mark else text
