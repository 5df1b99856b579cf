"""Check whether a run that began with one config may continue with another."""

from typing import Any

from dsdistill.config.errors import UserError
from dsdistill.config.load import load_saved
from dsdistill.config.schema import Config
from dsdistill.config.secrets import redacted, without

# Settings that may change between a run and its continuation. The last two change only the order in which numbers are
# added; the others do not change what is computed. student.new_head only allows a run to start; with adapters it also
# decides whether the head is trained.
_FREE = (
    "run.name",
    "run.dir",
    "run.resume",
    "run.log_every",
    "run.evaluate_every",
    "run.evaluate_start",
    "run.save_every",
    "run.save_minutes",
    "run.keep",
    "run.timeout",
    "data.max_file",
    "run.grace",
    "student.new_head",
    "student.zero_stage",
    "train.micro_batch_size",
)


def check_same(saved: str, config: Config) -> None:
    """Raise UserError if `config` would compute something else than the config that `dump` wrote to `saved`."""
    before, after = _plain(load_saved(saved)), _plain(config)
    adapted = config.student.lora is not None
    for key in before | after:
        free = key in _FREE and not (adapted and key == "student.new_head")
        if not free and before.get(key) != after.get(key):
            raise UserError(
                f"{saved}: {key}",
                after.get(key),
                f"{before.get(key)} as at this run's start, or another run.name",
            )


def _plain(config: Config) -> dict[str, Any]:
    """Return a config's settings by dotted key; secrets, which may change from day to day, are left out."""
    return _flat(without(redacted(config.model_dump(mode="json"))))


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
