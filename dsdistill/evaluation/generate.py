"""Generate texts with a causal language model after the prompts of the dev set."""

import inspect
from collections.abc import Callable, Collection, Sequence
from itertools import takewhile

import torch
from transformers import PreTrainedModel

from dsdistill.data import Examples


def prompt_and_reference(examples: Examples, row: int) -> tuple[list[int], list[int]]:
    """Return the tokens of an example before and after the place where writing begins.

    If some tokens are context, the reference is the last run of tokens with labels: the response to a prompt, or the
    last turn of a conversation, with its end token if it has one. In plain text writing begins in the middle.
    """
    tokens, ranges = examples.tokens(row).tolist(), examples.ranges(row)
    if ranges is None:
        return tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    first, past = ranges[-1].tolist()
    return tokens[:first], tokens[first:past]


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    most: Sequence[int],
    *,
    ends: Collection[int],
    pad: int,
    vocabulary: int,
    call: Callable | None = None,
    anyone: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Return the tokens of greedy decoding after each prompt; all prompts run in one batch, with a key-value cache.

    Args:
        model: in eval mode.
        prompts: n ≥ 1 prompts of any lengths, none empty; they are padded on the left here.
        most: (n,) ≥ 1, most new tokens of each.
        ends: tokens that end a text; they are not returned. If empty, every row gets its `most` tokens.
        vocabulary: entries of the head that are tokens; the head may be padded.
        call: runs the model; default: the model itself.
        anyone: returns whether any rank continues, given whether this one does, since all must run a sharded model.
    """
    call = model if call is None else call
    device = model.device
    width = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (width - len(prompt)) + [*prompt] for prompt in prompts], device=device)
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    limits = torch.tensor(most, device=device)
    stops = torch.tensor([*ends], dtype=torch.int64, device=device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    takes = inspect.signature(model.forward).parameters
    cache, written = None, []
    while anyone(bool(running.any())):
        inputs = {"input_ids": tokens, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        optional = {"position_ids": positions, "logits_to_keep": 1}
        outputs = call(**inputs, **{name: value for name, value in optional.items() if name in takes})
        cache = outputs.past_key_values
        tokens = outputs.logits[:, -1:, :vocabulary].argmax(-1)
        written.append(tokens[:, 0])
        running = running & (len(written) < limits)
        running = running & ~torch.isin(tokens[:, 0], stops)
        # A row that has ended still runs, masked: its position must not pass the last one that the model knows.
        mask = torch.cat([mask, running[:, None].to(mask.dtype)], dim=1)
        positions = positions[:, -1:] + running[:, None]
    rows = [row[:limit] for row, limit in zip(torch.stack(written, 1).tolist(), most, strict=True)]
    return [[*takewhile(lambda token: token not in ends, row)] for row in rows]
