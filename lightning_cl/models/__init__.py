"""A ready-made LightningModule around a causal language model, and its schedules."""

from lightning_cl.models.causal_lm import CausalLM
from lightning_cl.models.schedule import InfiniteLR, WarmupDecay

__all__ = ["CausalLM", "InfiniteLR", "WarmupDecay"]
