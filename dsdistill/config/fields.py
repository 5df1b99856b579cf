"""Write the reference of all settings of a config from the schema: `python -m dsdistill.config.fields`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsdistill.config.schema import Config

FILE = Path(__file__).with_name("FIELDS.md")
HEAD = """# The settings of a config

<!-- Written by `python -m dsdistill.config.fields` from the schema; a test holds it current. -->

A config is a YAML file. Each table below describes one of its sections. On a command line the name of a setting is
written with dots, such as `train.steps=100`. An empty default means `null`; `needed` means that the setting must be
given. If settings contradict each other, the run is refused before a model loads, and one line says what was got and
what is expected.
"""
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_PLAIN = {
    "string": "text",
    "boolean": "true or false",
    "integer": "whole number",
    "number": "number",
    "null": "null",
    "object": "mapping",
}


def reference() -> str:
    """Return the reference in Markdown: each section's place, its description, and a table of its settings."""
    schema = Config.model_json_schema()
    known, parts = schema["$defs"], [HEAD]
    sections = list(_sections(schema, "", known, set()))
    places = {id(section): place for place, section in sections}
    for place, section in sections:
        title = f"## `{place}`" if place else "## The sections"
        about = _line(section.get("description", "")) if place else ""
        lines = ["| setting | value | default | meaning |", "|---|---|---|---|"]
        for name, of in section["properties"].items():
            default = "needed" if name in section.get("required", []) else _default(of)
            value, meaning = _kind(of), _line(of.get("description", ""))
            if inner := _reference(of):
                value, default = f"see `{places[id(known[inner])]}`", ""
                meaning = meaning or _line(known[inner].get("description", ""))
            cells = [f"`{name}`", value, default, meaning]
            lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
        parts.append("\n\n".join(filter(None, [title, about, "\n".join(lines)])) + "\n")
    return "\n".join(parts)


def _sections(
    section: dict[str, Any], place: str, known: dict[str, Any], seen: set[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place in a config, section), then the sections within it; each kind of section comes once."""
    yield place, section
    for name, of in section["properties"].items():
        for kind in _named(of):
            if kind not in seen:
                seen.add(kind)
                listed = ".N" if _reference(of) is None or "items" in of else ""
                yield from _sections(known[kind], f"{place}.{name}{listed}".lstrip("."), known, seen)


def _named(of: dict[str, Any]) -> list[str]:
    """Return the names of all sections that a setting may be or list."""
    kinds = [of, *of.get("anyOf", ()), *of.get("allOf", ())]
    kinds += [kind["items"] for kind in kinds if isinstance(kind.get("items"), dict)]
    return [kind["$ref"].rpartition("/")[2] for kind in kinds if "$ref" in kind]


def _reference(of: dict[str, Any]) -> str | None:
    """Return the name of the section that a setting is or lists; None for a value."""
    for kind in (of, *of.get("anyOf", ()), *of.get("allOf", ())):
        if "$ref" in kind:
            return kind["$ref"].rpartition("/")[2]
    items = of.get("items")
    return _reference(items) if isinstance(items, dict) and items else None


def _kind(of: dict[str, Any]) -> str:
    """Return a description of a setting's valid values."""
    if "anyOf" in of:
        kinds = [_kind(kind) for kind in of["anyOf"] if kind.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in of or "const" in of:
        return ", ".join(f"`{_yaml(value)}`" for value in of.get("enum", [of.get("const")]))
    if of.get("type") == "array":
        if "prefixItems" in of:
            return f"[{', '.join(map(_kind, of['prefixItems']))}]"
        return f"list of {_kind(of.get('items', {}))}"
    if "$ref" in of:
        return "mappings"
    limits = [f"{sign} {of[name]}" for name, sign in _LIMITS.items() if name in of]
    return " ".join([_PLAIN.get(of.get("type", ""), "value"), " and ".join(limits)]).strip()


def _default(of: dict[str, Any]) -> str:
    return "" if of.get("default") is None else f"`{_yaml(of['default'])}`"


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
    print(FILE)
