"""Tiny random models of the families that capture supports, peaked so that their attention maps differ."""

from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

_BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
_LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_KINDS = ["full_attention", "sliding_attention", "full_attention"]

FAMILIES: dict[str, dict] = {
    "bert": _BERT,
    "roberta": _BERT | {"max_position_embeddings": 42},
    "modernbert": {
        **{
            key: _BERT[key]
            for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        },
        "intermediate_size": 48,
        "max_position_embeddings": 40,
        "layer_types": _KINDS,
        "local_attention": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "cls_token_id": 1,
        "sep_token_id": 1,
    },
    "distilbert": {
        "vocab_size": 64,
        "dim": 32,
        "n_layers": 3,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 40,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "pad_token_id": 0,
    },
    "gpt2": {
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 40,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    "llama": _LLAMA,
    "qwen2": _LLAMA | {"layer_types": _KINDS, "use_sliding_window": True, "sliding_window": 4},
    "qwen3": _LLAMA | {"head_dim": 16},
    "mistral": _LLAMA | {"sliding_window": 4},
}
CAUSAL = {"gpt2", "llama", "qwen2", "qwen3", "mistral"}
FINAL_NORM: dict[str, Callable[[PreTrainedModel], torch.nn.Module]] = {
    "modernbert": lambda model: model.final_norm,
    "gpt2": lambda model: model.ln_f,
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral"), lambda model: model.norm),
}


def architecture(family: str, **changes) -> PretrainedConfig:
    return AutoConfig.for_model(family, **FAMILIES[family] | changes)


def peaked(model: PreTrainedModel, factor: float = 16.0) -> PreTrainedModel:
    """Scale the weights: initial scores are so small that nearly uniform attention maps would hide errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(factor)
    return model


def pair(family: str, **changes) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return the same weights under the library's SDPA and under its eager attention, in eval mode."""
    torch.manual_seed(3)
    config = architecture(family, **changes)
    eager = peaked(AutoModel.from_config(config, attn_implementation="eager")).eval()
    ours = AutoModel.from_config(architecture(family, **changes), attn_implementation="sdpa").eval()
    ours.load_state_dict(eager.state_dict())
    return ours, eager


def inputs(padded: bool = True) -> dict[str, torch.Tensor]:
    """Return three sequences of 14, 9 and 1 tokens (all of 14 unless padded), longer than the families' windows."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 64, (3, 14), generator=generator)
    lengths = torch.tensor([14, 9, 1]) if padded else torch.tensor([14, 14, 14])
    mask = torch.arange(14) < lengths[:, None]
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}
