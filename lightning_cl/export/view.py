"""The model of a run as it is exported: which module, which adapters, on which device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.core.deployment import deployed
from lightning_cl.models.adapters import find_peft_model, list_adapters
from lightning_cl.models.causal_lm import CausalLM


def check_module(module: L.LightningModule) -> CausalLM:
    """Returns the module, if it is one that can be exported.

    Raises:
        MisconfigurationException: if it is none, with the way round.
    """
    if not isinstance(module, CausalLM):
        raise MisconfigurationException(
            f"export: {type(module).__name__} is no CausalLM; save its transformers model with save_pretrained, and"
            " write the folder with lightning_cl.export.export_gguf"
        )
    return module


def adapted_tasks(module: CausalLM) -> list[str]:
    """The tasks that have an adapter of their own."""
    return list_adapters(module) if module.lora is not None else []


def adds_up(module: CausalLM) -> bool:
    """True if the model computes with the adapters of several tasks at once."""
    return bool(adapted_tasks(module)) and len(find_peft_model(module).active_adapters) > 1


@contextmanager
def exported_view(trainer: L.Trainer, module: CausalLM, task: str | None = None) -> Iterator[None]:
    """A context in which a module is on the Trainer's device, as its user would get it.

    Under adapters of tasks it is left as it is: a router, which is a part of the view, would choose others than those
    that are written.
    """
    device = module.device
    module.to(trainer.strategy.root_device)
    try:
        with nullcontext() if adapted_tasks(module) else deployed(trainer, module, task):
            yield
    finally:
        module.to(device)
