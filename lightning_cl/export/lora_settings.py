"""Settings of a saved LoRA adapter: what other programs can apply, and how strongly a layer's product counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MERGE = "; merge it into its base instead (save_pretrained(folder, merge=True)) and write the merged folder"
"""The way round for adapters that are more than LoRA."""

# Settings of peft with which an adapter is more than the product of two matrices, or is not for the base as it is.
_MORE = {
    "use_dora": "DoRA also scales the base's columns",
    "use_qalora": "QALoRA pools the layer's inputs",
    "lora_bias": "the adapter has biases",
    "modules_to_save": "whole layers were trained next to the adapter",
    "trainable_token_indices": "rows of the embedding were trained",
    "target_parameters": "it adapts parameters that are no layers",
    "alora_invocation_tokens": "it is on only after certain tokens",
    "arrow_config": "it chooses among adapters for each token",
    "layer_replication": "layers of the base are repeated",
    "fan_in_fan_out": "its matrices are transposed",
    "megatron_config": "its layers are megatron's",
    "kasa_config": "the base's weights were changed before training",
    "velora_config": "its layers are VeLoRA's",
    "monteclora_config": "its weights are drawn anew in each pass",
}
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_settings(folder: Path, program: str) -> dict[str, Any]:
    """Reads an adapter's configuration.

    Args:
        folder: as peft writes it.
        program: the program that is to apply the adapter, for messages.

    Raises:
        ValueError: if the adapter is more than the product of two matrices, with the way round.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"folder={str(folder)!r}: has no adapter_config.json; it is no adapter of peft")
    settings: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft_type={settings.get('peft_type')!r}: {program} knows LoRA only{MERGE}")
    for option, reason in _MORE.items():
        if settings.get(option):
            raise ValueError(f"{option}={settings[option]!r}: {reason}, which {program} does not know{MERGE}")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"bias={settings['bias']!r}: the base's biases were trained too{MERGE}")
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise ValueError(
            f"init_lora_weights={start!r}: it belongs to a base whose weights were changed before training{MERGE}"
        )
    return settings


def base_config(settings: Mapping[str, Any], base: str | Path | None) -> Any:
    """Reads the configuration of an adapter's base.

    Args:
        settings: of the adapter.
        base: the base's folder, or its name on the hub; None: the one that the adapter names.

    Raises:
        ValueError: if there is none.
    """
    from transformers import AutoConfig

    source = base or settings.get("base_model_name_or_path")
    if not source:
        raise ValueError("base=None: the adapter names no base; give its folder, or its name on the hub")
    try:
        return AutoConfig.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"base={str(source)!r}: no config.json is found there ({reason}); give its folder") from error


def scale_of(module: str, settings: Mapping[str, Any]) -> float:
    """Returns by how much peft multiplies a layer's product."""
    from peft.utils.other import get_pattern_key

    values = []
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        given: Mapping[str, float] = settings.get(pattern) or {}
        values.append(given.get(get_pattern_key(list(given), module), settings[default]))
    rank, alpha = values
    return float(alpha / (rank**0.5 if settings.get("use_rslora") else rank))
