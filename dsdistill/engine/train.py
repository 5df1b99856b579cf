"""A run from its config to its summary."""

import logging
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import get_scheduler

from dsdistill.data import Batch, Loader, evaluation_batches
from dsdistill.engine import checkpoint, deepspeed
from dsdistill.engine.module import StudentModule
from dsdistill.engine.prepare import Prepared
from dsdistill.engine.ranks import Ranks
from dsdistill.engine.run_folder import RunFolder
from dsdistill.engine.teacher import Teacher, count_parameters
from dsdistill.evaluation.evaluate import evaluate
from dsdistill.models.build import build

log = logging.getLogger("dsdistill")

BAD_STEPS = 3  # losses in a row that are not finite before the run ends


class TrainingError(RuntimeError):
    """The run cannot go on; its checkpoints are as they were."""


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # of training, evaluation and saving apart
    tokens: int = 0  # valid tokens trained on, all ranks


class Trainer:
    """One student in training.

    teacher: None trains on the task alone. judge: the teacher that evaluation compares with (the same, or one
    that a baseline does not learn from).
    """

    def __init__(
        self,
        prepared: Prepared,
        init: str | None,
        teacher: Teacher | None,
        judge: Teacher | None,
        ranks: Ranks,
    ):
        config = prepared.config
        self.prepared, self.config, self.teacher, self.judge, self.ranks = (
            prepared,
            config,
            teacher,
            judge,
            ranks,
        )
        torch.manual_seed(config.run.seed)
        model = build(prepared.student, init, config.task, "student", needs_head=False)
        model.config.use_cache = False
        if config.student.gradient_checkpointing:
            # Newer transformers have another name for it, 5.17 knows this one alone.
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.parameters = count_parameters(model)
        objective = prepared.objective.requires_grad_(True)
        self.module = StudentModule(model, objective, prepared.evaluation)
        self.loader = Loader(
            prepared.data.train,
            config.train.batch_size,
            config.train.micro_batch_size,
            ranks.world_size,
            ranks.rank,
            config.run.seed,
            prepared.tokenizer.pad_token_id,
        )
        self.steps = config.train.steps or config.train.epochs * self.loader.steps_per_epoch
        self.engine = deepspeed.student_engine(
            self.module.to(ranks.device), self.module.head_parameters(), config, ranks, self._schedule
        )
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # a run of the teacher's recipe may have come before
        torch.manual_seed(config.run.seed + ranks.rank)  # dropout differs between ranks
        self.progress = Progress()

    def _schedule(self, optimizer):
        train = self.config.train
        return get_scheduler(
            train.scheduler,
            optimizer,
            num_warmup_steps=int(train.warmup * self.steps),
            num_training_steps=self.steps,
        )

    def train_step(self, batches: list[Batch]) -> Tensor:
        """One optimizer step over this rank's micro-batches; (terms,) float64 raw values of the whole step."""
        batches = [batch.to(self.ranks.device) for batch in batches]
        objective = self.module.objective
        counts = torch.stack([objective.counts(batch, self.prepared.geometry) for batch in batches]).sum(0)
        counts = self.ranks.sum(counts)
        raw = torch.zeros(len(objective.terms), dtype=torch.float64, device=self.ranks.device)
        for batch in batches:
            loss, terms = self._loss(batch, counts)
            # Undoes DeepSpeed's mean over ranks and micro-batches: counts already are those of the whole step.
            self.engine.backward(loss * (self.ranks.world_size * len(batches)))
            self.engine.step()
            raw += terms
        return self.ranks.sum(raw)

    def _loss(self, batch: Batch, counts: Tensor) -> tuple[Tensor, Tensor]:
        if self.teacher is None:
            return self.engine(batch, None, counts)
        with self.teacher.trace(batch) as trace:
            return self.engine(batch, trace, counts)

    def run(self, folder: RunFolder) -> None:
        """Train to the last step, resuming where a checkpoint verifies."""
        with logging_redirect_tqdm():  # lines of the log above the bar, not in it
            self._run(folder)

    def _run(self, folder: RunFolder) -> None:
        config, every = self.config.run, self.config.run.save_every
        self._resume(folder)
        bar = tqdm(
            total=self.steps,
            initial=self.progress.step,
            desc=config.name,
            unit="step",
            disable=not self.ranks.first,
            mininterval=1.0,
            file=sys.stderr,
        )
        self.engine.train()
        bad = 0
        while self.progress.step < self.steps:
            started = time.perf_counter()
            batches = self.loader.step(*divmod(self.progress.step, self.loader.steps_per_epoch))
            rate = self.engine.get_lr()[0]
            raw = self.train_step(batches)
            tokens = torch.tensor(sum(int(b.mask.sum()) for b in batches), device=self.ranks.device)
            # Waits for the GPU, so it comes before the clock is read.
            self.progress.tokens += int(self.ranks.sum(tokens))
            self.progress.seconds += time.perf_counter() - started
            self.progress.step += 1
            step, last = self.progress.step, self.progress.step == self.steps
            bad = 0 if bool(raw.isfinite().all()) else bad + 1
            if bad == BAD_STEPS or (bad and last):
                values = dict(zip(self.module.objective.terms, raw.tolist(), strict=True))
                raise TrainingError(f"step {step}: {bad} loss(es) in a row are not finite: {values}")
            if step % config.log_every == 0 or last:
                self._log(folder, raw, rate, bar)
            bar.update()
            if config.evaluate_every and step % config.evaluate_every == 0 and not last:
                scores = self.evaluate()["student"]
                if self.ranks.first:
                    folder.log({"step": step, "evaluation": scores})
                self._monitor({f"Dev/{name}": value for name, value in scores.items()})
            if last or (every and step % every == 0 and not bad):  # never weights that a bad loss has touched
                checkpoint.save(self.engine, folder.path, step, vars(self.progress), self.ranks, config.keep)
        bar.close()

    def _resume(self, folder: RunFolder) -> None:
        tag = self.ranks.gather(checkpoint.newest(folder.path) if self.ranks.first else None)[0]
        if tag is not None:
            state = checkpoint.load(self.engine, folder.path, tag, self.ranks)
            self.progress = Progress(state["step"], state["seconds"], state["tokens"])
            log.info("resuming from %s", tag)
        if self.ranks.first:
            folder.rewind(self.progress.step)

    def _log(self, folder: RunFolder, raw: Tensor, rate: float, bar: tqdm) -> None:
        weights = self.module.objective.weights
        terms = {
            name: {"raw": value, "weighted": weight * value}
            for (name, weight), value in zip(weights.items(), raw.tolist(), strict=True)
        }
        loss = sum(term["weighted"] for term in terms.values())
        norm = self.engine.get_global_grad_norm()
        record = {
            "step": self.progress.step,
            "loss": loss,
            "terms": terms,
            "learning_rate": rate,
            "grad_norm": None if norm is None else float(norm),
            "tokens_per_second": round(self.progress.tokens / self.progress.seconds, 1),
            "peak_memory_mib": peak_memory_mib(self.ranks),
        }
        bar.set_postfix(loss=f"{loss:.4g}")
        if self.ranks.first:
            folder.log(record)
        self._monitor(
            {"Train/loss": loss} | {f"Train/{name}": term["weighted"] for name, term in terms.items()}
        )

    def _monitor(self, values: dict[str, float]) -> None:
        """To TensorBoard, W&B and the like, where student.deepspeed turns one on: DeepSpeed tells them rates alone."""
        if self.engine.monitor.enabled:
            step = self.progress.step * self.config.train.batch_size  # DeepSpeed's axis: examples
            self.engine.monitor.write_events([(name, value, step) for name, value in values.items()])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Scores of student and teacher on the dev set."""
        self.engine.eval()
        scores = score(self.engine, self.judge, self.prepared, self.ranks)
        self.engine.train()
        return scores


def score(
    student: Callable, teacher: Teacher | None, prepared: Prepared, ranks: Ranks
) -> dict[str, dict[str, float]]:
    """Scores on the dev set.

    student: a StudentModule in eval mode, or the engine around one.
    """
    batches = evaluation_batches(
        prepared.data.dev,
        prepared.config.train.micro_batch_size,
        ranks.world_size,
        ranks.rank,
        prepared.tokenizer.pad_token_id,
    )
    with torch.no_grad():
        return evaluate(
            student,
            teacher.trace if teacher is not None else None,
            lambda trace, batch: prepared.evaluation.terms["task"].sums(trace, None, batch),
            (batch.to(ranks.device) for batch in batches),
            task=prepared.config.task,
            gather=ranks.gather,
        )


def peak_memory_mib(ranks: Ranks) -> int:
    """This rank's peak: GPU memory where there is one, else resident memory."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
