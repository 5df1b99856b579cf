"""Name the formats of config.yaml, and complete what an earlier format lacks.

A new format is needed if a default changes, or if a setting is added whose default would change a run that has begun.
Then FORMAT is raised by one, and DEFAULTS gets the former value for every earlier format.
"""

from typing import Any

import yaml

from dsdistill.config.errors import UserError
from dsdistill.config.schema import Config, Run
from dsdistill.config.secrets import redacted
from dsdistill.config.section import Section

FORMAT = 4  # the format that `dump` writes; a file of format 1 does not name its format

# The values, by format and dotted key, of settings that had another default in runs of that format, or did not exist.
# `terms.NAME.KEY` also stands for the terms of stages.
# Up to format 2 the last layer was read before its final norm.
_STATES = ("hidden", "feature", "pairwise", "contrastive", "sp", "rkd", "cka", "pkt", "trajectory", "smooth")
_BEFORE = {f"terms.{name}.final_norm": "before" for name in _STATES}
# Up to format 3 plain text was laid end to end across documents, and prompts had a layout that only this project used.
_UNPACKED = {"data.packing": False, "data.layout": "separator"}
DEFAULTS: dict[int, dict[str, Any]] = {1: _BEFORE | _UNPACKED, 2: _BEFORE | _UNPACKED, 3: _UNPACKED}

_KEYS = {
    "": "task run data teacher student terms stages train evaluation",
    "run": "name dir seed resume log_every evaluate_every save_every save_minutes keep timeout grace "
    "baseline",
    "data": "source subset root train dev text label labels max_length max_train max_dev fraction label_noise "
    "tokenizer train_tokenizer sampler sampler_temperature domain general chunker cache max_file",
    "teacher": "path config deepspeed recipe zero_stage residency",
    "student": "path config deepspeed domain from_teacher zero_stage gradient_checkpointing freeze",
    "student.domain": "width teacher_map",
    "terms": "task soft_label hidden feature attention pairwise contrastive sp rkd cka pkt trajectory fdd "
    "domain smooth",
    "terms.task": "weight",
    "terms.soft_label": "weight temperature divergence beta alpha scale_tau2",
    "terms.hidden": "weight layers layer_agg layer_weights divergence embedding projector",
    "terms.feature": "weight layers layer_agg layer_weights divergence embedding projector",
    "terms.attention": "weight layers layer_agg layer_weights divergence heads relations relation_heads",
    "terms.pairwise": "weight layers layer_agg layer_weights relation center",
    "terms.contrastive": "weight layers layer_agg layer_weights temperature projector",
    "terms.sp": "weight layers layer_agg layer_weights",
    "terms.rkd": "weight layers layer_agg layer_weights distance angle triples",
    "terms.cka": "weight layers layer_agg layer_weights",
    "terms.pkt": "weight layers layer_agg layer_weights",
    "terms.trajectory": "weight word_layers phrase_layers structure hidden pairs",
    "terms.fdd": "weight layers levels changes",
    "terms.domain": "weight layers hidden tokens phrases sequences predictor",
    "terms.smooth": "weight",
    "stages": "name share terms freeze learning_rate scheduler warmup",
    "train": "steps epochs group_by_length batch_size micro_batch_size optimizer learning_rate "
    "projector_learning_rate weight_decay distill_weight scheduler warmup clip bad_steps dtype "
    "backend",
    "evaluation": "rcs structure latency generate",
}
_KEYS |= {f"stages.{section}": names for section, names in _KEYS.items() if section.split(".")[0] == "terms"}
# The dotted keys of format 1, without the numbers of stages. A later setting is added here once its default changes:
# teachers made with the old default must not be taken for those made with the new one.
FORMAT_1 = frozenset(
    f"{section}.{name}".removeprefix(".") for section, names in _KEYS.items() for name in names.split()
)
# The name of a teacher leaves these settings out: they were added later, and do not influence a teacher.
_UNNAMED = frozenset({"run.save_minutes", "run.grace", "data.max_file"})


def take_format(settings: dict, origin: str, *, saved: bool = False) -> int:
    """Take `format` out of a file's settings and return it.

    saved: the settings are those of a run folder, which may have an earlier format; if they name none, it is format 1.
    Raises UserError for a format that this version does not read; `origin` names the file.
    """
    oldest = 1 if saved else 2  # a user's file names no format, or is a copy of a file that `dump` wrote
    named = settings.pop("format", 1 if saved else FORMAT)
    if type(named) is not int or not oldest <= named <= FORMAT:
        expected = f"{oldest} to {FORMAT} (another version of dsdistill may read it)"
        raise UserError(f"{origin}: format", repr(named), expected)
    return named


def complete(settings: dict, written: int) -> None:
    """Add to settings of the format `written` the values that DEFAULTS has for that format.

    Only terms that the run has are completed. Every run has data.
    """
    for key, value in DEFAULTS.get(written, {}).items():
        *parents, name = key.split(".")
        if parents == ["data"]:
            settings.setdefault("data", {})
        for section in _sections(settings, parents):
            section.setdefault(name, value)


def _sections(settings: dict, parents: list[str]) -> list[dict]:
    """Return the mappings that `parents` lead to; terms are those of the run and of each stage."""
    sections = [settings]
    if parents[:1] == ["terms"] and isinstance(settings.get("stages"), list):
        sections += [stage for stage in settings["stages"] if isinstance(stage, dict)]
    for parent in parents:
        below = (section.get(parent) for section in sections)
        sections = [section for section in below if isinstance(section, dict)]
    return sections


def teacher_identity(config: Config) -> str:
    """Return the settings that determine the teacher of a recipe, as YAML; its name is a digest of this text.

    Settings that format 1 did not have are left out while they have the values that format 1 computed with (their
    defaults, unless DEFAULTS says otherwise), so that a new setting does not make every teacher train again. Secrets
    are redacted.
    """
    unnamed: dict[str, Any] = {"root": None, "cache": ""}
    if config.task != "causal_lm":
        unnamed |= {"packing": False, "layout": "separator"}  # without effect in these tasks
    neutral = config.model_copy(
        update={
            "run": Run(seed=config.run.seed),
            "data": config.data.model_copy(update=unnamed),
        }
    )
    settings = redacted(neutral.model_dump(mode="json", exclude=_added(neutral, "")))
    # `dump` is not used, because its quoting may change, and names of teachers would change with it.
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _added(section: Section, prefix: str) -> dict[str, Any]:
    """Return what `teacher_identity` leaves out of a section, as pydantic's `exclude` takes it."""
    left_out: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        key, value = f"{prefix}{name}", getattr(section, name)
        before = DEFAULTS[1].get(key.removeprefix("stages."), field.get_default(call_default_factory=True))
        at_default = value == before
        if key in _UNNAMED or (key not in FORMAT_1 and at_default):
            left_out[name] = True
        elif isinstance(value, Section):
            left_out[name] = _added(value, f"{key}.")
        elif key == "stages":
            left_out[name] = {index: _added(stage, f"{key}.") for index, stage in enumerate(value)}
    return left_out
