"""Run a whole distillation of random weights, all levels, under DeepSpeed's launcher.

deepspeed --num_gpus 1 dsdistill/bench/job.py FOLDER OUT.json [--tiny]

The teacher has 24 layers of width 1024, the student 6 of width 768. This shows that a run works on this machine, from
its first step to its checkpoint; bench/check_step.py compares levels.
The run is in FOLDER. The data are artificial words, so that neither network nor `datasets` is needed.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
import yaml

from dsdistill import disk
from dsdistill.config import load
from dsdistill.distributed import deepspeed
from dsdistill.distributed.leave import leave
from dsdistill.engine.run import run

TERMS = {
    "soft_label": {},
    "hidden": {"layers": "uniform"},
    "attention": {"layers": "uniform", "divergence": "kl"},
    "pairwise": {"layers": "last"},
}
# (teacher, student, vocabulary, sequence length, micro-batch, steps). Both models have sixteen heads.
REAL = ((24, 1024, 16), (6, 768, 16), 30522, 512, 8, 30)
TINY = ((4, 32, 4), (2, 16, 4), 64, 16, 2, 2)


def tokenizer_folder(folder: Path, words: list[str]) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def model(layers: int, width: int, heads: int, vocabulary: int, longest: int) -> dict:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": longest,
    }


def write_config(folder: Path, tiny: bool) -> tuple[Path, dict]:
    """Write the config of the run; return its path and the sizes of the run."""
    teacher, student, vocabulary, length, batch, steps = TINY if tiny else REAL
    words = ["[PAD]", "[UNK]", "[EOS]", *(f"w{i}" for i in range(vocabulary - 3))]
    tokenizer = tokenizer_folder(folder, words)
    rng = random.Random(0)
    lines = [
        " ".join(rng.choice(words[3:]) for _ in range(256))
        for _ in range(length * (batch * steps + 2) // 256 + 1)
    ]
    text = folder / "text.txt"
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "task": "causal_lm",
        "run": {"name": "job", "dir": str(folder / "job"), "log_every": 1000},
        "data": {
            "source": "files",
            "train": str(text),
            "dev": str(text),
            "max_dev": 1,
            "max_train": batch * steps,
            "max_length": length,
            "label": None,
            "tokenizer": str(tokenizer),
            "cache": str(folder / "cache"),
        },
        "teacher": {"config": model(*teacher, vocabulary, length), "zero_stage": 0},
        "student": {"config": model(*student, vocabulary, length), "zero_stage": 1},
        "terms": TERMS,
        "train": {
            "steps": steps,
            "batch_size": batch,
            "micro_batch_size": batch,
            "learning_rate": 1e-4,
            "dtype": "bf16" if torch.cuda.is_available() else "fp32",
        },
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path, {"terms": " + ".join(TERMS), "tokens": length, "batch": batch, "steps": steps}


def main(folder: Path, out: Path, tiny: bool) -> None:
    ranks = deepspeed.start()
    try:
        path, row = write_config(folder, tiny)
        summary = run(load([str(path)]), ranks)
        row |= {
            "tokens_per_second": summary["models"]["student"]["training_tokens_per_second"],
            "peak_gb": summary["peak_memory_mib"] / 953.674,
            "backends": summary["backends"],
        }
        with disk.writing(out) as file:
            json.dump([row], file, indent=1)
    finally:
        deepspeed.stop()


if __name__ == "__main__":
    given = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    main(Path(given[0]), Path(given[1]), "--tiny" in given)
    leave()
