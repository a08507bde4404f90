"""Gradients of single samples from one backward pass, for peft's adapters on embeddings.

LoRA on linear layers needs no rule of its own: its matrices are linear layers. On embeddings they are bare parameters,
and so are single trainable tokens. With ids ``x_bt``, the gradient ``g_bt`` at the output and peft's scale ``s``:

================  =============================================================
LoRA              ``E[x] + s Bᵀ A[:, x]``: ``∂L_b/∂B = s Σ_t g_bt A[:, x_bt]ᵀ``,
                  ``∂L_b/∂A[:, v] = s Σ_{t: x_bt = v} Bᵀ g_bt``
trainable tokens  ``∂L_b/∂E[v] = Σ_{t: x_bt = v} g_bt`` for the rows ``v`` alone
their tied head   ``∂L_b/∂E[v] = Σ_t g_bt[v] h_bt``
================  =============================================================

Only the plain case has a rule: one active adapter that is not merged, and no variant of it. All else is found by the
engine's check, and measured one sample at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_cl.functional.layer_rules import MatrixUse, RowsUse, Rule, Transform, Use

_LORA = ("peft.tuners.lora.layer", "Embedding")
_TOKENS = ("peft.tuners.trainable_tokens.layer", "TrainableTokensLayer")


def adapter_rule(layer: nn.Module, wanted: Collection[int]) -> Rule | None:
    """The rule of a layer of peft's that has parameters of an embedding; None for all other layers.

    Args:
        layer: any.
        wanted: the ``id`` of each parameter that gradients are wanted of.
    """
    kinds: dict[tuple[str, str], type[_AdapterRule]] = {_LORA: LoraEmbeddingRule, _TOKENS: TrainableTokensRule}
    kind = kinds.get((type(layer).__module__, type(layer).__name__))
    if kind is None:
        return None
    peft: Any = layer
    active = list(peft.active_adapters)
    if len(active) != 1 or peft.merged or peft.disable_adapters or getattr(peft, "lora_variant", {}).get(active[0]):
        return None
    names = [f"{group}.{active[0]}" for group in kind.groups if active[0] in getattr(peft, group)]
    rule = kind(layer, names)
    rule.names = [name for name in names if id(rule.parameter(name)) in wanted]
    return rule if rule.names else None


class _AdapterRule(Rule):
    """Parameters in dictionaries of the layer, by the name ``dictionary.adapter``."""

    groups: tuple[str, ...] = ()

    @override
    def parameter(self, name: str) -> Tensor:
        group, adapter = name.split(".", 1)
        result: Tensor = getattr(self.layer, group)[adapter]
        return result

    def _scale(self) -> float:
        """Of what some models multiply their embeddings with."""
        scale = self.layer._get_embed_scale()  # type: ignore[operator]
        return 1.0 if scale is None else float(scale)


class LoraEmbeddingRule(_AdapterRule):
    """``peft.tuners.lora.Embedding``."""

    groups = ("lora_embedding_A", "lora_embedding_B")

    @override
    def backward(self, inputs: Tensor, gradients: Tensor) -> Tensor | None:
        return None

    @override
    def uses(self, inputs: Tensor, gradients: Tensor) -> Iterator[tuple[str, Use]]:
        layer: Any = self.layer
        (adapter,) = layer.active_adapters
        down, up = (getattr(layer, group)[adapter].detach() for group in self.groups)
        ids = inputs.reshape(len(inputs), -1)
        scaled = gradients.reshape(*ids.shape, -1) * (layer.scaling[adapter] * self._scale())
        for name in self.names:
            if name.startswith("lora_embedding_B"):
                yield name, MatrixUse(F.embedding(ids, down.T), scaled)
            else:
                rows = RowsUse(ids, scaled @ up.to(scaled.dtype), layer.get_base_layer().padding_idx)
                yield name, TransposedUse(rows)


class TrainableTokensRule(_AdapterRule):
    """peft's trainable tokens: some rows of an embedding, or of the head that is tied to it."""

    groups = ("trainable_tokens_delta",)

    @override
    def backward(self, inputs: Tensor, gradients: Tensor) -> Tensor | None:
        if not inputs.is_floating_point():
            return None
        weight = self.layer.get_merged_weights(self.layer.active_adapters).detach()  # type: ignore[operator]
        result: Tensor | None = (gradients @ weight.to(gradients.dtype)).to(inputs.dtype)
        return result

    @override
    def uses(self, inputs: Tensor, gradients: Tensor) -> Iterator[tuple[str, Use]]:
        layer: Any = self.layer
        (adapter,) = layer.active_adapters
        tokens = torch.as_tensor(layer.token_indices[adapter], device=inputs.device)
        for name in self.names:
            if inputs.is_floating_point():
                hidden = inputs.reshape(len(inputs), -1, inputs.shape[-1])
                of_tokens = gradients.reshape(*hidden.shape[:2], -1)[..., tokens]
                yield name, MatrixUse(hidden, of_tokens)
                continue
            ids = inputs.reshape(len(inputs), -1)
            row_of = torch.full((len(layer.base_layer.weight),), -1, device=ids.device)
            row_of[tokens] = torch.arange(len(tokens), device=ids.device)
            if layer.base_layer.padding_idx is not None:
                row_of[layer.base_layer.padding_idx] = -1
            rows = row_of[ids]
            scaled = gradients.reshape(*ids.shape, -1) * self._scale()
            yield name, RowsUse(rows.clamp(min=0), scaled.masked_fill((rows < 0)[..., None], 0.0), None)


class TransposedUse(Use):
    """A use of a parameter that is stored with its axes the other way round.

    Args:
        use: as if they were not.
    """

    def __init__(self, use: Use) -> None:
        self.samples, self._use = use.samples, use

    @override
    def add_transformed_(self, total: Tensor, transform: Transform) -> None:
        self._use.add_transformed_(total.T, transform)

    @override
    def add_sample_(self, gradient: Tensor, sample: int) -> None:
        self._use.add_sample_(gradient.T, sample)
