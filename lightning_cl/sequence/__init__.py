"""A sequence of tasks: trained, evaluated, predicted and planned."""

from lightning_cl.sequence.fit import fit_tasks

__all__ = ["fit_tasks"]
