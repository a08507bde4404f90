"""Pretrained models: from the hub, a folder, a GGUF file or a sample package; in 16, 8 or 4 bits; with LoRA."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_cl.arguments import check_integer
from lightning_cl.data.text.model_files import find_damaged_file
from lightning_cl.data.text.pretrained import load_gguf, resolve_source

Quantization = Literal["nf4", "int8"]
Precision = Literal["float32", "bfloat16", "float16"]


def load_pretrained(
    source: str,
    dtype: str | None = None,
    quantization: str | None = None,
    device: torch.device | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """A causal language model with pretrained weights.

    Args:
        source: a name on the hub, a folder, a ``.gguf`` file, or ``sample:NAME``.
        dtype: of the weights; None: as they are stored.
        quantization: ``nf4`` (QLoRA's 4 bits, twice quantised) or ``int8`` (LLM.int8()), by bitsandbytes.
        device: where a quantised model is loaded to: it cannot be moved later.
        settings: further arguments of ``from_pretrained``.

    Raises:
        ValueError: if there is no such model, or a file of it is damaged; the message says what was looked for.
    """
    from transformers import AutoModelForCausalLM

    arguments: dict[str, Any] = {"dtype": "auto" if dtype is None else getattr(torch, dtype), **(settings or {})}
    if quantization is not None:
        arguments["quantization_config"] = quantization_config(quantization)
        if device is not None:
            arguments["device_map"] = {"": device}
    path = resolve_source(source)
    if path.endswith(".gguf") and quantization is not None:
        raise ValueError(
            f"model={source!r}: a GGUF file cannot be quantised while it is loaded; save it as a Hugging Face folder"
            " first (CausalLM.save_pretrained)"
        )
    try:
        if path.endswith(".gguf"):
            return load_gguf(Path(path), **arguments)
        model = AutoModelForCausalLM.from_pretrained(path, **arguments)
    except Exception as error:  # of any kind, from the reader of a damaged file
        damaged = None if _says_what_to_install(error) else find_damaged_file(path, error)
        if damaged is not None:
            raise ValueError(f"model={source!r}: {damaged}") from error
        if not isinstance(error, (OSError, ValueError)):
            raise
        reason = str(error).splitlines()[0]
        absent = not path.endswith(".gguf") and (
            isinstance(error, OSError) or not (Path(path) / "config.json").exists()
        )
        missing = "no model folder of that name and none on the hub"
        raise ValueError(f"model={source!r}: {f'{missing} ({reason})' if absent else reason}") from error
    for module in model.modules():
        # On some CPUs bitsandbytes lays 4-bit weights out anew, and rounds them, at the first evaluation: a run would
        # depend on when it was evaluated and saved.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
    return model


def _says_what_to_install(error: Exception) -> bool:
    return isinstance(error, ImportError) or "pip install" in str(error)


def quantization_config(quantization: str) -> Any:
    """Settings of bitsandbytes as QLoRA (Dettmers et al. 2023) has them: bf16 arithmetic, double quantisation.

    Raises:
        ValueError: if bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantization={quantization!r}: bitsandbytes is not installed: pip install 'lightning_cl[4bit]'"
        )
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def check_lora(settings: Mapping[str, Any]) -> None:
    """Finds arguments that peft does not know.

    Raises:
        ValueError: naming the argument and the nearest known ones.
    """
    from dataclasses import fields

    if not isinstance(settings, Mapping):
        raise TypeError(f"lora={settings!r}: expected the arguments of peft's LoraConfig, as {{'r': 8}}")
    if importlib.util.find_spec("peft") is None:
        raise ValueError("lora: peft is not installed: pip install peft")
    from peft import LoraConfig

    known = [field.name for field in fields(LoraConfig)]
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, n=3) or ["r", "lora_alpha", "lora_dropout", "target_modules"]
            raise ValueError(f"lora: peft's LoraConfig has no {name!r}; did you mean {' or '.join(map(repr, near))}?")
    check_integer("lora: r", settings.get("r", 8), 1, "a rank of at least 1")


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warning that peft, not its user, still asks for ``is_gradient_checkpointing``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        yield


def add_lora(model: Any, settings: Mapping[str, Any]) -> Any:
    """The model with a fresh adapter, everything else frozen.

    Targets are all linear layers but the head unless the settings name others; adapters of 16-bit and quantised models
    are kept in fp32.

    Raises:
        ValueError: if the settings do not fit the model.
    """
    from peft import LoraConfig, get_peft_model

    chosen = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", **settings}
    chosen.setdefault("lora_alpha", 2 * chosen.get("r", 8))
    try:
        with quiet_peft():
            return get_peft_model(model, LoraConfig(**chosen))
    except (ValueError, TypeError) as error:
        raise ValueError(f"lora={dict(settings)!r}: {str(error).splitlines()[0]}") from error
