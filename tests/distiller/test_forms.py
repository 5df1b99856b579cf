"""A batch may come in every form that collators make; the same documents give the same loss."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, DataCollatorWithFlattening

from dsdistill import Distiller
from dsdistill.config import UserError
from dsdistill.data.inputs import as_batch
from tests.models.families import FAMILIES, peaked

TERMS = {
    "task": {},
    "soft_label": {},
    "hidden": {"divergence": "cosine"},
    "attention": {},
    "pairwise": {"layers": "uniform"},
    "sp": {},
}
LENGTHS = (5, 2, 9, 1, 7)
NONE = -100


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 60, (length,), generator=generator) for length in LENGTHS]


def row(document: torch.Tensor, left: int, width: int, fill: int) -> torch.Tensor:
    return torch.nn.functional.pad(document, (left, width - left - len(document)), value=fill)


def padded(befores: list[int], width: int, types: bool = False) -> dict:
    """Put the given number of padding tokens before each document; their contents must not matter."""
    texts = documents()
    ids = torch.stack([row(text, before, width, 33) for text, before in zip(texts, befores, strict=True)])
    mask = torch.stack(
        [row(torch.ones_like(text), before, width, 0) for text, before in zip(texts, befores, strict=True)]
    )
    made = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, NONE)}
    if types:
        made["token_type_ids"] = torch.stack(
            [row((text > 30).long(), before, width, 0) for text, before in zip(texts, befores, strict=True)]
        )
    return made


def packed(rows: list[list[torch.Tensor]], by_mask: bool = False) -> dict:
    """Return rows of several documents: position_ids begin anew at each, or the mask counts the documents."""
    width = max(sum(map(len, texts)) for texts in rows)
    ids = torch.stack([row(torch.cat(texts), 0, width, 33) for texts in rows])
    if by_mask:
        numbers = [[torch.full_like(text, i + 1) for i, text in enumerate(texts)] for texts in rows]
        return {
            "input_ids": ids,
            "attention_mask": torch.stack([row(torch.cat(n), 0, width, 0) for n in numbers]),
        }
    positions = [torch.cat([torch.arange(len(text)) for text in texts]) for texts in rows]
    mask = torch.stack([row(torch.ones_like(found), 0, width, 0) for found in positions])
    positions = torch.stack([row(found, 0, width, 1) for found in positions])
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask}


def flattened(**options) -> dict:
    collate = DataCollatorWithFlattening(return_tensors="pt", **options)
    return collate([{"input_ids": text.tolist(), "labels": text.tolist()} for text in documents()])


WIDTH = max(LENGTHS)
FORMS = {
    "int32": {key: values.int() for key, values in padded([0] * 5, WIDTH).items()},
    "one row of positions": padded([0] * 5, WIDTH) | {"position_ids": torch.arange(WIDTH)[None]},
    "flattened, seq_idx alone": flattened(return_position_ids=False, return_seq_idx=True),
    "flattened, lengths alone": flattened(return_position_ids=False, return_flash_attn_kwargs=True),
    "left": padded([WIDTH - length for length in LENGTHS], WIDTH),
    "in the middle": padded([1, 3, 0, 4, 2], WIDTH + 2),
    "wider": padded([0] * 5, WIDTH + 3),
    "bool": {
        key: value.bool() if key == "attention_mask" else value
        for key, value in padded([0] * 5, WIDTH).items()
    },
    "position_ids, mask": padded([0] * 5, WIDTH) | {"position_ids": torch.arange(WIDTH).repeat(5, 1)},
    "packed": packed([documents()]),
    "packed in two rows": packed([documents()[:2], documents()[2:]]),
    "packed by the mask": packed([documents()[:3], documents()[3:]], by_mask=True),
    "flattened by the library": flattened(),
}


def models(kind: str, auto, **changes):
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **FAMILIES[kind] | changes)
        made.append(peaked(auto.from_config(config), 5.0))
    return made


def value(distiller: Distiller, batch: dict) -> dict[str, float]:
    distiller.zero_grad()
    out = distiller(batch)
    out.loss.backward()
    found = {name: term.raw.item() for name, term in out.terms.items()}
    return found | {
        name: parameter.grad.norm().item()
        for name, parameter in distiller.named_parameters()
        if parameter.grad is not None
    }


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def causal(request):
    distiller = Distiller(*models(request.param, AutoModelForCausalLM), TERMS)
    distiller.eval()
    return distiller, value(distiller, padded([0] * 5, WIDTH))


@pytest.mark.parametrize("form", FORMS)
def test_causal(causal, form):
    distiller, expected = causal
    assert value(distiller, FORMS[form]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert min(expected[name] for name in TERMS) > 1e-4


def test_no_mask_means_that_every_token_counts(causal):
    distiller, _ = causal
    ids = torch.stack([documents()[2], documents()[2].flip(0)])
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    assert value(distiller, {"input_ids": ids}) == value(distiller, whole)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_masked_with_token_types(kind):
    """Absolute positions count from a document's first token, wherever it lies."""
    changes = {"type_vocab_size": 2} if kind == "bert" else {"pad_token_id": 1}
    distiller = Distiller(*models(kind, AutoModelForMaskedLM, **changes), TERMS)
    distiller.eval()

    def batch(befores: list[int], width: int) -> dict:
        made = padded(befores, width, types=kind == "bert")
        return made | {"labels": made["labels"].masked_fill(made["input_ids"] % 3 != 0, NONE)}

    expected = value(distiller, batch([0] * 5, WIDTH))
    assert value(distiller, batch([1, 3, 0, 4, 2], WIDTH + 2)) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    if kind == "bert":
        plain = {key: values for key, values in batch([0] * 5, WIDTH).items() if key != "token_type_ids"}
        assert value(distiller, plain)["task"] != pytest.approx(expected["task"], rel=1e-3)


def test_spans_move_with_their_rows():
    befores = [1, 3, 0, 4, 2]
    spans = torch.tensor([[0, 1, 3, 0], [2, 0, 2, 1], [4, 2, 5, 1]])
    shifted = spans.clone()
    shifted[:, 1:3] += torch.tensor(befores)[spans[:, 0], None]
    made = as_batch(padded(befores, WIDTH + 2) | {"spans": shifted}, "causal_lm")
    assert torch.equal(made.spans, spans)


IDS = torch.ones(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        ({"ids": IDS}, "batch: got no input_ids, but ids, expected input_ids (B, N)"),
        ({"input_ids": IDS.tolist()}, "batch: input_ids: got list, expected a tensor"),
        ({"input_ids": IDS[0]}, "batch: input_ids: got (4,) torch.int64, expected (B, N) integers"),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 4, 4)},
            "batch: attention_mask: got (2, 1, 4, 4) torch.float32, expected 2 × 4 integers, one for each token",
        ),
        ({"input_ids": IDS, "attention_mask": IDS[:, :3]}, "batch: attention_mask: got (2, 3)"),
        ([IDS], "batch: got list, expected a dict of tensors with input_ids"),
        ({"input_ids": IDS[:0]}, "batch: input_ids: got shape (0, 4), expected at least one token"),
        ({"input_ids": IDS, "spans": [[0, 1, 2, 0]]}, "batch: spans: got list, expected (S, 4) integers"),
        (
            {"input_ids": IDS, "spans": 9 * IDS[:1]},
            "batch: spans: got spans outside the batch, expected rows below",
        ),
        ({"input_ids": IDS, "inputs_embeds": IDS}, "batch: got inputs_embeds, expected only input_ids"),
        (
            {"input_ids": IDS, "labels": IDS[:, 0]},
            "batch: labels: got (2,) torch.int64, expected (2, 4) integers",
        ),
        (
            {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 3], [0, 2, 3, 4]])},
            "batch: position_ids: got positions that do not count up by 1 from 0, expected 0, 1, 2, … in each document",
        ),
        (
            {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 0, 1]] * 2), "spans": IDS[:1]},
            "batch: got spans with packed rows, expected rows of one document each",
        ),
    ],
)
def test_other_forms_are_refused(inputs, line):
    with pytest.raises(UserError) as refused:
        as_batch(inputs, "causal_lm")
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_packed_rows_have_no_class():
    inputs = {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 0, 1]] * 2), "labels": IDS[:, 0]}
    with pytest.raises(
        UserError, match="got several documents in one row, expected one in each row with task"
    ):
        as_batch(inputs, "classification")
