"""Losses over a vocabulary stay within a limit on a GPU, beside a student as wide as one of 7 billion parameters."""

from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensor

from dsdistill.config.load import make_config
from dsdistill.ops import gpu, vocabulary_losses
from dsdistill.ops.soft_label import fused, head
from dsdistill.planner import rehearsal
from dsdistill.planner.ledger import Ledger
from dsdistill.planner.plan import Forecast

MIB = 2**20
WIDTH, VOCABULARY, TOKENS = 3584, 152064, 4096
HEAD = VOCABULARY * WIDTH * 4 / MIB  # its gradient in float32: 2,079 MiB
MODEL = {
    "model_type": "qwen2",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": TOKENS,
    "tie_word_embeddings": False,
}
TERMS = {
    "both": {"task": {}, "soft_label": {}},
    "both, jsd": {"task": {}, "soft_label": {"divergence": "jsd"}},
    "soft labels": {"soft_label": {}},
    "task": {"task": {}},
}
needs_triton = pytest.mark.skipif(not gpu.interpreting(), reason="Triton's interpreter is not chosen")


@pytest.mark.parametrize("terms", TERMS)
def test_operators(terms, tokenizer_dir, tmp_path):
    """They hold at most the head's gradient in float32 and 0.6 GiB."""
    (tmp_path / "text.txt").write_text("a b c\n" * 100)
    data = {"source": "files", "train": str(tmp_path / "text.txt"), "tokenizer": str(tokenizer_dir)}
    settings = {
        "task": "causal_lm",
        "data": data | {"max_length": TOKENS},
        "student": {"config": MODEL, "zero_stage": 2},
        "teacher": {"config": MODEL},
        "terms": TERMS[terms],
        "train": {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "dtype": "bf16"},
    }
    if "soft_label" not in TERMS[terms]:
        del settings["teacher"]
    ((_, phases),) = Forecast(make_config(settings), 1, gpu=True).stages(1).items()
    held = phases["terms"][rehearsal.OPERATORS] / MIB
    print(f"{terms}: {held:.0f} MiB, {HEAD:.0f} of them the gradient of the head")
    assert HEAD < held <= HEAD + 0.6 * 1024


@pytest.mark.parametrize(
    ("retain", "adds", "backend"),
    [
        (False, True, "chunked"),
        (True, True, "chunked"),
        (False, False, "chunked"),
        pytest.param(False, True, "triton", marks=needs_triton),
    ],
    ids=["", "retain_graph", "addmm without out_dtype", "kernel"],
)
def test_backward_rounds_in_the_gradients_own_memory(retain, adds, backend, monkeypatch):
    """Beside the gradient in float32 there is none in bfloat16; if it must be kept, backward makes a second one.

    Where addmm cannot add a product in half precision to float32 the forward pass needs no more; nor does the kernel,
    whose launches are counted here, not run.
    """
    monkeypatch.setattr(head, "_adds_half", lambda *_: adds)
    launches = []
    monkeypatch.setattr(fused, "launch", lambda kernel, programs, *_: launches.append(programs))
    ledger = Ledger((1, TOKENS))
    with ledger.fake:
        hidden = torch.zeros(2, 1, TOKENS, WIDTH, dtype=torch.bfloat16).unbind()
        heads = torch.zeros(2, VOCABULARY, WIDTH, dtype=torch.bfloat16).unbind()
        student = [x.detach().requires_grad_() for x in (hidden[0], heads[0])]
        labels, index = torch.zeros(1, TOKENS, dtype=torch.int64), torch.arange(TOKENS)
    with ledger.running(), mock.patch.object(FakeTensor, "is_cuda", True):
        ledger.enter("terms", "operators")
        total = vocabulary_losses(
            *student, hidden[1], heads[1], labels=labels, index=index, backend=backend
        ).total
        ledger.enter("backward", "in passing")
        total.backward(retain_graph=retain)
    assert bool(launches) == (backend == "triton")
    assert HEAD < ledger.peaks["terms"]["operators"] / MIB <= HEAD + 0.6 * 1024
    assert student[1].grad.dtype == torch.bfloat16
    copies = 2 if retain else 1
    assert copies * HEAD < ledger.peaks["backward"].total() / MIB < (copies + 0.1) * HEAD
