"""Run distillation inside other libraries' training loops."""

from dsdistill.integrations.distill_trainer import DistillTrainer

__all__ = ["DistillTrainer"]
