"""Find the settings of a config that differ from their defaults."""

from typing import Any

from dsdistill.config.schema import EMBEDDING, Config
from dsdistill.config.section import Section
from dsdistill.config.terms import Terms


def changed(config: Config) -> dict[str, Any]:
    """Return the settings that differ from their defaults, as plain Python; `load` makes an equal config of them.

    A section that is absent by default is kept even if all its settings are defaults: `task: {}`.
    """
    kept = _changed(config)
    if config.task == EMBEDDING:  # this task has another default: texts have no label
        data = {name: value for name, value in kept.get("data", {}).items() if name != "label"}
        data |= {} if config.data.label is None else {"label": config.data.label}
        kept["data"] = data
    base = config.terms if "terms" in kept else Terms()  # the terms that a stage changes
    if config.stages:
        kept["stages"] = [
            _changed(stage) | ({"terms": terms} if (terms := _terms(stage.terms, base)) else {})
            for stage in config.stages
        ]
    return kept


def _changed(section: Section, base: Section | None = None) -> dict[str, Any]:
    """Return the settings that differ from `base`; without one, from the defaults of the section's class."""
    plain, kept = section.model_dump(mode="json"), {}
    for name, field in type(section).model_fields.items():
        own = getattr(section, name)
        usual = field.get_default(call_default_factory=True) if base is None else getattr(base, name)
        if own != usual:
            kept[name] = _plain(own, plain[name])
    return kept


def _plain(value: Any, dumped: Any) -> Any:
    if isinstance(value, Section):
        return _changed(value)
    if isinstance(value, tuple) and value and isinstance(value[0], Section):
        return [_changed(part) for part in value]
    return dumped


def _terms(terms: Terms, base: Terms) -> dict[str, Any]:
    """Return what a stage changes in the run's terms: settings of a term, an added term, or null for a removed one."""
    kept: dict[str, Any] = {}
    for name in type(terms).model_fields:
        own, usual = getattr(terms, name), getattr(base, name)
        if own != usual:
            both = isinstance(own, Section) and isinstance(usual, Section)
            kept[name] = None if own is None else _changed(own, usual if both else None)
    return kept
