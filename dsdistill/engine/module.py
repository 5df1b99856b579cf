"""The module that DeepSpeed wraps: student, projectors and objective."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from dsdistill.alignment.objective import Objective
from dsdistill.alignment.units import mean_pool
from dsdistill.config.schema import LANGUAGE
from dsdistill.data.batch import Batch
from dsdistill.models.build import Headless
from dsdistill.models.capture import Capture
from dsdistill.models.domain_fusion import DomainFusion
from dsdistill.models.forward import trace
from dsdistill.models.trace import Trace


class StudentModule(nn.Module):
    """Everything trainable in one module, so that every parameter is gathered and saved by the same hooks."""

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        evaluation: Objective,
        *,
        represents: bool = False,
        domain: DomainFusion | None = None,
    ):
        """represents: forward may be asked to `represent`; domain: what to put before the model's first layer."""
        super().__init__()
        language = objective.task in LANGUAGE
        self.body = Headless(model, "student") if language else model
        self.objective = objective
        self.evaluation = evaluation  # what evaluate() measures; holds no parameters
        self._model = [model]  # in a list: `body` already registers it
        self._last = model.config.num_hidden_layers
        hidden = objective.layers("student_hidden") | ({self._last} if represents else set())
        self.capture = Capture(model, hidden, objective.layers("student_attention"))
        self.domain = domain
        if domain is not None:
            domain.attach(model)  # after Capture: layer 0 is what comes before the fusion

    @property
    def model(self) -> PreTrainedModel:
        return self._model[0]

    def head_parameters(self) -> list[nn.Parameter]:
        """Used outside their own module's forward, by the terms of language models."""
        if not isinstance(self.body, Headless):
            return []
        head = self.model.get_output_embeddings()
        return [parameter for parameter in (head.weight, head.bias) if parameter is not None]

    def trace(self, batch: Batch) -> Trace:
        found = trace(self.body, self.model, self.capture, batch)
        if isinstance(self.body, Headless):
            head = self.model.get_output_embeddings()
            found.head, found.head_bias = head.weight, head.bias
        return found

    def forward(
        self,
        batch: Batch,
        teacher: Trace | None = None,
        counts: Tensor | None = None,
        previous: Trace | None = None,
        represent: bool = False,
        last: bool = False,
    ):
        """With counts: (loss with gradients, (parts,) raw values). Without: what evaluation reads, see below.

        Without counts: (B, C) logits of classifiers and regressors; (terms,) sums of the evaluation objective
        for language models. With represent: (B, D) mean of the last layer's states over valid tokens; with last:
        (B, N, D), the states themselves.
        """
        targets = self.domain.prepare(teacher, batch.chance) if self.domain is not None else {}
        student = self.trace(batch)
        if self.domain is not None:
            student.domain = self.domain.trace(targets)
        student.previous = previous
        if last:
            return student.hidden[self._last]
        if represent:
            return mean_pool(student.hidden[self._last], batch.mask)
        if counts is None:
            return (
                student.logits
                if student.logits is not None
                else self.evaluation.sums(student, teacher, batch)
            )
        loss = self.objective(student, teacher, batch, counts)
        # Ties the loss to the model's end: with ZeRO-3 and checkpointing a loss on captured tensors alone crashes
        # in backward. One value a row, so that the sum cannot overflow in fp16.
        end = student.logits if student.logits is not None else student.output[:, 0]
        return loss.total + 0.0 * end[:, 0].float().sum(), loss.raw
