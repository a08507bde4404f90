"""Models on disk: whole, as an adapter, or merged; each is loaded again and compared before the call returns."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_cl.models.loading import load_pretrained, quiet_peft


def save_whole(model: Any, folder: str | Path) -> None:
    """All weights, as ``AutoModelForCausalLM.from_pretrained`` loads them.

    Raises:
        RuntimeError: if what was written is not what is in memory.
    """
    model.save_pretrained(folder)
    again = load_pretrained(str(folder), dtype=str(model.dtype).removeprefix("torch."))
    _compare(model.state_dict(), again.state_dict(), folder)


def save_adapter(model: Any, folder: str | Path, source: str) -> None:
    """A LoRA adapter alone, as ``peft.AutoPeftModelForCausalLM.from_pretrained`` loads it; its base is named in it.

    The base of an adapter around a GGUF file, which peft cannot read, is saved next to it, in ``base``.

    Args:
        model: the ``PeftModel``.
        folder: where to.
        source: the base's name, folder or file.

    Raises:
        RuntimeError: if what was written is not what is in memory.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    if source.endswith(".gguf"):
        base = Path(folder).absolute() / "base"
        load_pretrained(source).save_pretrained(base)
        model.peft_config[model.active_adapter].base_model_name_or_path = str(base)
    # The base's own embeddings are as they were: peft would look for them on the hub to find that out.
    model.save_pretrained(folder, save_embedding_layers=False)
    written = load_file(Path(folder) / "adapter_model.safetensors")
    _compare(get_peft_model_state_dict(model, save_embedding_layers=False), written, folder)


def save_merged(model: Any, source: str, dtype: str | None, settings: dict[str, Any], folder: str | Path) -> None:
    """A LoRA adapter merged into its base, which is loaded for it in 16 or 32 bits: never into quantised weights.

    Args:
        model: the ``PeftModel``.
        source: the base's name, folder or file.
        dtype: of the base's weights; None: as they are stored.
        settings: further arguments of ``from_pretrained``.
        folder: where to.

    Raises:
        RuntimeError: if a merged weight is not ``W + ΔW``, rounded once, or what was written is not what was merged.
    """
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as adapter:
        model.save_pretrained(adapter, save_embedding_layers=False)
        base = load_pretrained(source, dtype=dtype, settings=settings)
        with quiet_peft():
            adapted = PeftModel.from_pretrained(base, adapter)
    for name, layer in adapted.named_modules():
        if hasattr(layer, "get_delta_weight") and hasattr(layer, "merge"):
            _merge_layer(name, layer, folder)
    save_whole(adapted.unload(), folder)  # what is merged stays


@torch.no_grad()
def _merge_layer(name: str, layer: Any, folder: str | Path) -> None:
    before = layer.get_base_layer().weight.detach().clone()
    delta = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
    layer.merge(safe_merge=True)
    merged = layer.get_base_layer().weight
    if any(adapter in layer.lora_variant for adapter in layer.active_adapters):
        return  # DoRA and the like scale what is merged
    # Both ΔW and the sum are rounded to the weights' precision.
    expected = before.float() + delta
    allowed = torch.finfo(before.dtype).eps * (expected.abs() + delta.abs()) + torch.finfo(before.dtype).tiny
    if merged.dtype != before.dtype or bool(((merged.float() - expected).abs() > allowed).any()):
        raise RuntimeError(f"{folder}: the merged weight {name} is not the base's plus the adapter's")


def _compare(memory: dict[str, Any], disk: dict[str, Any], folder: str | Path) -> None:
    different = [
        name
        for name, value in memory.items()
        if isinstance(value, Tensor)
        and (name not in disk or not torch.equal(value.detach().cpu(), disk[name].detach().cpu().to(value.dtype)))
    ]
    if different:
        raise RuntimeError(f"{folder}: what was written is not what is in memory: {different[:3]}")
