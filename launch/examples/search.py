"""Search docstrings with an exported sentence encoder, and with its teacher for comparison.

    python launch/examples/search.py ENCODER [QUERY ...]

ENCODER is a folder that `dsdistill export` wrote, or any encoder whose text vector is the mean of its last states. The
documents are docstrings of packages that the quickstart's students have not seen (the dev set `away`).
"""

import sys

import torch
from transformers import AutoModel, AutoTokenizer, logging

from dsdistill.data import docstring_pairs
from dsdistill.models.build import locate

QUERIES = [
    "find the cheapest route between two places",
    "is there a significant difference between two samples?",
    "smooth a noisy signal",
]
LENGTH, ROWS, DOCUMENTS = 48, 64, 500  # tokens of a text, texts at once, documents


def main() -> None:
    """Print what each model finds first for each query."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    table = docstring_pairs.table("unseen", "runs/cache")
    documents, names = table.columns["document"][:DOCUMENTS], table.columns["id"][:DOCUMENTS]
    queries = sys.argv[2:] or QUERIES
    logging.disable_progress_bar()
    found = {}
    for name, path in (("teacher", "minilm"), ("student", sys.argv[1])):
        path = locate(path, name)
        tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).float().eval()
        cosines = vectors(model, tokenizer, queries) @ vectors(model, tokenizer, documents).T
        found[name] = cosines.max(dim=1)
    for row, query in enumerate(queries):
        print(f"\n{query}")
        for name, (cosines, places) in found.items():
            print(f"  {name}  {cosines[row]:.2f}  {names[places[row]]}")


@torch.no_grad()
def vectors(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """Return (n, D) normalised means of the last states."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))  # similar lengths: little padding
    made = torch.empty(len(texts), model.config.hidden_size)
    for some in (order[start : start + ROWS] for start in range(0, len(order), ROWS)):
        rows = [texts[place] for place in some]
        batch = tokenizer(rows, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        made[some] = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(made, dim=-1)


if __name__ == "__main__":
    main()
