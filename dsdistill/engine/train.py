"""Train one stage of a run: the loop of steps, with its log, evaluations and checkpoints."""

import contextlib
import copy
import logging
import resource
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import get_scheduler

from dsdistill.alignment.by_source import SourceLosses
from dsdistill.alignment.objective import BackendError, Loss, filled
from dsdistill.config import SharedError, UserError
from dsdistill.config.schema import EMBEDDING
from dsdistill.data import Ahead, Batch, Loader, Mixture, Streamed, StreamedLoader
from dsdistill.distributed import engines, stopping
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine import checkpoint, reweighing, stages
from dsdistill.engine.first_weights import base_digest, frozen_weights, read_student
from dsdistill.engine.guard import Guard
from dsdistill.engine.module import StudentModule, fused_layers, make_student
from dsdistill.engine.outcome import Later, Made
from dsdistill.engine.passes import stability
from dsdistill.engine.passes.dev_scores import represent, score
from dsdistill.engine.passes.predictions import Predictions
from dsdistill.engine.prepare import Prepared
from dsdistill.engine.run_folder import RunFolder
from dsdistill.engine.teacher_ahead import TeacherAhead
from dsdistill.models.tracer import Tracer, count_parameters

log = logging.getLogger("dsdistill")


@dataclass
class Progress:
    """Progress says how far a run has come."""

    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # of training, without evaluation and saving
    tokens: int = 0  # valid tokens trained on, all ranks
    losses: float = 0.0  # summed over the steps since the last evaluation
    counted: int = 0  # number of those steps


class _Forgiving:
    """A _Forgiving stream ignores failed writes (a full disk, a closed terminal), so that they do not end the run."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


class Trainer:
    """A Trainer trains the student in one stage.

    index: that of the stage. init: path of the student's first weights (None: random). before: path of the previous
    stage's weights (stages.hand_over); None in the first. teacher: None trains on the task alone. judge: the teacher
    that evaluation compares with (the same, or one that a baseline does not learn from).
    """

    def __init__(
        self,
        prepared: Prepared,
        index: int,
        init: str | None,
        before: str | None,
        teacher: Tracer | None,
        judge: Tracer | None,
        ranks: Ranks,
    ):
        config = prepared.config
        self.prepared, self.config, self.judge, self.ranks = prepared, config, judge, ranks
        self.index, self.stage = index, config.run_stages[index]
        objective = prepared.objectives[index].requires_grad_(True)
        previous = None
        if before is not None and objective.needs("previous"):
            layers = objective.layers("student_hidden")
            previous = stages.earlier_student(config, prepared.student, init, before, layers, ranks)
        torch.manual_seed(config.run.seed)

        def make(dtype: torch.dtype) -> StudentModule:
            return make_student(
                config,
                self.stage,
                prepared.student,
                init,
                prepared.pair,
                objective,
                prepared.evaluation,
                fused_layers(prepared.objectives),
                checkpointing=config.student.gradient_checkpointing,
                dtype=dtype,
                teacher=teacher if objective.needs("teacher") else None,
                previous=previous,
                geometry=prepared.geometry,
            )

        self.module = read_student(make, config, prepared.student, init, ranks, anew=before is not None)
        fusion = self.module.domain
        if fusion is not None and prepared.maps is not None:
            fusion.maps.load_state_dict(prepared.maps)
        self.parameters = count_parameters(self.module.model)
        self.parameters += count_parameters(fusion) if fusion is not None else 0
        if before is not None:
            stages.load_weights(self.module, before)
        self.loader = (StreamedLoader if isinstance(prepared.data.train, Streamed) else Loader)(
            prepared.data.train,
            config.train.batch_size,
            config.train.micro_batch_size,
            ranks.world_size,
            ranks.rank,
            config.run.seed,
            prepared.tokenizer.pad_token_id,
            config.train.group_by_length,
            prepared.sampler,
            chances=config.student.domain is not None,
            mixup=config.data.mixup,
        )
        self.total = config.train.steps or config.train.epochs * self.loader.steps_per_epoch
        ends = stages.ends(config, self.total)
        self.start, self.end = (0, *ends)[index], ends[index]
        objective.begin(self.end - self.start)
        self.base = base_digest(config, init)
        self.frozen = frozen_weights(self.module, config, ranks)
        self.engine = engines.student_engine(
            self.module.to(ranks.device),
            list(objective.parameters()),
            config,
            self.stage.learning_rate or config.train.learning_rate,
            ranks,
            self._schedule,
            self.module.base,
        )
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # the teacher's recipe may have trained in this process
        # Dropout differs between ranks, and between stages.
        torch.manual_seed(config.run.seed + ranks.rank + index * ranks.world_size)
        self.progress = Progress(self.start)
        self._saving: checkpoint.Saving | None = None  # the checkpoint that a thread writes during training
        overlaps = self.module.teacher is not None and config.teacher.overlap
        self._teacher_ahead = TeacherAhead(self.module.teacher, ranks.device) if overlaps else None
        self.step_size: dict[str, int] = {}  # documents and tokens of the latest step, all ranks

    def _schedule(self, optimizer):
        stage, train, steps = self.stage, self.config.train, self.end - self.start
        warmup = train.warmup if stage.warmup is None else stage.warmup
        return get_scheduler(
            stage.scheduler or train.scheduler,
            optimizer,
            num_warmup_steps=int(warmup * steps),
            num_training_steps=steps,
        )

    def train_step(self, batches: list[Batch], following: Batch | None = None) -> Tensor:
        """Make one optimizer step from this rank's micro-batches; return (parts,) float64, their summed raw values.

        following: the first micro-batch of the next step, for a teacher that runs ahead.
        """
        batches = [batch.to(self.ranks.device) for batch in batches]
        counts = self.module.counts(batches)
        if self.module.domain is not None:  # depends on the step alone, so that a resume goes on exactly
            done = (self.progress.step - self.start) / (self.end - self.start)
            self.module.domain.share = 1 - done
        raw = torch.zeros(len(counts), dtype=torch.float64, device=self.ranks.device)
        for batch, then in zip(batches, [*batches[1:], following], strict=True):
            if self._teacher_ahead is not None:
                self._teacher_ahead.go(batch, then)
            loss, parts = self._loss(batch, counts)
            # This undoes DeepSpeed's mean over ranks and micro-batches: the loss is already divided by counts of the
            # whole step.
            self.engine.backward(loss * (self.ranks.world_size * len(batches)))
            self.engine.step()
            raw += parts
        return raw

    def _loss(self, batch: Batch, counts: Tensor) -> Loss:
        # The teacher runs outside the engine, which under ZeRO-3 gathers the student before its forward pass begins.
        made = self._teacher_ahead.trace if self._teacher_ahead is not None else None
        with self.module.traces(batch, made) as traces:
            return self.engine(batch, counts, *traces)

    def run(self, folder: RunFolder, tag: str | None = None) -> None:
        """Train to the stage's last step, from this stage's checkpoint `tag` if there is one."""
        try:
            with logging_redirect_tqdm():  # log lines go above the bar, not into it
                self._resume(folder, tag)
                with self._bar() as bar, stopping.training():  # the bar is closed before messages are printed
                    self._run(folder, bar)
        except BackendError as error:  # some appear only at the first call
            raise UserError("train.backend", str(error), "auto, or a backend that runs every term") from None
        except Exception as error:
            place = f"rank {self.ranks.rank}, step {self.progress.step + 1}"
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            error.add_note(f"dsdistill: {place}: {told}")  # becomes the last line of a traceback
            raise

    def _bar(self) -> tqdm:
        """Return the progress bar: steps done, the time left, and the values that `_log` set last."""
        self._shown = copy.copy(self.progress)
        return tqdm(
            total=self.total,
            initial=self.progress.step,
            desc=f"{self.config.run.name} {self.stage.name}" if self.config.stages else self.config.run.name,
            unit="step",
            disable=not self.ranks.first,
            mininterval=1.0,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            file=_Forgiving(sys.stderr),
        )

    def _pace(self) -> tuple[float, float]:
        """Return seconds per step and tokens per second since the last logged step.

        The clock was read when a step had already waited for the device, so nothing waits here.
        """
        now, before = self.progress, self._shown
        seconds, self._shown = max(now.seconds - before.seconds, 1e-9), copy.copy(now)
        return seconds / max(1, now.step - before.step), (now.tokens - before.tokens) / seconds

    def _run(self, folder: RunFolder, bar: tqdm) -> None:
        points = stability.points(self.config.evaluation.rcs, self.total)
        self.engine.train()
        guard = Guard(self.config.train.bad_steps, folder.path, self.ranks)
        self._saved = time.monotonic()
        ahead = Ahead(self.loader, self.end, pinned=self.ranks.device.type == "cuda")
        with contextlib.closing(ahead):
            try:
                given = self.prepared, ahead, folder, self.ranks, self.progress.step
                self._reweighed = reweighing.begin(*given, self.evaluate)
                self._steps(ahead, guard, points, folder, bar)
            except SharedError:  # raised on every rank: the checkpoint that is being written is kept
                self._finish_saving()
                raise

    def _steps(
        self, ahead: Ahead, guard: Guard, points: Collection[int], folder: RunFolder, bar: tqdm
    ) -> None:
        # The step before, if its results have not been read yet. If they say that the run is to stop, one more step
        # has been made by then, and nothing is saved if that one is not finite.
        behind: Made | None = None
        batches: list[Batch] | None = None
        while self.progress.step < self.end:
            if batches is None:
                batches = ahead.step(self.progress.step)
            following = None
            if self._teacher_ahead is not None and self.progress.step + 1 < self.end:
                following = ahead.step(self.progress.step + 1)
            made = self._timed_step(batches, following[0] if following else None)
            batches = following
            due = ending = False
            if behind is not None:
                _, due, ending = self._settle(behind, guard)
                behind = None
            if self._waits and not (due or ending or self._asked(points)):
                behind = made
                bar.update()
                continue
            finite, due_now, ending_now = self._settle(made, guard)
            self._log(folder, made, bar)
            bar.update()
            if self.progress.step in points:
                states = self._judging(represent, self.engine, self.prepared, self.ranks)
                stability.keep(folder.path, self.progress.step, states, self.ranks)
            self._evaluate(folder)
            self._save(folder, finite, due or due_now, ending or ending_now)

    @property
    def _waits(self) -> bool:
        """Return whether reading a step's results would wait for a GPU, and can be put off until the next step's end.

        Layer weights that move need every step's results at once.
        """
        return self.ranks.device.type == "cuda" and not self.module.objective.moves

    def _asked(self, points: Collection[int]) -> bool:
        """Return whether the latest step's results are needed now, for the log, an evaluation or a checkpoint."""
        step, every = self.progress.step, (self._evaluate_every, self.config.run.save_every)
        return self._logged(step) or step in points or any(n and step % n == 0 for n in every)

    @property
    def _evaluate_every(self) -> int:
        every = self.config.run.evaluate_every
        return self.loader.steps_per_epoch if every == "epoch" else every

    @property
    def _last(self) -> bool:
        return self.progress.step == self.end

    def _timed_step(self, batches: list[Batch], following: Batch | None = None) -> Made:
        """Make a step; return its results without waiting for the device."""
        started = time.perf_counter()
        self.module.watch = self._watch()
        rate, skipped = self.engine.get_lr()[0], self.engine.skipped_steps
        raw = self.train_step(batches, following)
        # Whether a checkpoint is due, by rank 0's clock.
        due = self.ranks.first and 0 < self.config.run.save_minutes * 60 <= time.monotonic() - self._saved
        tokens = sum(int(b.mask.sum()) for b in batches)  # the loader leaves masks on the host: no wait
        documents = sum(int(b.documents.sum()) for b in batches)
        written = self._saving is not None and self._saving.written
        told = filled([tokens, documents, due, written, *stopping.votes()], raw)
        values = Later(self.ranks.sum(torch.cat([raw, told])))
        self.progress.step += 1
        self.progress.seconds += time.perf_counter() - started
        gradient = engines.step_gradient(self.engine, skipped)
        return Made(self.progress.step, rate, batches, values, len(raw), gradient)

    def _settle(self, made: Made, guard: Guard) -> tuple[bool, bool, bool]:
        """Read and count a step's results; update layer weights if the step is finite.

        Returns whether loss and gradient are finite, whether a checkpoint is due by the clock, and whether the ranks
        have agreed to stop.
        """
        started = time.perf_counter()
        raw, told = made.values.read().split([made.parts, len(made.values.host) - made.parts])
        tokens, documents, due, written, *votes = map(int, told.tolist())
        self.step_size = {"documents": documents, "tokens": tokens}
        self.progress.tokens += tokens
        made.report = self.module.objective.report(raw)
        last = made.step == self.end
        finite = guard.finite(made.step, made.report, made.batches, last, made.gradient.finite())
        if finite:
            self.module.objective.update(raw)
            self.progress.losses += sum(term["weighted"] for term in made.report.values())
            self.progress.counted += 1
        self.progress.seconds += time.perf_counter() - started
        # A step from before this save began can only tell of an earlier save.
        if self._saving is not None and made.step > self._saving.step and written == self.ranks.world_size:
            self._finish_saving()
        return finite, bool(due), stopping.agreed(votes)

    def _evaluate(self, folder: RunFolder) -> None:
        """Score the student if an evaluation is due after this step."""
        step, every = self.progress.step, self._evaluate_every
        if not every or step % every:
            return
        scores = self._reweighed(step, self.evaluate())["student"]
        mean = self.progress.losses / max(1, self.progress.counted)
        self.progress.losses, self.progress.counted = 0.0, 0
        if self.ranks.first:
            folder.log({"step": step, "training_loss": mean, "evaluation": scores})
        self._monitor({f"Dev/{name}": value for name, value in scores.items()})

    def _save(self, folder: RunFolder, finite: bool, due: bool, ending: bool) -> None:
        """Save a checkpoint if one is due; raise Stopped if the run was told to end."""
        step, every = self.progress.step, self.config.run.save_every
        if ending and not finite:
            raise stopping.stopped(f"step {step}, which is not finite: ", ", not saved")
        due = due or ending or (every and step % every == 0)
        if not (self._last or (due and finite)):  # never save after a step that is not finite
            return
        state = {
            "stage": self.index,
            "objective": self.module.objective.state(),
            "zero_stage": self.config.student.zero_stage,
            "base": self.base,
            "at_once": self.config.train.micro_batch_size * self.ranks.world_size,
            **vars(self.progress),
        }
        self._finish_saving()  # one at a time
        try:
            with stopping.saving():
                later = self.config.run.save_async and not (self._last or ending)
                saving = checkpoint.begin(
                    self.engine, folder.path, step, state, self.ranks, later=later, frozen=self.frozen
                )
                if later:
                    self._saving = saving
                else:
                    saving.finish(self.config.run.keep)
        except checkpoint.Unsaved as error:
            if self._last or ending:
                raise checkpoint.Unsaved(f"step {step}: {error}") from None
            log.warning("step %d: %s; training continues", step, error)
        self._saved = time.monotonic()
        if ending:
            raise stopping.stopped(f"step {step}: ", f", saved as {checkpoint.tag_of(step)}")

    def _finish_saving(self) -> None:
        """Wait for the checkpoint that is being written, if there is one; a resume uses it from now on."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            with stopping.saving():
                saving.finish(self.config.run.keep)
        except checkpoint.Unsaved as error:
            log.warning("step %d: %s; training continues", saving.step, error)

    def _resume(self, folder: RunFolder, tag: str | None) -> None:
        if tag is not None:
            config = self.config
            checkpoint.check_base(folder.path, tag, self.base)
            state = checkpoint.load(
                self.engine, folder.path, tag, self.ranks, config.student.zero_stage, config.run.seed
            )
            self.progress = Progress(**{name: state[name] for name in vars(self.progress)})
            self.module.objective.restore(state["objective"])
            log.info("resuming from %s", tag)
        with self.ranks.first_alone():
            if self.ranks.first:
                folder.rewind(self.progress.step)

    def _logged(self, step: int) -> bool:
        return step % self.config.run.log_every == 0 or step == self.end

    def _watch(self) -> SourceLosses | None:
        """Return what sums the losses of each source in the next step; None if there is one source, or no log line."""
        train = self.prepared.data.train
        # The task loss of texts without labels exists for pairs only, and depends on which pairs share a batch.
        if self.config.task == EMBEDDING:
            return None
        if not isinstance(train, Mixture) or not self._logged(self.progress.step + 1):
            return None
        return SourceLosses(self.prepared.pair, len(train.parts))

    def _sources(self) -> dict[str, dict]:
        """Return the loss of each source in the latest step, for the log."""
        train, watch = self.prepared.data.train, self.module.watch
        if watch is None or not isinstance(train, Mixture):
            return {}
        sums = self.ranks.sum(watch.sums.to(self.ranks.device)).tolist()
        return {
            "sources": {
                name: {"loss": loss / count if count else None, "count": int(count)}
                for name, (loss, count) in zip(train.names, sums, strict=True)
            }
        }

    def _log(self, folder: RunFolder, made: Made, bar: tqdm) -> None:
        """Write a line of metrics.jsonl if the step is to be logged."""
        if not self._logged(self.progress.step):
            return
        terms = made.report
        loss = sum(term["weighted"] for term in terms.values())
        norm, memory = self.engine.get_global_grad_norm(), peak_memory_mib(self.ranks)
        pace, rate = self._pace()
        record = {
            "step": self.progress.step,
            **({"stage": self.stage.name} if self.config.stages else {}),
            "loss": loss,
            "terms": terms,
            "learning_rate": made.rate,
            "grad_norm": None if norm is None else float(norm),
            **self.step_size,
            **self._sources(),
            "tokens_per_second": round(self.progress.tokens / self.progress.seconds, 1),
            "recent_tokens_per_second": round(rate, 1),  # since the line before
            "peak_memory_mib": memory,
        }
        bar.set_postfix_str(f"loss={loss:.4g}, {pace:.3g} s/step, {rate:,.0f} tokens/s, {memory:,} MiB")
        if self.ranks.first:
            folder.log(record)
        self._monitor(
            {"Train/loss": loss} | {f"Train/{name}": term["weighted"] for name, term in terms.items()}
        )

    def _monitor(self, values: dict[str, float]) -> None:
        """Write values to TensorBoard, W&B and the like, if student.deepspeed enables one.

        DeepSpeed itself writes only learning rates there.
        """
        if self.engine.monitor.enabled:
            step = self.progress.step * self.config.train.batch_size  # DeepSpeed's axis: examples
            self.engine.monitor.write_events([(name, value, step) for name, value in values.items()])

    def evaluate(self, predictions: Predictions | None = None) -> dict[str, dict[str, float]]:
        """Return the scores of student and teacher on the dev sets; predictions: collects the models' outputs."""
        return self._judging(score, self.engine, self.judge, self.prepared, self.ranks, predictions)

    def _judging(self, function: Callable, *arguments):
        """Call a function with the student in evaluation mode."""
        self.engine.eval()
        try:
            return function(*arguments)
        finally:
            self.engine.train()


def peak_memory_mib(ranks: Ranks) -> int:
    """Return this rank's peak in MiB: GPU memory if it has a GPU, else resident memory."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
