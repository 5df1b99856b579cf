"""Score what student and teacher write after the dev set's prompts against the references."""

import json

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsdistill import disk
from dsdistill.data.prompted import special_tokens
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.prepare import Prepared
from dsdistill.engine.run_folder import GENERATED
from dsdistill.evaluation.generate import greedy, prompt_and_reference
from dsdistill.evaluation.text import bleu_signature, text_scores
from dsdistill.models.build import build_model
from dsdistill.models.tokenizer import entries


def generation(
    student: PreTrainedModel, prepared: Prepared, path: str, ranks: Ranks
) -> tuple[dict[str, dict[str, float]], str]:
    """Return scores of the texts that both write, the teacher where it has trained weights; the same on every rank.

    The second is BLEU's signature. A reference is what the tokenizer makes of the first dev set's text: one that knows
    no capitals is not asked for them, and one that loses nothing leaves it as it is. The texts go to
    RUN/generated.jsonl.

    student: whole, in eval mode. path: of the run.
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
    models = {"student": lambda: student}
    if prepared.judged and config.teacher.path is not None:
        models["teacher"] = lambda: build_model(
            prepared.teacher,
            config.teacher.path,
            config.task,
            "teacher",
            needs_head=True,
            attention=config.teacher.attn_implementation,
        ).to(ranks.device)
    scores = {}
    for name, load in models.items():
        texts[name] = _written(load().eval(), pairs, prepared, ranks)
        scores[name] = text_scores(texts[name], texts["reference"])
    with ranks.first_alone():
        if ranks.first:
            with disk.writing(f"{path}/{GENERATED}") as file:
                for row in zip(*texts.values(), strict=True):
                    file.write(json.dumps(dict(zip(texts, row, strict=True)), ensure_ascii=False) + "\n")
    return scores, bleu_signature(texts["reference"])


def _written(
    model: PreTrainedModel, pairs: list[tuple[list[int], list[int]]], prepared: Prepared, ranks: Ranks
) -> list[str]:
    """Return a text for each pair of prompt and reference, in their order, the work shared out over the ranks."""
    tokenizer, longest = prepared.tokenizer, prepared.config.data.max_length
    prompted = prepared.data.dev.prompted
    ends = stops(tokenizer, [reference for _, reference in pairs]) if prompted else set()
    # Prompts of like length meet; a response may fill the room that training gave it, a block has its own length.
    order = np.argsort([-len(prompt) for prompt, _ in pairs], kind="stable").tolist()[
        ranks.rank :: ranks.world_size
    ]
    at_once = prepared.config.train.micro_batch_size
    written = []
    for start in range(0, len(order), at_once):
        rows = order[start : start + at_once]
        prompts, references = zip(*(pairs[row] for row in rows), strict=True)
        most = [
            longest - len(prompt) if prompted else len(reference)
            for prompt, reference in zip(prompts, references, strict=True)
        ]
        tokens = greedy(
            model, prompts, most, ends=ends, pad=tokenizer.pad_token_id, vocabulary=entries(tokenizer)
        )
        written += [
            (row, tokenizer.decode(ids, skip_special_tokens=True))
            for row, ids in zip(rows, tokens, strict=True)
        ]
    return [text for _, text in sorted(pair for of_rank in ranks.gather(written) for pair in of_rank)]


def stops(tokenizer: PreTrainedTokenizerBase, references: list[list[int]]) -> set[int]:
    """Return the tokens that end a response: what ends a text, and what a chat template ends turns with."""
    last = {reference[-1] for reference in references}
    special = {token for token, of in tokenizer.added_tokens_decoder.items() if of.special}
    return {special_tokens(tokenizer)[2][0], *(last & special)}
