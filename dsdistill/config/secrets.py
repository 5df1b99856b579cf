"""Redact the secrets in a config, so that nothing that this project writes or prints holds them."""

import re
from typing import Any

REDACTED = "(redacted)"

# The key "tokenizer" contains "token" but names no secret.
_TEXTS = re.compile(r"key|token(?!iz)|secret|password|passwd|passphrase|credential", re.IGNORECASE)
_ANYTHING = re.compile(r"secret|password|passwd|passphrase|credential", re.IGNORECASE)


def redacted(settings: Any, secret: str = "") -> Any:
    """Return plain settings with (redacted) in place of every secret.

    A secret is a text under a key with "key", "token", "secret", "password" or the like in its name, at any depth
    below that key. A number is a secret only if such a name cannot mean a number (`num_key_value_heads` is no secret).
    """
    if isinstance(settings, dict):
        return {
            key: redacted(value, secret or (str(key) if _TEXTS.search(str(key)) else ""))
            for key, value in settings.items()
        }
    if isinstance(settings, list | tuple):
        return [redacted(value, secret) for value in settings]
    if not secret or settings is None or isinstance(settings, bool) or settings == "":
        return settings
    return REDACTED if isinstance(settings, str) or _ANYTHING.search(secret) else settings


def shown(dotted: str, value: Any) -> str:
    """Return the value of a dotted key as messages show it: its repr, without secrets."""
    return REDACTED if is_secret(dotted, value) else repr(redacted(value))


def mentions(text: str) -> bool:
    """Return whether a text, such as YAML that cannot be parsed, may name a secret."""
    return _TEXTS.search(text) is not None


def is_secret(dotted: str, value: Any) -> bool:
    """Return whether the dotted key itself, not a key within its value, makes `redacted` hide the value."""
    return repr(redacted({dotted: value})[dotted]) != repr(redacted(value))  # as texts: NaN ≠ NaN


def without(settings: Any) -> Any:
    """Return plain settings without the keys whose values were redacted."""
    if isinstance(settings, dict):
        return {key: without(value) for key, value in settings.items() if value != REDACTED}
    if isinstance(settings, list):
        return [without(value) for value in settings if value != REDACTED]
    return settings


def places(settings: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys whose values were redacted."""
    items = settings.items() if isinstance(settings, dict) else enumerate(settings)
    hidden: list[str] = []
    for key, value in items:
        if value == REDACTED:
            hidden.append(f"{prefix}{key}")
        elif isinstance(value, dict | list):
            hidden += places(value, f"{prefix}{key}.")
    return hidden
