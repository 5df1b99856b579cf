"""Greedy decoding is compared with its definition, on tiny models of several families."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dsdistill.evaluation.generate import greedy, prompt_and_reference
from tests.data.rig import tokenize

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2], [11], [3, 3, 3, 3]]
FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 16},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
}


def model_of(family):
    settings = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **FAMILIES[family]}
    if family != "gpt2":
        settings |= {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
        }
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():  # with initial weights the same token follows every text
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6.0)
    return model


@torch.no_grad()
def step_by_step(model, prompt, most, ends, vocabulary):
    """Decode one prompt, with the whole text anew for each token."""
    tokens = list(prompt)
    for _ in range(most):
        found = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1, :vocabulary]
        if found.argmax() in ends:
            break
        tokens.append(int(found.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_one_prompt_at_a_time_without_a_cache(family):
    model = model_of(family)
    most = [8, 8, 15, 1]  # 16 positions: the second row's last is the model's last
    free = [step_by_step(model, prompt, n, (), 36) for prompt, n in zip(PROMPTS, most, strict=True)]
    assert len({token for row in free for token in row}) > 3, "it should write something"
    found = greedy(model, PROMPTS, most, ends=(), pad=2, vocabulary=36)
    assert found == free
    ends = [free[0][4], free[2][9]]
    expected = [step_by_step(model, prompt, n, ends, 36) for prompt, n in zip(PROMPTS, most, strict=True)]
    assert greedy(model, PROMPTS, most, ends=ends, pad=2, vocabulary=36) == expected
    assert len(expected[0]) <= 4 and len(expected[2]) <= 9 and not {*ends} & {*expected[0], *expected[2]}


def test_where_a_prompt_ends(tokenizer_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    the, of, tensor, separator = *(tokenizer.convert_tokens_to_ids(w) for w in ("the", "of", "tensor")), 3
    examples = tokenize([("the of", "tensor")], tokenizer, 16, "causal_lm")
    assert prompt_and_reference(examples, 0) == ([2, the, of, separator], [tensor, separator])
    examples = tokenize(["the of tensor the of"], tokenizer, 3, "causal_lm")
    assert prompt_and_reference(examples, 0) == ([the], [of, tensor])
    assert prompt_and_reference(examples, 1) == ([the], [of])
