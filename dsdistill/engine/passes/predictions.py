"""Write what student and teacher predict for each dev example, or which document they find for each query."""

import functools
import json
from collections.abc import Iterator
from itertools import groupby

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsdistill import disk
from dsdistill.config.schema import EMBEDDING
from dsdistill.data import Examples, Set
from dsdistill.data.examples import TextPairs
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.prepare import Prepared
from dsdistill.engine.run_folder import PREDICTIONS

LONGEST = 1000  # most characters written of a query or document


class Predictions:
    """Predictions collects the models' outputs while dev sets are scored, and writes them to a run folder."""

    def __init__(self):
        self.sets: dict[str, tuple[dict[str, Tensor], Tensor]] = {}

    def take(self, name: str, outputs: dict[str, Tensor], labels: Tensor) -> None:
        """Keep the outputs of the models on one dev set.

        Args:
            name: the dev set's name, "" if it has none.
            outputs: by model, in the set's order: (n, C) logits of classes, (n, 1) scores, or (n, 2) results of
                queries as `similarity.search` returns them.
            labels: (n,) int64 classes, scores, or for queries the indices of their documents.
        """
        self.sets[name] = outputs, labels

    def write(self, path: str, prepared: Prepared, ranks: Ranks) -> None:
        """Write RUN/predictions.jsonl, one dev example a line; tasks that predict tokens have no such file.

        A line has the example's `id`, its `set` if that has a name, and `texts`, decoded from the tokens that the
        models read. For classes it has the `label`, each model's class and that class's `probability`; for scores the
        `label` and each model's `value`; for queries each model's `rank` of the right document and, if that is not 1,
        the text that it ranks `first`.
        """
        if not self.sets:
            return
        write = {EMBEDDING: _searches, "regression": _values}.get(prepared.config.task, _rows)
        with ranks.first_alone():
            if ranks.first:
                with disk.writing(f"{path}/{PREDICTIONS}") as file:
                    for name, (outputs, labels) in self.sets.items():
                        for row in write(prepared.data.devs[name], outputs, labels, prepared):
                            row |= {"set": name} if name else {}
                            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _rows(
    examples: Set, outputs: dict[str, Tensor], labels: Tensor, prepared: Prepared
) -> Iterator[dict[str, object]]:
    names = prepared.data.labels
    best = {model: logits.double().softmax(-1).max(-1) for model, logits in outputs.items()}
    shares = {model: values.tolist() for model, (values, _) in best.items()}
    classes = {model: indices.tolist() for model, (_, indices) in best.items()}
    for row, label in enumerate(labels.tolist()):
        yield {
            "id": examples.name(row),
            "texts": texts(examples, row, prepared.tokenizer),
            "label": names[label],
            **{model: names[of[row]] for model, of in classes.items()},
            "probability": {model: round(of[row], 4) for model, of in shares.items()},
        }


def _values(
    examples: Set, outputs: dict[str, Tensor], labels: Tensor, prepared: Prepared
) -> Iterator[dict[str, object]]:
    values = {model: of[:, 0].tolist() for model, of in outputs.items()}
    for row, label in enumerate(labels.tolist()):
        yield {
            "id": examples.name(row),
            "texts": texts(examples, row, prepared.tokenizer),
            "label": round(label, 4),
            "value": {model: round(of[row], 4) for model, of in values.items()},
        }


def _searches(
    pairs: TextPairs, found: dict[str, Tensor], places: Tensor, prepared: Prepared
) -> Iterator[dict[str, object]]:
    @functools.lru_cache(maxsize=2**16)  # some documents come first for many queries
    def document(row: int) -> str:
        return _text(pairs.texts, 2 * row + 1, prepared)

    ranks, firsts = ({model: of[:, i].tolist() for model, of in found.items()} for i in (0, 1))
    for row in places.tolist():
        yield {
            "id": pairs.name(row),
            "texts": [_text(pairs.texts, 2 * row, prepared), document(row)],
            "rank": {model: of[row] for model, of in ranks.items()},
            "first": {model: document(of[row]) for model, of in firsts.items() if of[row] != row},
        }


def _text(examples: Examples, row: int, prepared: Prepared) -> str:
    return " ".join(texts(examples, row, prepared.tokenizer))[:LONGEST]


def texts(examples: Examples, row: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of an example, or the two of a pair, as far as the models read them."""
    kept = {tokenizer.unk_token_id, tokenizer.mask_token_id}
    special = set(tokenizer.all_special_ids) - kept
    runs = groupby(examples.tokens(row).tolist(), key=special.__contains__)
    return [tokenizer.decode(list(run)).strip() for apart, run in runs if not apart]
