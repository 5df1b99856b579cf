"""Fixtures that several tests of whole runs start from."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from tests.conftest import BERT


@pytest.fixture
def mapping(settings, data_dir, tokenizer_dir, tmp_path, monkeypatch):
    """Return settings of a masked language model as the teacher of a student with domain fusion."""
    monkeypatch.chdir(tmp_path)
    config = {key: value for key, value in BERT.items() if key != "model_type"}
    torch.manual_seed(0)
    teacher = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **config))
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    teacher.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "teacher")
    files = {"source": "files", "train": str(data_dir / "train.tsv"), "dev": str(data_dir / "dev.tsv")}
    return settings | {
        "task": "masked_lm",
        "data": files
        | {
            "domain": [str(data_dir / "train.tsv")],
            "general": [str(data_dir / "dev.tsv")],
            "max_length": 32,
            "cache": str(tmp_path / "cache"),
        },
        "teacher": {"path": str(tmp_path / "teacher"), "zero_stage": 3},
        "student": {
            "config": BERT | {"hidden_size": 32, "num_hidden_layers": 2, "hidden_dropout_prob": 0.1},
            "domain": {"width": 16},
        },
        "terms": {"task": {}, "soft_label": {}, "domain": {}},
        "evaluation": {"structure": True},
    }
