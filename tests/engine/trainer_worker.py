"""Train with a DistillTrainer on the batches of a run, on as many ranks as the launcher starts.

trainer_worker.py CONFIG.yaml OUT.json: the config is for one rank; OUT gets the losses of each step.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
import yaml
from torch.utils.data import SequentialSampler
from transformers import AutoModelForSequenceClassification, TrainerCallback, TrainingArguments

from dsdistill.config.load import make_config
from dsdistill.data import Loader
from dsdistill.engine.prepare import prepare
from dsdistill.integrations import DistillTrainer

STEPS, ROWS = 4, 2  # before the last batch of an epoch, which has fewer rows; rows of a micro-batch


class InOrder(DistillTrainer):
    """InOrder is a Trainer that takes the examples in their order."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


class Enough(TrainerCallback):
    """Stops after STEPS; the schedule of learning rates is that of the whole run."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= STEPS


def rows_of(prepared, size: int) -> list[dict]:
    """Return the rows of the run's first steps, in the order in which it takes them."""
    loader = Loader(prepared.data.train, size, size, 1, 0, seed=0, pad_id=0)
    made = []
    for step in range(STEPS):
        (batch,) = loader.step(0, step)
        for ids, mask, label in zip(batch.input_ids, batch.mask, batch.labels, strict=True):
            made.append({"input_ids": ids[mask].tolist(), "labels": int(label)})
    return made


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    padded = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    labels = [row["labels"] for row in rows]
    return {
        "input_ids": torch.tensor(padded),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


def main(config: str, out: str) -> None:
    with open(config) as file:
        settings = yaml.safe_load(file)
    prepared = prepare(make_config(settings), world_size=1)
    train, ranks = settings["train"], int(os.environ.get("WORLD_SIZE", "1"))
    args = TrainingArguments(
        f"{out}-folder",
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=train["batch_size"] // (ROWS * ranks),
        max_steps=10,  # of the whole run
        warmup_steps=1,
        learning_rate=train["learning_rate"],
        weight_decay=0.01,
        adam_beta2=0.999,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    teacher, student = (
        AutoModelForSequenceClassification.from_pretrained(settings[name]["path"]).float()
        for name in ("teacher", "student")
    )
    trainer = InOrder(
        student,
        args,
        teacher=teacher,
        terms=settings["terms"],
        train_dataset=rows_of(prepared, train["batch_size"]),
        data_collator=collate,
        callbacks=[Enough()],
    )
    theirs = prepared.objectives[0].terms["hidden"].projectors
    trainer.distiller.objective.terms["hidden"].projectors.load_state_dict(theirs.state_dict())
    trainer.train()
    if not dist.is_initialized() or dist.get_rank() == 0:
        with open(out, "w") as file:
            json.dump([line for line in trainer.state.log_history if "loss" in line], file)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")))
