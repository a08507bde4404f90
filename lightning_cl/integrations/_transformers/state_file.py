"""Nested state of tensors and plain containers in one safetensors file, without pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_cl.files import replace_file, sync

_KEY = "lightning_cl"
_PLAIN = (str, int, float, bool, type(None))


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a state, whole or not at all.

    Tensors become tensors of the file, and the containers around them JSON in its header.

    Args:
        path: the file.
        state: dictionaries (keys: texts or integers), lists, tuples, tensors, bytes, texts, numbers and None.

    Raises:
        TypeError: if the state holds anything else; the message has its position.
        OSError: if the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    header = json.dumps(_taken_apart(state, "", tensors, set()))

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata={_KEY: header})
        sync(temporary)

    replace_file(path, write)


def read_state(path: Path) -> dict[str, Any]:
    """Reads what :func:`write_state` wrote.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or was written by something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        result: dict[str, Any] = _put_together(header, tensors)
    except Exception as error:  # safetensors has errors of its own kind, and several more for damaged headers
        raise ValueError(f"{path}: no readable state of continual-learning callbacks ({error})") from error
    return result


def _taken_apart(value: Any, where: str, tensors: dict[str, Tensor], memories: set[int]) -> Any:
    """The value as JSON; its tensors go into `tensors`, and where they lie into `memories`."""
    if isinstance(value, Tensor):
        kept = value.detach().cpu().contiguous()
        memory = kept.untyped_storage()
        # A part of a larger memory, or two names for one memory, cannot be written; all else needs no copy.
        tensors[where] = kept.clone() if memory.data_ptr() in memories or memory.nbytes() != kept.nbytes else kept
        memories.add(memory.data_ptr())
        return {"tensor": where}
    if isinstance(value, dict):
        if not all(isinstance(key, (str, int)) and not isinstance(key, bool) for key in value):
            raise TypeError(
                f"state at {where or 'its top'}: a dictionary with keys that are neither texts nor integers"
            )
        return {"dict": [[key, _taken_apart(item, f"{where}/{key}", tensors, memories)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_taken_apart(item, f"{where}/{i}", tensors, memories) for i, item in enumerate(value)]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, _PLAIN):
        return value
    raise TypeError(f"state at {where or 'its top'}: a {type(value).__name__}, expected tensors and plain containers")


def _put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _put_together(item, tensors) for key, item in content}
    if kind == "bytes":
        return bytes.fromhex(content)
    items = [_put_together(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def model_tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """Returns trainable parameters and buffers of a module: what training can have changed."""
    kept = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return kept | {name: b.detach() for name, b in module.named_buffers()}


@torch.no_grad()
def load_model_tensors(module: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Sets what :func:`model_tensors` returned.

    Raises:
        ValueError: if the module has other trainable parameters or buffers.
    """
    own = model_tensors(module)
    if different := sorted(own.keys() ^ tensors.keys()):
        place = "model" if different[0] in own else "saved state"
        raise ValueError(
            f"model: {different[0]!r} (and {len(different) - 1} more) is only in the {place}; expected the model of the"
            " run that is resumed"
        )
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
