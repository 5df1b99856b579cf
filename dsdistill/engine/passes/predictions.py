"""Write what student and teacher predict of each dev example."""

import json
from collections.abc import Iterator
from itertools import groupby

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsdistill import disk
from dsdistill.data import Examples, Set
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.prepare import Prepared
from dsdistill.engine.run_folder import PREDICTIONS


class Predictions:
    """Predictions collect the models' outputs on the dev sets while they are scored, and write them to a run folder."""

    def __init__(self):
        self.sets: dict[str, tuple[dict[str, Tensor], Tensor]] = {}

    def take(self, name: str, outputs: dict[str, Tensor], labels: Tensor) -> None:
        """Keep what the models gave for one dev set.

        Args:
            name: of the dev set, "" for one without a name.
            outputs: (n, C) logits of each model, in the order of the set.
            labels: (n,) int64 classes.
        """
        self.sets[name] = outputs, labels

    def write(self, path: str, prepared: Prepared, ranks: Ranks) -> None:
        """Write RUN/predictions.jsonl, one dev example a line; without classes there is no such file.

        A line has the example's `id`, its `set` where that has a name, `texts` (what the tokenizer gives back of the
        tokens that the models read), `label`, and for each model its class and that class's `probability`.
        """
        if not self.sets:
            return
        with ranks.first_alone():
            if ranks.first:
                with disk.writing(f"{path}/{PREDICTIONS}") as file:
                    for name, (outputs, labels) in self.sets.items():
                        for row in _rows(prepared.data.devs[name], outputs, labels, prepared):
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


def texts(examples: Examples, row: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of an example, or the two of a pair, as far as the models read them."""
    kept = {tokenizer.unk_token_id, tokenizer.mask_token_id}
    special = set(tokenizer.all_special_ids) - kept
    runs = groupby(examples.tokens(row).tolist(), key=special.__contains__)
    return [tokenizer.decode(list(run)).strip() for apart, run in runs if not apart]
