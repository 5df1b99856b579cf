"""Sentence encoders in a loop of one's own are compared with plain transformers."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from dsdistill import Distiller, UserError
from tests.models.families import FAMILIES, peaked


def encoders(**student):
    made = []
    for seed, changes in ((1, {}), (2, {"num_hidden_layers": 2} | student)):
        torch.manual_seed(seed)
        config = AutoConfig.for_model("bert", **FAMILIES["bert"] | changes)
        made.append(peaked(AutoModel.from_config(config), 4.0).double())
    return made


def batch(lengths=(5, 8, 3, 6), pair=(0, 0, 1, 1)) -> dict:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(2, 60, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "pair": torch.tensor(pair)}


def test_by_definition():
    teacher, student = encoders()
    given = {"task": {"weight": 0.5}, "embedding": {}}
    distiller = Distiller(teacher, student, given, task="embedding", pooling=("cls", "last")).eval()
    plain = [copy.deepcopy(model).eval() for model in (teacher, student)]
    rows = batch()
    out = distiller(rows)
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    theirs, mine = (model(**inputs).last_hidden_state for model in plain)
    mine, theirs = mine[:, 0], theirs[torch.arange(4), rows["attention_mask"].sum(1) - 1]
    cosines = F.normalize(mine[::2], dim=1) @ F.normalize(mine[1::2], dim=1).T
    expected = {
        "task": F.cross_entropy(20 * cosines, torch.arange(2)),
        "embedding": (1 - F.cosine_similarity(mine, theirs)).mean(),
    }
    for name, value in expected.items():
        assert out.terms[name].raw.item() == pytest.approx(value.item(), rel=1e-6), name
    out.loss.backward()
    (0.5 * expected["task"] + expected["embedding"]).backward()
    grads = {name: parameter.grad for name, parameter in plain[1].named_parameters()}
    for name, parameter in student.named_parameters():
        if grads[name] is not None:
            assert torch.allclose(parameter.grad, grads[name], rtol=1e-5, atol=1e-8), name


def test_rows_padded_on_the_left_give_the_same_loss():
    losses = []
    for shift in (0, 4):
        rows = batch((4, 4, 4, 4))
        rows |= {name: rows[name].roll(shift, dims=1) for name in ("input_ids", "attention_mask")}
        teacher, student = encoders(hidden_size=16)
        torch.manual_seed(5)
        distiller = Distiller(teacher, student, {"embedding": {}, "pkt": {}}, task="embedding").eval()
        losses.append(distiller(rows).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pair": None}, r"^batch: got no pair, expected pair \(B,\)"),
        (
            {"pair": torch.tensor([0, 0, 0, 1])},
            r"^batch: pair: got \[0, 0, 0, 1\], expected 4 integers, each of them twice",
        ),
        ({"pair": torch.tensor([0, 0])}, r"^batch: pair: got \[0, 0\]"),
        ({"position_ids": torch.arange(4).repeat(4, 2)}, r"^batch: got pair with packed rows"),
    ],
)
def test_bad_pairs(changes, message):
    teacher, student = encoders()
    distiller = Distiller(teacher, student, {"task": {}}, task="embedding")
    rows = batch((8, 8, 8, 8)) | changes
    with pytest.raises(UserError, match=message):
        distiller({name: value for name, value in rows.items() if value is not None})


def test_bad_arguments():
    teacher, student = encoders()
    with pytest.raises(UserError, match=r"^Distiller: pooling: got max, expected two of mean, cls, last"):
        Distiller(teacher, student, {"embedding": {}}, task="embedding", pooling="max")
    with pytest.raises(UserError, match=r"terms.soft_label: got task embedding"):
        Distiller(teacher, student, {"soft_label": {}}, task="embedding")
