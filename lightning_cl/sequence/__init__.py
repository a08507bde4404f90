"""Training, evaluation, prediction and planning of a sequence of tasks."""

from lightning_cl.sequence.fit import fit_tasks

__all__ = ["fit_tasks"]
