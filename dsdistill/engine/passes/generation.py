"""Score the texts that student and teacher write after the dev set's prompts against the references."""

import functools
import json

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsdistill import disk
from dsdistill.data.prompted import special_tokens
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.prepare import Prepared
from dsdistill.engine.run_folder import GENERATED
from dsdistill.engine.teacher import LazyTeacher
from dsdistill.evaluation.generate import greedy, prompt_and_reference
from dsdistill.evaluation.text import bleu_signature, text_scores
from dsdistill.models.tokenizer import entries


def generation(
    student: PreTrainedModel, teacher: LazyTeacher | None, prepared: Prepared, path: str, ranks: Ranks
) -> tuple[dict[str, dict[str, float]], str]:
    """Return scores of the texts that student and teacher (if any) write, and BLEU's signature, on every rank.

    References are texts of the first dev set, encoded and decoded by the tokenizer: if it drops capitals, the models
    are not expected to write them. The texts are written to RUN/generated.jsonl.

    student: whole, in eval mode. teacher: that of the evaluation, perhaps sharded. path: the run's folder.
    """
    config, tokenizer = prepared.config, prepared.tokenizer
    examples = prepared.data.dev
    pairs = [
        prompt_and_reference(examples, row) for row in range(min(config.evaluation.generate, len(examples)))
    ]
    texts = {
        "prompt": [tokenizer.decode(prompt, skip_special_tokens=True) for prompt, _ in pairs],
        "reference": [tokenizer.decode(reference, skip_special_tokens=True) for _, reference in pairs],
    }
    scores = {}
    for name, writer in {"student": student, "teacher": teacher}.items():
        if writer is not None:
            texts[name] = _written(writer, pairs, prepared, ranks)
            scores[name] = text_scores(texts[name], texts["reference"])
    with ranks.first_alone():
        if ranks.first:
            with disk.writing(f"{path}/{GENERATED}") as file:
                for row in zip(*texts.values(), strict=True):
                    file.write(json.dumps(dict(zip(texts, row, strict=True)), ensure_ascii=False) + "\n")
    return scores, bleu_signature(texts["reference"])


def _written(
    writer: PreTrainedModel | LazyTeacher,
    pairs: list[tuple[list[int], list[int]]],
    prepared: Prepared,
    ranks: Ranks,
) -> list[str]:
    """Return a text for each pair of prompt and reference, in their order; the ranks share the work.

    Every rank runs the teacher equally often, since a sharded one needs all ranks. A rank without prompts left writes
    texts that are dropped.
    """
    tokenizer, longest = prepared.tokenizer, prepared.config.data.max_length
    prompted = prepared.data.dev.prompted
    ends = stops(tokenizer, [reference for _, reference in pairs]) if prompted else set()
    setting = {"ends": ends, "pad": tokenizer.pad_token_id, "vocabulary": entries(tokenizer)}
    model, together = writer, isinstance(writer, LazyTeacher)
    if together:
        model, call = writer.callee.model, functools.partial(writer.callee.call, whole=True)
        setting |= {"call": call, "anyone": functools.partial(_anyone, ranks)}
    # Prompts of similar length share a batch. A response may be as long as data.max_length allows; plain text gets
    # the length of its reference.
    order = np.argsort([-len(prompt) for prompt, _ in pairs], kind="stable").tolist()
    at_once, mine = prepared.config.train.micro_batch_size, order[ranks.rank :: ranks.world_size]
    written = []
    for start in range(0, len(order[:: ranks.world_size] if together else mine), at_once):
        rows = mine[start : start + at_once]
        prompts, references = zip(*(pairs[row] for row in rows or order[:1]), strict=True)
        most = [
            longest - len(prompt) if prompted else len(reference)
            for prompt, reference in zip(prompts, references, strict=True)
        ]
        tokens = greedy(model, prompts, most if rows else [1], **setting)
        written += [
            (row, tokenizer.decode(ids, skip_special_tokens=True))
            for row, ids in zip(rows, tokens, strict=bool(rows))
        ]
    return [text for _, text in sorted(pair for of_rank in ranks.gather(written) for pair in of_rank)]


def _anyone(ranks: Ranks, goes_on: bool) -> bool:
    return bool(ranks.sum(torch.tensor(int(goes_on), device=ranks.device)))


def stops(tokenizer: PreTrainedTokenizerBase, references: list[list[int]]) -> set[int]:
    """Return the tokens that end a response: the one that ends a text, and those that end a chat template's turns."""
    last = {reference[-1] for reference in references}
    special = {token for token, of in tokenizer.added_tokens_decoder.items() if of.special}
    return {special_tokens(tokenizer)[2][0], *(last & special)}
