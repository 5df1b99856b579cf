"""Add features of the teacher's states to the student's input; later the student predicts them (domain mapping).

The published method names a map φ of the teacher's states to d' features, a fusion F(E, Z) into the student and an
aggregation over granularities, but gives no formulas. F as printed would need the teacher at inference. So this is the
project's own reading: the student predicts Z from its own embeddings E, and evaluation always uses the prediction.
"""

import os

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsdistill.config import UserError
from dsdistill.models.build import architecture
from dsdistill.models.capture import layer_list
from dsdistill.models.trace import DomainTrace, Trace

STUDENT, FUSION = "student", "domain.safetensors"  # of an exported folder


class TeacherMap(nn.Module):
    """Compute φ of one teacher layer: layer norm without parameters, then its first d' principal components; frozen.

    Z = C (norm(h) − μ) / s with orthonormal rows C and one scale s, so that Z's mean variance is 1. The map is not
    trained, because it would collapse to 0 if it were trained together with the student that should match it.
    """

    components: Tensor  # (d', D)
    mean: Tensor  # (D,)
    scale: Tensor  # ()

    def __init__(self, teacher_width: int, width: int):
        super().__init__()
        self.register_buffer("components", torch.zeros(width, teacher_width))
        self.register_buffer("mean", torch.zeros(teacher_width))
        self.register_buffer("scale", torch.ones(()))

    def fit(self, count: float, total: Tensor, products: Tensor) -> None:
        """Fit the map to `count` normed states, given their sum (D,) and sum of outer products (D, D), float64."""
        mean = total / count
        values, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
        width = len(self.components)
        rows = vectors.flip(1)[:, :width].T
        # A component's sign is arbitrary. Its largest entry is made positive, so that all machines agree.
        rows = rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
        self.components.copy_(rows)
        self.mean.copy_(mean)
        self.scale.copy_(values.flip(0)[:width].clamp_min(0).mean().sqrt().clamp_min(1e-6))

    @torch.no_grad()
    def forward(self, states: Tensor) -> Tensor:
        """Return φ of states (B, N, D), as (B, N, d') float32."""
        components, mean, scale = (x.float() for x in (self.components, self.mean, self.scale))
        return (normed(states) - mean) @ components.T / scale


def normed(states: Tensor) -> Tensor:
    return F.layer_norm(states.float(), states.shape[-1:])


class DomainFusion(nn.Module):
    """Compute F: x = E + g ⊙ P Ẑ with g = σ(W [E; Ẑ]), where Ẑ is the teacher's Z or the student's prediction of it.

    P starts at 0, so the student begins unchanged. In training an example uses Z if its random number Batch.chance is
    below `share`, which the trainer lowers from 1 to 0 over a stage. Evaluation uses the prediction.
    """

    def __init__(self, width: int, student_width: int, teacher_width: int, layers: tuple[int, ...]):
        """Make a fusion. layers: the teacher layers that are mapped; Z is the map of the last of them."""
        super().__init__()
        self.layers = layers
        self.maps = nn.ModuleDict({str(layer): TeacherMap(teacher_width, width) for layer in layers})
        self.predictor = nn.Sequential(
            nn.Linear(student_width, student_width), nn.GELU(), nn.Linear(student_width, width)
        )
        self.gate = nn.Linear(student_width + width, student_width)
        self.lift = nn.Linear(width, student_width, bias=False)
        nn.init.zeros_(self.lift.weight)
        self.share = 1.0
        # Z (B, N, d'), and which tokens use it, (B, 1) or (B, N) bool
        self._given: tuple[Tensor, Tensor] | None = None
        self._predicted: Tensor | None = None

    def attach(self, model: PreTrainedModel) -> None:
        """Let every forward pass of the model replace E, the input of its first layer, by x."""
        layers = layer_list(model)
        assert layers is not None  # the probe has refused all models without a list of layers
        layers[0].register_forward_pre_hook(self._fuse, with_kwargs=True)

    def targets(self, teacher: Trace) -> dict[int, Tensor]:
        """Return φ of each mapped layer, (B, N, d')."""
        return {layer: self.maps[str(layer)](teacher.hidden[layer]) for layer in self.layers}

    def prepare(self, teacher: Trace | None, chance: Tensor | None) -> dict[int, Tensor]:
        """Prepare a forward pass with the teacher's targets (only in training), and return the targets.

        chance: (B, 1) or (B, N), each token's random number; it is the same for all tokens of an example.
        """
        targets = {} if teacher is None or not self.training else self.targets(teacher)
        self._given = (
            (targets[self.layers[-1]], chance < self.share) if targets and chance is not None else None
        )
        return targets

    def trace(self, targets: dict[int, Tensor], shape: torch.Size) -> DomainTrace:
        """Return the trace of the forward pass after prepare(). shape: (B, N), also if packed rows ran as one row."""
        predicted, self._predicted = self._predicted, None
        assert predicted is not None  # each forward pass makes a prediction, and this takes it once
        return DomainTrace(targets, predicted.reshape(*shape, predicted.shape[-1]))

    def forward(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Return x (B, N, D) and the prediction (B, N, d') of E (B, N, D)."""
        predicted = self.predictor(embedded)
        known = predicted
        if (
            self._given is not None
        ):  # kept until the next forward pass: a checkpointed layer runs again in backward
            target, chosen = self._given
            chosen = chosen.expand(target.shape[:-1]).reshape(predicted.shape[:-1])
            target = target.to(predicted.dtype).reshape(predicted.shape)
            known = torch.where(chosen[..., None], target, predicted)
        gate = torch.sigmoid(self.gate(torch.cat([embedded, known], dim=-1)))
        return embedded + gate * self.lift(known), predicted

    def _fuse(self, layer, args, kwargs):
        embedded = args[0] if args else kwargs["hidden_states"]
        fused, self._predicted = self(embedded)
        return ((fused, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": fused})


class Aggregate(nn.Module):
    """Compute Y = Σ_k σ(u_k · v_k + b_k) v_k over the mean token, pooled phrases, and the first or last token."""

    def __init__(self, width: int):
        super().__init__()
        self.attend = nn.Linear(width, 1, bias=False)
        self.gates = nn.ModuleList(nn.Linear(width, 1) for _ in range(3))

    def forward(self, mean: Tensor, phrases: Tensor, mask: Tensor, end: Tensor) -> Tensor:
        """Return Y (B, D) of mean (B, D), phrases (B, K, D) with mask (B, K) bool, and end (B, D); K may be 0."""
        scores = self.attend(phrases)[..., 0].masked_fill(~mask, torch.finfo(phrases.dtype).min)
        shares = scores.softmax(-1) if mask.shape[1] else scores
        pooled = (shares.masked_fill(~mask, 0)[..., None] * phrases).sum(1)
        return sum(
            torch.sigmoid(gate(v)) * v for gate, v in zip(self.gates, (mean, pooled, end), strict=True)
        )


def load_exported(folder: str) -> PreTrainedModel:
    """Return the student that `dsdistill export` wrote, with its fusion: a transformers model that needs no teacher.

    FOLDER/student alone lacks the fusion and would predict something else. For this reason from_pretrained cannot load
    FOLDER.
    """
    path = os.path.join(folder, STUDENT)
    config = architecture(path, None, folder)
    name = str(next(iter(config.architectures or ()), None))
    kind = getattr(transformers, name, None)
    if not (
        isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.config_class is type(config)
    ):
        raise UserError(path, f"architecture {name!r}", f"a model of type {config.model_type}")
    model = kind.from_pretrained(path, config=config, use_safetensors=True)
    weights = load_file(os.path.join(folder, FUSION))
    width, student_width = weights["predictor.2.weight"].shape
    fusion = DomainFusion(width, student_width, student_width, ())
    fusion.load_state_dict(weights)
    fusion.to(model.dtype)
    fusion.attach(model)
    model.domain = fusion  # so that .to() and .eval() reach it
    return model.eval()
