"""Frozen base weights: left out of checkpoints, named and recognised by a checksum instead."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_ROW = 32_768
_OF_NO_MATTER = re.compile(
    r"_.*|transformers_version|architectures|(torch_)?dtype|quantization_config|use_cache|name_or_path|.*_token_id"
    r"|output_.*|return_dict.*|id2label|label2id|problem_type"
)


def frozen_names(module: nn.Module) -> frozenset[str]:
    """Returns the entries of ``state_dict()`` that are frozen parameters, or belong to quantised ones."""
    trainable = {name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    quantised = [
        f"{name}." for name, part in module.named_modules() if type(part).__module__.startswith("bitsandbytes")
    ]
    return frozenset(
        name
        for name in module.state_dict()
        if name not in trainable and (name in parameters or name.startswith(tuple(quantised)))
    )


def checksum(module: nn.Module, names: frozenset[str]) -> str:
    """A checksum over every bit of some entries of ``state_dict()``, the same on every device.

    It finds changes; it is no protection against somebody who forges them.
    """
    digest = hashlib.sha256()
    state = module.state_dict()
    for name in sorted(names):
        value = state[name]
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode() + _row_sums(value))
    return digest.hexdigest()


def describe_config(config: Any) -> str:
    """The settings of a transformers model that decide what it computes from the same weights, as JSON."""
    settings = {} if config is None else config.to_dict()
    return json.dumps(
        {k: v for k, v in settings.items() if not _OF_NO_MATTER.fullmatch(k)}, sort_keys=True, default=str
    )


def changed_settings(then: str, now: str) -> list[str]:
    """Compares two of :func:`describe_config`; a setting that one version of transformers alone knows does not count.

    Returns:
        each setting that differs, with both values.
    """
    before, after = json.loads(then), json.loads(now)
    common = sorted(before.keys() & after.keys())
    return [f"{name}: {before[name]!r} then, {after[name]!r} now" for name in common if before[name] != after[name]]


def _row_sums(tensor: Tensor) -> bytes:
    """Sums of a tensor's bits over rows of 32 kB, modulo 2⁶⁴: every changed bit shows, and rows in another order."""
    flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    whole = len(flat) // _ROW * _ROW
    rows = flat[:whole].view(torch.int64).view(-1, _ROW // 8).sum(1)  # wraps around
    return rows.cpu().numpy().tobytes() + flat[whole:].cpu().numpy().tobytes()


def load_without_base(
    module: nn.Module, state: Mapping[str, Any], base: frozenset[str], strict: bool, assign: bool = False
) -> Any:
    """``load_state_dict`` of a checkpoint that has left the base out.

    Args:
        module: has its base already.
        state: the checkpoint's.
        base: names that may be missing.
        strict: whether anything else that is missing, or unknown, is an error.
        assign: torch's.

    Raises:
        RuntimeError: naming the missing and unknown entries, as torch does.
    """
    # Quantised weights of a checkpoint that has them cannot be loaded by torch: the module has the same ones.
    given = {
        name: value for name, value in state.items() if name not in base or not _belongs_to_quantised(module, name)
    }
    result = nn.Module.load_state_dict(module, given, strict=False, assign=assign)
    missing = [name for name in result.missing_keys if name not in base]
    if strict and (missing or result.unexpected_keys):
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(module).__name__}: missing: {missing}, not known:"
            f" {list(result.unexpected_keys)}"
        )
    return result


def _is_quantised(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes")


def _belongs_to_quantised(module: nn.Module, name: str) -> bool:
    """Returns True if the innermost submodule that has an entry of ``state_dict()`` is quantised."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            return _is_quantised(module.get_submodule(".".join(parts[:end])))
        except AttributeError:
            continue  # `weight.absmax` belongs to no submodule called `weight`
    return False
