"""Make the contenders of the step benchmark: the engine's own step with more and more levels on, and its rivals.

Each makes a teacher and a student with random weights (the same in all) and returns the loss of a batch.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from dsdistill.alignment.layer_map import layer_map
from dsdistill.alignment.objective import Objective
from dsdistill.alignment.probing import check_pair
from dsdistill.config.schema import Config
from dsdistill.config.terms import Terms
from dsdistill.data.batch import Batch
from dsdistill.distributed import deepspeed
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.module import StudentModule
from dsdistill.engine.prepare import make_objectives, make_pair
from dsdistill.engine.teacher import LazyTeacher
from dsdistill.models.build import build_model, for_task

LEVELS = ("logits", "hidden", "attention", "pairwise")  # each includes all before it
RIVALS = ("eager", "textbrewer")  # logits, hidden states and attention from materialised maps
ARMS = (*LEVELS, *RIVALS)
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # names in a config
TEMPERATURE = 2.0
TEACHER_SEED, STUDENT_SEED = 0, 1


@dataclass(frozen=True)
class Sizes:
    """Sizes describes a pair of BERT encoders with a head of two classes."""

    teacher: int = 6  # layers
    student: int = 3
    width: int = 384
    heads: int = 12
    vocabulary: int = 30522
    tokens: int = 512  # the longest sequence
    step: int = 2048  # tokens of a step
    rows: int = 0  # rows of a sequence that attention and pairwise compare; 0: all
    task: ClassVar[str] = "classification"

    def models(self) -> tuple[PretrainedConfig, PretrainedConfig]:
        """Return the student's architecture and the teacher's."""
        return self.architecture(self.student), self.architecture(self.teacher)

    def architecture(self, depth: int) -> PretrainedConfig:
        """Return an encoder without dropout: attention dropout would switch SDPA's fused kernels off."""
        config = AutoConfig.for_model(
            "bert",
            num_hidden_layers=depth,
            hidden_size=self.width,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.tokens,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return for_task(config, "classification", ("a", "b"), 0)

    def pairs(self, mapped: int) -> tuple[tuple[int, int], ...]:
        """Return the last `mapped` pairs of the uniform layer map."""
        return layer_map("uniform", self.student, self.teacher)[-mapped:]

    def batch(self, tokens: int, device: torch.device) -> Batch:
        """Return as many whole sequences as make a step."""
        generator = torch.Generator().manual_seed(tokens)
        shape = max(1, self.step // tokens), tokens
        ids = torch.randint(1, self.vocabulary, shape, generator=generator)
        mask, labels = torch.ones(shape, dtype=torch.bool), torch.zeros(shape[0], dtype=torch.int64)
        return Batch(ids, mask, labels).to(device)


@dataclass(frozen=True)
class Decoders(Sizes):
    """Decoders describes a pair of causal language models with a narrower student."""

    teacher: int = 24
    student: int = 6
    width: int = 1024  # the teacher's
    student_width: int = 768
    heads: int = 16
    tokens: int = 4096
    step: int = 4096
    task: ClassVar[str] = "causal_lm"

    def models(self) -> tuple[PretrainedConfig, PretrainedConfig]:
        student, teacher = (
            AutoConfig.for_model(
                "llama",
                num_hidden_layers=depth,
                hidden_size=width,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                intermediate_size=4 * width,
                vocab_size=self.vocabulary,
                max_position_embeddings=self.tokens,
            )
            for depth, width in ((self.student, self.student_width), (self.teacher, self.width))
        )
        return student, teacher

    def batch(self, tokens: int, device: torch.device) -> Batch:
        """Return as many whole sequences as make a step; every token but the first of each is to be predicted."""
        plain = super().batch(tokens, torch.device("cpu"))
        places = torch.arange(plain.input_ids.numel())
        counted = places[places % tokens > 0]
        return dataclasses.replace(plain, labels=plain.input_ids, counted=counted).to(device)


def terms(level: str, pairs: tuple[tuple[int, int], ...], rows: int) -> dict[str, dict]:
    layers = [list(pair) for pair in pairs]
    sampled = {"layers": layers, "rows": rows or None}
    all_terms = {
        "logits": {"soft_label": {"temperature": TEMPERATURE}},
        "hidden": {"hidden": {"layers": layers}},
        "attention": {"attention": sampled},
        "pairwise": {"pairwise": sampled},
    }
    chosen = LEVELS[: LEVELS.index(level) + 1]
    return {name: term for part in chosen for name, term in all_terms[part].items()}


def engine_step(
    level: str, sizes: Sizes, mapped: int, dtype: str, device: torch.device
) -> tuple[nn.Module, Callable[[Batch], Tensor]]:
    """Return the student's module and the loss of a batch, made from the same parts as a run (engine/train.py)."""
    precision = PRECISIONS[dtype]
    config = Config.model_validate(
        {
            "task": sizes.task,
            "run": {"seed": TEACHER_SEED},
            "teacher": {"config": {"model_type": "bert"}, "zero_stage": 0},
            "student": {"config": {"model_type": "bert"}},
            "terms": terms(level, sizes.pairs(mapped), sizes.rows),
            "train": {"dtype": precision},
        }
    )
    student, teacher = sizes.models()
    pair = make_pair(config, student, teacher, sizes.vocabulary)
    (objective,) = make_objectives(config, pair)
    geometry = check_pair(config.task, student, teacher, (objective,))
    guide = LazyTeacher(config, teacher, (objective,), Ranks(0, 1, device)).tracer((objective,))
    torch.manual_seed(STUDENT_SEED)
    model = build_model(student, None, sizes.task, "student", needs_head=False)
    module = StudentModule(
        model, objective, Objective(Terms(task={}), pair), teacher=guide, geometry=geometry
    )
    module = module.to(device, deepspeed.DTYPES[precision]).train()

    def loss(batch: Batch) -> Tensor:
        with module.traces(batch) as traces:
            return module(batch, module.counts([batch]), *traces).total

    return module, loss


def eager_models(sizes: Sizes, dtype: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Return teacher and student as transformers builds them for attention maps, with the weights of `engine_step`."""
    models = []
    for seed, depth in ((TEACHER_SEED, sizes.teacher), (STUDENT_SEED, sizes.student)):
        torch.manual_seed(seed)
        model = build_model(sizes.architecture(depth), None, "classification", "model", needs_head=False)
        model.set_attn_implementation("eager")
        models.append(model.to(device, getattr(torch, dtype)))
    return models[0].eval().requires_grad_(False), models[1].train()


def inputs(batch: Batch) -> dict[str, Tensor]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.mask.long()}


def eager_step(
    sizes: Sizes, mapped: int, dtype: str, device: torch.device
) -> tuple[nn.Module, Callable[[Batch], Tensor]]:
    """Return the level "attention" in plain PyTorch, from the hidden states and attention maps of transformers."""
    teacher, student = eager_models(sizes, dtype, device)
    pairs = sizes.pairs(mapped)
    maps = {"output_hidden_states": True, "output_attentions": True}

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            theirs = teacher(**inputs(batch), **maps)
        mine = student(**inputs(batch), **maps)
        soft = F.kl_div(
            F.log_softmax(mine.logits.float() / TEMPERATURE, -1),
            F.log_softmax(theirs.logits.float() / TEMPERATURE, -1),
            log_target=True,
            reduction="batchmean",
        )
        total = TEMPERATURE**2 * soft
        both = ((0, 0), *pairs)
        hidden = [F.mse_loss(mine.hidden_states[s].float(), theirs.hidden_states[t].float()) for s, t in both]
        total = total + sum(hidden) / len(hidden)
        valid = batch.mask.sum() * sizes.heads
        attention = [
            F.kl_div(
                mine.attentions[s - 1].float().clamp(min=1e-12).log(),
                theirs.attentions[t - 1].float(),
                reduction="sum",
            )
            for s, t in pairs
        ]
        return total + sum(attention) / (valid * len(pairs))

    return student, loss


def textbrewer_step(
    sizes: Sizes, mapped: int, dtype: str, device: torch.device
) -> tuple[nn.Module, Callable[[Batch], Tensor]]:
    """Return the level "attention" by TextBrewer, whose attention loss is the squared difference of the maps."""
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

    teacher, student = eager_models(sizes, dtype, device)
    pairs = sizes.pairs(mapped)
    matches = [
        {"layer_S": s, "layer_T": t, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
        for s, t in ((0, 0), *pairs)
    ]
    matches += [
        {"layer_S": s - 1, "layer_T": t - 1, "feature": "attention", "loss": "attention_mse", "weight": 1}
        for s, t in pairs
    ]

    def adaptor(batch, outputs):
        return {
            "logits": outputs.logits,
            "hidden": outputs.hidden_states,
            "attention": outputs.attentions,
            "inputs_mask": batch["attention_mask"],
        }

    distiller = GeneralDistiller(
        # TextBrewer makes this folder at once, and would write checkpoints there.
        TrainingConfig(device=str(device), output_dir=tempfile.mkdtemp(), log_dir=None),
        DistillationConfig(temperature=TEMPERATURE, intermediate_matches=matches),
        teacher,
        student,
        adaptor,
        adaptor,
    )
    maps = {"output_hidden_states": True, "output_attentions": True}
    return student, lambda batch: distiller.train_on_batch(inputs(batch), maps)[0]


def make(
    arm: str, sizes: Sizes, mapped: int, dtype: str, device: torch.device
) -> tuple[nn.Module, Callable[[Batch], Tensor]]:
    """Return the trained module and the loss of a batch."""
    made = {"eager": eager_step, "textbrewer": textbrewer_step}.get(arm, functools.partial(engine_step, arm))
    return made(sizes, mapped, dtype, device)
