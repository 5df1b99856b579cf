"""Plans of the five methods' tables and figures: the first cell of each trains, on small data and teachers."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from dsdistill.data.wordpiece import train_tokenizer
from dsdistill.engine.studies import read_plan
from dsdistill.models.build import locate
from dsdistill.report.summary import TITLES, metric
from tests.conftest import sentence

ROOT = Path(__file__).parents[1]
PLANS = sorted(path.stem for path in (ROOT / "configs" / "reproduce").glob("*.yaml"))
# Scores that `evaluate` adds to those of a run.
EVALUATED = {"latency_ms", "bleu", "rouge_l", "cer", "semantic_alignment", "representation_compactness"}
EVALUATED |= {"structural_consistency", "domain_capture"}
RUN = """
import json, sys
from dsdistill.config import load
from dsdistill.distributed import deepspeed
from dsdistill.distributed.leave import leave
from dsdistill.engine.run import run
ranks = deepspeed.start()
with open(sys.argv[1]) as file:
    cells = json.load(file)
for sources in cells.values():
    run(load(sources), ranks)
deepspeed.stop()
leave()
"""


def write(path: Path, rows: list[dict]) -> None:
    """Write rows in the formats of the real files: gzip, TSV with a header or JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".tsv" in path.name:
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))


def chinese(rng: random.Random) -> str:
    return "".join(chr(rng.randint(0x4E00, 0x4E40)) for _ in range(rng.randint(12, 30)))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Write the data sets of the plans, 48 rows to train on and 16 to score, and a teacher for each."""
    root, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for split, count in (("train", 48), ("dev", 16)):
        for name in ("sst2", "cola", "mrpc", "rte", "stsb"):
            pair = name in ("mrpc", "rte", "stsb")
            rows = [
                {
                    "id": i,
                    "label": round(5 * rng.random(), 2) if name == "stsb" else i % 2,
                    "text_a": sentence(rng),
                    "text_b": sentence(rng) if pair else "",
                }
                for i in range(count)
            ]
            write(root / name / f"{split}.tsv.gz", rows)
        captions = [{"source": sentence(rng), "target": sentence(rng)} for _ in range(count)]
        write(root / "multi30k_en_de" / f"{split}.jsonl.gz", captions)
        for name in ("zhmed", "zhgeneral"):
            asked = [{"question": chinese(rng), "answer": chinese(rng)} for _ in range(count)]
            write(root / name / f"{split}.jsonl.gz", asked)
        write(
            root / "tnews" / f"{split}.jsonl.gz", [{"text_a": chinese(rng), "text_b": chinese(rng)}] * count
        )
    _teachers(root, rng)
    return root


def _teachers(root: Path, rng: random.Random) -> None:
    torch.manual_seed(0)
    minilm = locate("minilm", "teacher")
    for name, labels in (("classes", 2), ("scores", 1)):
        model = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=labels)
        _saved(model, minilm, root / name)
    english = train_tokenizer([sentence(rng) for _ in range(200)], 200, str(root / "cache"))
    han = train_tokenizer([chinese(rng) for _ in range(200)], 200, str(root / "cache"))
    decoder = {"vocab_size": 8000, "n_positions": 96, "n_embd": 48, "n_layer": 4, "n_head": 4}
    decoder |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    _saved(
        AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **decoder)), english, root / "captions"
    )
    encoder = {"vocab_size": 5000, "hidden_size": 192, "intermediate_size": 96, "num_attention_heads": 6}
    encoder |= {"num_hidden_layers": 4, "max_position_embeddings": 128}
    _saved(AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **encoder)), han, root / "medical")


def _saved(model, tokenizer: str, folder: Path) -> None:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def small(plan: str, sources: list[str], root: Path) -> list[str]:
    """Return the sources of a cell with small data, few steps, and an existing teacher."""
    base = " ".join(sources)
    if "multi_level" in base or "multi_stage" in base:
        of = "scores" if "stsb" in base else "classes"
    else:
        of = "medical" if "domain_mapping" in base else "captions"
    return [
        *sources,
        f"data.root={root}",
        f"data.cache={root}/cache",
        "data.max_dev=16",
        *(["data.holdout=8"] if "data.holdout=" in base else []),
        "teacher.recipe=null",
        f"teacher.path={root}/{of}",
        "train.steps=6",
        "run.evaluate_every=0",
        "evaluation.generate=0",
        f"run.dir={root}/runs/{plan}",
        "run.seed=0",
    ]


@pytest.fixture(scope="module")
def runs(root):
    """Run the first cell of every plan in one process; return the folder of the runs."""
    cells = {}
    for plan in PLANS:
        _, sources, _ = read_plan(f"configs/reproduce/{plan}.yaml")
        cells[plan] = small(plan, next(iter(sources.values())), root)
    (root / "cells.json").write_text(json.dumps(cells))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, root / "cells.json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root / "runs"


@pytest.mark.parametrize("plan", PLANS)
def test_the_first_cell_runs_and_its_scores_have_the_plans_names(plan, runs):
    summary = json.loads((runs / plan / "summary.json").read_text())
    assert summary["finished"] and summary["steps"] == 6
    _, _, study = read_plan(str(ROOT / "configs" / "reproduce" / f"{plan}.yaml"))
    wanted = {name for name in study.metrics if metric(name) not in EVALUATED}
    assert wanted <= summary["models"]["student"].keys()
    assert all(metric(claim.metric) in TITLES for claim in study.claims)
    assert all(claim.metric in study.metrics for claim in study.claims)
