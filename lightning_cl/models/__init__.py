"""A ready-made LightningModule around a causal language model, and its schedule."""

from lightning_cl.models.causal_lm import CausalLM
from lightning_cl.models.schedule import WarmupDecay

__all__ = ["CausalLM", "WarmupDecay"]
