"""Run the teacher on the next micro-batch while the student learns from this one (`teacher.overlap`)."""

import torch

from dsdistill.data import Batch
from dsdistill.models.trace import Trace
from dsdistill.models.tracer import Tracer


class TeacherAhead:
    """A TeacherAhead makes each trace one micro-batch early: on a GPU in a separate stream, on a CPU in sequence.

    A rank then holds two traces, and the teacher's activations besides the student's. It has not run on a GPU yet.
    """

    def __init__(self, teacher: Tracer, device: torch.device):
        self.teacher = teacher
        self.trace: Trace | None = None  # of the current micro-batch
        self._next: Trace | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def go(self, batch: Batch, following: Batch | None) -> None:
        """Set `trace` for a micro-batch (make it now if it was not made early); begin that of the following one."""
        self.trace = self._next if self._next is not None else self._make(batch)
        if self._stream is not None:
            here = torch.cuda.current_stream()
            here.wait_stream(self._stream)
            for (
                values
            ) in self.trace.tensors():  # else the allocator could reuse the memory while the student reads it
                values.record_stream(here)
        self._next = self._make(following) if following is not None else None

    @torch.no_grad()
    def _make(self, batch: Batch) -> Trace:
        if self._stream is None:
            return self.teacher(batch)
        batch = batch.to(self._stream.device)
        self._stream.wait_stream(torch.cuda.current_stream())  # that stream copies the batch
        with torch.cuda.stream(self._stream):
            made = self.teacher(batch)
        for values in batch.tensors():
            values.record_stream(self._stream)
        return made
