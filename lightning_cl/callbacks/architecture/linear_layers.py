"""Linear layers of a module whose weights a method keeps in bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl.core.placement import clean_name

LINEAR = "linear"
"""All linear layers, but for the head of a language model and weights that two layers share."""


class LinearLayer(NamedTuple):
    """A linear layer with a matrix of its own."""

    path: str
    """In the module."""
    part: nn.Module
    weight: nn.Parameter
    transposed: bool
    """True for GPT-2's layers, which store ``[in, out]``."""

    @property
    def matrix(self) -> Tensor:
        """The weight as ``[out, in]``; it shares memory with the parameter and has no graph."""
        weight = self.weight.detach()
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, if the layer has one."""
        bias: nn.Parameter | None = self.part.bias if isinstance(self.part.bias, nn.Parameter) else None
        return bias


class LoraLayer(NamedTuple):
    """The two trained factors of a LoRA adapter, and the frozen weight that they stand next to."""

    path: str
    base: LinearLayer
    down: nn.Parameter
    """``A``, ``[rank, in]``."""
    up: nn.Parameter
    """``B``, ``[out, rank]``."""


def check_targets(targets: str | Sequence[str]) -> str | tuple[str, ...]:
    """The targets of a method, as a tuple of names or the word ``linear``.

    Raises:
        ValueError: if they are neither.
    """
    names = targets if targets == LINEAR else tuple(targets) if not isinstance(targets, str) else ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"targets={targets!r}: expected {LINEAR!r}, or a list of layers' names, as ['q_proj', 'v_proj']"
        )
    return names


def find_linear_layers(module: nn.Module, targets: str | Sequence[str]) -> dict[str, LinearLayer]:
    """The linear layers of a module whose weight trains, by their path.

    Args:
        module: any module.
        targets: ``linear``, or names: the last parts of the layers' paths, as ``q_proj`` or ``block.2.fc``.

    Raises:
        MisconfigurationException: if there is none, or a name fits no layer; the message names the argument.
    """
    wanted = None if targets == LINEAR else list(targets)
    found = {
        path: layer
        for path, layer in _layers_that_count(module, wanted).items()
        if layer.weight.requires_grad and not {"lora_A", "lora_B"} & set(path.split("."))
    }
    for name in wanted or []:
        if not any(_ends(path, name) for path in found):
            raise MisconfigurationException(
                f"targets={wanted}: {type(module).__name__} has no linear layer called {name!r} whose weight trains"
            )
    if not found:
        raise MisconfigurationException(
            f"targets={targets!r}: {type(module).__name__} has no linear layer whose weight trains (quantised weights"
            " cannot); expected full tuning of at least one"
        )
    return found


def find_lora_layers(module: nn.Module, targets: str | Sequence[str]) -> dict[str, LoraLayer]:
    """The linear layers of a module that a LoRA adapter trains, by the path of the frozen weight; none without LoRA.

    Raises:
        MisconfigurationException: if an adapter is more than two factors next to a frozen matrix.
    """
    wanted = None if targets == LINEAR else list(targets)
    found: dict[str, LoraLayer] = {}
    for path, part in module.named_modules():
        if not hasattr(part, "lora_A") or not hasattr(part, "base_layer"):
            continue
        trained = [name for name, factor in part.lora_A.items() if factor.weight.requires_grad]
        place = clean_name(path)
        if not trained or (wanted is not None and not any(_ends(place, name) for name in wanted)):
            continue
        layer = _linear(place, part.base_layer)
        if layer is None or len(trained) > 1 or len(getattr(part, "lora_magnitude_vector", ())):
            raise MisconfigurationException(
                f"{place}: its adapter is DoRA, of two tasks at once, or around a layer that is quantised or not"
                " linear; expected plain LoRA around 16-bit or 32-bit weights"
            )
        down, up = part.lora_A[trained[0]].weight, part.lora_B[trained[0]].weight
        found[place] = LoraLayer(place, layer, down, up)
    return found


def _layers_that_count(module: nn.Module, wanted: Sequence[str] | None) -> dict[str, LinearLayer]:
    parts = list(module.named_modules())
    heads = {id(_head_of(part)) for _, part in parts} - {id(None)}
    uses: dict[int, int] = {}
    for _, part in parts:
        for parameter in part._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found = {}
    for path, part in parts:
        place = clean_name(path)
        layer = _linear(place, part)
        if layer is None or uses[id(layer.weight)] > 1:
            continue
        if id(part) not in heads if wanted is None else any(_ends(place, name) for name in wanted):
            found[place] = layer
    return found


def _linear(path: str, part: Any) -> LinearLayer | None:
    weight = getattr(part, "_parameters", {}).get("weight")
    transposed = type(part).__name__ == "Conv1D" and hasattr(part, "nf")
    if not (isinstance(part, nn.Linear) or transposed) or weight is None or not weight.is_floating_point():
        return None
    return LinearLayer(path, part, weight, transposed) if weight.ndim == 2 else None


def _head_of(part: nn.Module) -> Any:
    getter = getattr(part, "get_output_embeddings", None)
    try:
        return getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        return None  # a part of a model that has no head


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
