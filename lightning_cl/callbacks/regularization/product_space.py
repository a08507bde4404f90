"""Importances of the products ``s B A`` of low-rank adapters, instead of those of ``A`` and of ``B``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl.core.placement import clean_name
from lightning_cl.functional.layer_rules import MatrixUse
from lightning_cl.functional.product_penalty import (
    add_product_penalty_gradient_,
    product_penalty,
    product_penalty_gradients,
)


class Product(NamedTuple):
    """One low-rank change ``s B A`` of a linear layer."""

    name: str
    """Of the layer, with ``.weight``: what its importance is called."""
    down: str
    """The name of ``A``, ``[rank, in]``."""
    up: str
    """The name of ``B``, ``[out, rank]``."""
    scale: float
    """peft's factor s."""


def find_products(module: nn.Module) -> list[Product]:
    """The trained products of a module's linear layers, as peft's LoRA has them.

    Raises:
        MisconfigurationException: if there is none, or a layer has more than one, or one that is no plain product.
    """
    names = {id(p): clean_name(name) for name, p in module.named_parameters() if p.requires_grad}
    found = []
    for path, part in module.named_modules():
        ups: Any = getattr(part, "lora_B", None)
        if not isinstance(ups, nn.ModuleDict) or not hasattr(part, "base_layer"):
            continue
        trained = [key for key, up in ups.items() if id(up.weight) in names]
        variants: Any = getattr(part, "lora_variant", {})
        if len(trained) > 1 or any(key in variants for key in trained):
            raise MisconfigurationException(
                f"EWC(space='product'): the adapter of {clean_name(path)} is DoRA or of another kind that is no plain"
                " product, or several are trained at once; use space='parameters'"
            )
        for key in trained:
            down: Any = part.lora_A[key]
            if id(down.weight) in names:
                scale = float(part.scaling[key])
                pair = names[id(down.weight)], names[id(ups[key].weight)]
                found.append(Product(f"{clean_name(path)}.weight", *pair, scale))
    if not found:
        raise MisconfigurationException(
            f"EWC(space='product'): {type(module).__name__} has no LoRA adapter on a linear layer whose two factors"
            " train; use space='parameters'"
        )
    return found


class ProductSums:
    """Sums of squared single-sample gradients of products, from what their two factors see.

    With ``x`` at the input of ``A`` and ``g`` the gradient at the output of ``B``, before the factor s::

        ∂L_b/∂(s B A) = Σ_t g_bt x_btᵀ / s

    That is the gradient of the whole weight, also where the weight itself is quantised.

    Memory: one fp32 matrix ``[out, in]`` for each product, and the output gradients of one layer.

    Args:
        products: to be measured.
        parameters: name to parameter.
    """

    def __init__(self, products: Sequence[Product], parameters: Mapping[str, Tensor]) -> None:
        self._by_down = {product.down: product for product in products}
        self._by_up = {product.up: product for product in products}
        self._gradients: dict[str, Tensor] = {}
        self.total = {
            product.name: torch.zeros(
                parameters[product.up].shape[0], parameters[product.down].shape[1], device=parameters[product.up].device
            )
            for product in products
        }

    def __call__(self, layer: nn.Module, name: str, inputs: Tensor, gradients: Tensor) -> bool:
        """Takes what one factor saw; the factors by themselves are measured all the same."""
        if name in self._by_up:
            self._gradients[self._by_up[name].name] = gradients.detach()
        elif name in self._by_down:
            product = self._by_down[name]
            at_output = self._gradients.pop(product.name, None)
            if at_output is not None:
                # The square of 1 / s is taken here, so that the sums are those of the weight.
                sides = (inputs, at_output / product.scale)
                x, g = (side.reshape(len(side), -1, side.shape[-1]) for side in sides)
                MatrixUse(x, g).add_transformed_(self.total[product.name], Tensor.square_)
        return False


class _Held(NamedTuple):
    a: Tensor
    b: Tensor
    anchor_a: Tensor
    anchor_b: Tensor
    importance: Tensor
    scale: float


def _held(
    products: Sequence[Product],
    parameters: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Tensor],
) -> Iterator[tuple[Product, _Held]]:
    """Each product that has an importance and whose factors are there, on their device, one after the other."""
    for product in products:
        if product.name in importance and product.down in parameters and product.up in parameters:
            a, b = parameters[product.down], parameters[product.up]
            there = [t.to(a.device) for t in (anchor[product.down], anchor[product.up], importance[product.name])]
            yield product, _Held(a, b, there[0], there[1], there[2], product.scale)


def add_gradients(
    products: Sequence[Product],
    parameters: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Tensor],
    strength: float,
    loss_scale: float,
) -> None:
    """Adds the gradients of the products' penalty to ``.grad`` of their factors."""
    for _, held in _held(products, parameters, anchor, importance):
        a, b, anchor_a, anchor_b, weight, scale = held
        add_product_penalty_gradient_(a, b, anchor_a, anchor_b, weight, strength, scale, loss_scale)


def forces(
    products: Sequence[Product],
    parameters: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """For each factor its name and the gradient of the penalty at strength 1."""
    for product, held in _held(products, parameters, anchor, importance):
        a, b, anchor_a, anchor_b, weight, scale = held
        of_a, of_b = product_penalty_gradients(a.detach(), b.detach(), anchor_a, anchor_b, weight, 1.0, scale)
        yield product.down, of_a
        yield product.up, of_b


@torch.no_grad()
def value(
    products: Sequence[Product],
    parameters: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Tensor],
) -> float:
    """``Σ importance · (s B A − s B* A*)²`` over all products."""
    total = 0.0
    for _, (a, b, anchor_a, anchor_b, weight, scale) in _held(products, parameters, anchor, importance):
        total += 2.0 * float(product_penalty(a, b, anchor_a, anchor_b, weight, 1.0, scale))
    return total
