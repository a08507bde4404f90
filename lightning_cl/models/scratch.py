"""Models from a configuration, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def from_config(
    source: Mapping[str, Any],
    tokenizer: Any = None,
    dtype: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """A causal language model to train from scratch.

    Args:
        source: ``model_type`` and the architecture's own settings.
        tokenizer: gives vocabulary size and special tokens where `source` does not.
        dtype: of the weights; None: fp32.
        settings: of transformers' ``from_config``, as ``attn_implementation``.

    Raises:
        MisconfigurationException: if nobody says how large the vocabulary is.
        ValueError: for settings that the architecture does not take.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    chosen = dict(source)
    if tokenizer is not None:
        chosen.setdefault("vocab_size", len(tokenizer))
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            chosen.setdefault(token, getattr(tokenizer, token))
    elif "vocab_size" not in chosen:
        raise MisconfigurationException(
            "CausalLM(model={…}): a configuration without `vocab_size` takes it from the DataModule's tokenizer,"
            " and there is none"
        )
    if source["model_type"] not in CONFIG_MAPPING_NAMES:
        near = get_close_matches(str(source["model_type"]), CONFIG_MAPPING_NAMES, n=3) or ["llama", "qwen3", "gpt2"]
        raise ValueError(
            f"model.model_type={source['model_type']!r}: transformers knows no such architecture; did you mean"
            f" {' or '.join(map(repr, near))}?"
        )
    try:
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**chosen), **(settings or {}))
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1].strip()
        raise ValueError(f"model={source!r}: {reason}") from error
    return made if dtype is None else made.to(getattr(torch, dtype))
