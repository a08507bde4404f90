"""Gradients of single samples from one backward pass over a batch, layer by layer.

A layer sees its input ``a`` and the gradient ``g`` at its output for all samples of a batch at once. The gradient of
one sample's loss with respect to the layer's parameters is a sum over that sample's positions alone:

=============  =========================================================
linear         ``∂L_b/∂W = Σ_t g_bt a_btᵀ`` and ``∂L_b/∂bias = Σ_t g_bt``
embedding      ``∂L_b/∂E[v] = Σ_{t: id_bt = v} g_bt``
norm           ``∂L_b/∂w = Σ_t g_bt ⊙ x̂_bt`` with ``x̂`` the normalised input
other leaves   the layer's own backward pass, sample by sample
=============  =========================================================

(Goodfellow 2015, arXiv:1510.01799, for linear layers.) A :class:`Use` is one use of one parameter by one layer; a
parameter that is used several times (tied embeddings) has several. They are added up before anything is squared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.stateless import _reparametrize_module
from typing_extensions import override

Transform = Callable[[Tensor], Tensor]
"""A change of each sample's gradient before the sum over samples, in place: ``square_``, ``abs_``."""

_BLOCK = 262_144
"""Numbers of single-sample gradients that exist at a time: a megabyte, so that they stay in the cache."""


class Use:
    """One use of one parameter: it knows the gradients of all samples of a batch."""

    samples: int

    def add_transformed_(self, total: Tensor, transform: Transform) -> None:
        """``total += Σ_b transform(∂L_b/∂θ)``, for a parameter that is used once."""
        for sample in range(self.samples):
            gradient = torch.zeros_like(total)
            self.add_sample_(gradient, sample)
            total.add_(transform(gradient))

    def add_sample_(self, gradient: Tensor, sample: int) -> None:
        """``gradient += ∂L_b/∂θ`` of one sample, fp32."""
        raise NotImplementedError


class MatrixUse(Use):
    """One use of the weight of a linear layer.

    Args:
        inputs: ``[samples, positions, in]``.
        gradients: ``[samples, positions, out]``, at the output.
        transposed: True if the weight is ``[in, out]`` (GPT-2's ``Conv1D``).
    """

    def __init__(self, inputs: Tensor, gradients: Tensor, transposed: bool = False) -> None:
        self.samples = len(inputs)
        # In the precision of the backward pass, as autograd would multiply them.
        self.right, self.left = inputs.to(gradients.dtype), gradients
        if transposed:
            self.left, self.right = self.right, self.left

    @override
    def add_transformed_(self, total: Tensor, transform: Transform) -> None:
        if self.left.shape[1] == 1:
            # One position: |g aᵀ|ᵖ = |g|ᵖ (|a|ᵖ)ᵀ, so that the sum over samples is a product of matrices.
            left, right = (transform(side[:, 0].float().clone()) for side in (self.left, self.right))
            total.addmm_(left.T, right)
            return
        rows = max(1, _BLOCK // (self.samples * total.shape[1]))
        for start in range(0, total.shape[0], rows):
            block = torch.bmm(self.left[:, :, start : start + rows].transpose(1, 2), self.right).float()
            total[start : start + rows].add_(transform(block).sum(0))

    @override
    def add_sample_(self, gradient: Tensor, sample: int) -> None:
        if self.left.dtype == gradient.dtype:
            gradient.addmm_(self.left[sample].T, self.right[sample])
        else:
            gradient.add_((self.left[sample].T @ self.right[sample]).float())


class RowsUse(Use):
    """The rows of an embedding.

    Args:
        ids: ``[samples, …]``.
        gradients: ``[samples, …, width]``.
        padding: the id whose row has no gradient.
    """

    def __init__(self, ids: Tensor, gradients: Tensor, padding: int | None) -> None:
        self.samples = len(ids)
        ids = ids.reshape(len(ids), -1)
        self.ids, self.gradients = ids, gradients.float().reshape(*ids.shape, gradients.shape[-1])
        if padding is not None:
            self.gradients = self.gradients.masked_fill((ids == padding)[..., None], 0.0)

    @override
    def add_transformed_(self, total: Tensor, transform: Transform) -> None:
        keys = self.ids + len(total) * torch.arange(self.samples, device=self.ids.device)[:, None]
        unique, inverse = keys.reshape(-1).unique(return_inverse=True)
        rows = self.gradients.new_zeros(len(unique), total.shape[1])
        rows.index_add_(0, inverse, self.gradients.reshape(-1, total.shape[1]))
        total.index_add_(0, unique % len(total), transform(rows))

    @override
    def add_sample_(self, gradient: Tensor, sample: int) -> None:
        gradient.index_add_(0, self.ids[sample].reshape(-1), self.gradients[sample].reshape(-1, gradient.shape[1]))


class DenseUse(Use):
    """A small parameter: all gradients at once, ``[samples, *shape]``."""

    def __init__(self, gradients: Tensor) -> None:
        self.samples, self.gradients = len(gradients), gradients.float()

    @override
    def add_transformed_(self, total: Tensor, transform: Transform) -> None:
        total.add_(transform(self.gradients.clone()).sum(0).view_as(total))

    @override
    def add_sample_(self, gradient: Tensor, sample: int) -> None:
        gradient.add_(self.gradients[sample].view_as(gradient))


class LeafUse(Use):
    """A parameter of any other leaf: its own backward pass for each sample.

    Args:
        samples: number of samples.
        gradient_of: gives one sample's gradient.
    """

    def __init__(self, samples: int, gradient_of: Callable[[int], Tensor | None]) -> None:
        self.samples, self.gradient_of = samples, gradient_of

    @override
    def add_sample_(self, gradient: Tensor, sample: int) -> None:
        value = self.gradient_of(sample)
        if value is not None:
            gradient.add_(value.float())


# ---------------------------------------------------------------------- rules


class Rule:
    """Rule of one kind of layer, forward and backward, when its parameters take no part in autograd.

    Args:
        layer: the layer; its ``forward`` is still its own.
        names: its direct parameters that gradients are wanted of.
    """

    def __init__(self, layer: nn.Module, names: list[str]) -> None:
        self.layer, self.names = layer, names
        self._forward = layer.forward

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """True if the rule is for this kind of layer."""
        raise NotImplementedError

    def parameter(self, name: str) -> Tensor | None:
        """The parameter that a name of :attr:`names` stands for."""
        return self.layer._parameters[name]

    def is_shared(self, inputs: Tensor) -> bool:
        """True if all samples share one input, as positions that are looked up once for the batch."""
        return False

    def forward(self, inputs: Tensor) -> Any:
        """The layer's output."""
        return self._forward(inputs)

    def backward(self, inputs: Tensor, gradients: Tensor) -> Tensor | None:
        """The gradient at the input."""
        raise NotImplementedError

    def uses(self, inputs: Tensor, gradients: Tensor) -> Iterator[tuple[str, Use]]:
        """For each wanted parameter, by its name in the layer, its use."""
        raise NotImplementedError


class LinearRule(Rule):
    """``nn.Linear`` and GPT-2's ``Conv1D``; LoRA's matrices are such layers."""

    @override
    @staticmethod
    def fits(layer: nn.Module) -> bool:
        return type(layer) is nn.Linear or _is_conv1d(layer)

    @override
    def backward(self, inputs: Tensor, gradients: Tensor) -> Tensor | None:
        weight: Any = self.layer.weight
        weight = weight.detach().to(gradients.dtype)
        result: Tensor | None = (gradients @ (weight.T if _is_conv1d(self.layer) else weight)).to(inputs.dtype)
        return result

    @override
    def uses(self, inputs: Tensor, gradients: Tensor) -> Iterator[tuple[str, Use]]:
        flat, flat_gradients = (side.reshape(len(side), -1, side.shape[-1]) for side in (inputs, gradients))
        for name in self.names:
            if name == "weight":
                yield name, MatrixUse(flat, flat_gradients, transposed=_is_conv1d(self.layer))
            else:
                yield name, DenseUse(flat_gradients.float().sum(1))


class EmbeddingRule(Rule):
    """``nn.Embedding``."""

    @override
    @staticmethod
    def fits(layer: nn.Module) -> bool:
        return type(layer) is nn.Embedding and layer.max_norm is None and not layer.scale_grad_by_freq

    @override
    def is_shared(self, inputs: Tensor) -> bool:
        return inputs.ndim == 2 and len(inputs) == 1

    @override
    def backward(self, inputs: Tensor, gradients: Tensor) -> Tensor | None:
        return None

    @override
    def uses(self, inputs: Tensor, gradients: Tensor) -> Iterator[tuple[str, Use]]:
        yield "weight", RowsUse(inputs, gradients, self.layer.padding_idx)  # type: ignore[arg-type]


class LeafRule(Rule):
    """Any leaf with one tensor in and one out, samples first: its own autograd, sample by sample."""

    @override
    @staticmethod
    def fits(layer: nn.Module) -> bool:
        return not any(True for _ in layer.children()) and not layer._forward_pre_hooks

    @override
    def backward(self, inputs: Tensor, gradients: Tensor) -> Tensor | None:
        if not inputs.is_floating_point():
            return None
        with torch.enable_grad():
            inputs = inputs.detach().requires_grad_()
            output = self._with({name: p.detach() for name, p in self.layer.named_parameters()}, inputs)
            return torch.autograd.grad(output, inputs, gradients.to(output.dtype))[0]

    @override
    def uses(self, inputs: Tensor, gradients: Tensor) -> Iterator[tuple[str, Use]]:
        def gradients_of(sample: int, name: str) -> Tensor | None:
            with torch.enable_grad():
                parameter = self.layer._parameters[name].detach().requires_grad_()  # type: ignore[union-attr]
                output = self._with({name: parameter}, inputs[sample : sample + 1].detach())
                wanted = gradients[sample : sample + 1].to(output.dtype)
                return torch.autograd.grad(output, parameter, wanted, allow_unused=True)[0]

        for name in self.names:
            yield name, LeafUse(len(inputs), partial(gradients_of, name=name))

    def _with(self, parameters: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        with _reparametrize_module(self.layer, dict(parameters)):
            result: Tensor = self._forward(inputs)
            return result


class NormRule(LeafRule):
    """A norm over the last axis whose output is ``x̂ · w + b`` or ``x̂ · (1 + w)``, with a vector ``w``.

    Which of them it is need not be known: both are affine in the parameters, and ``x̂`` is what one more unit of ``w``
    adds. That they are is checked on the first input of each layer; if not, it is treated as any other leaf.
    """

    def __init__(self, layer: nn.Module, names: list[str]) -> None:
        super().__init__(layer, names)
        self._is_affine: bool | None = None

    @override
    @staticmethod
    def fits(layer: nn.Module) -> bool:
        vectors = {name: p for name, p in layer.named_parameters(recurse=False) if p.ndim == 1}
        known = {"weight"} <= vectors.keys() <= {"weight", "bias"} and len(vectors) == len(list(layer.parameters()))
        return LeafRule.fits(layer) and known and type(layer).__name__.endswith("Norm")

    @override
    def uses(self, inputs: Tensor, gradients: Tensor) -> Iterator[tuple[str, Use]]:
        with torch.no_grad():
            if self._is_affine is None:
                self._is_affine = self._check(inputs[:1])
            if not self._is_affine:
                yield from super().uses(inputs, gradients)
                return
            for name in self.names:
                scaled = gradients.float() if name == "bias" else gradients.float() * self._unit(inputs).float()
                yield name, DenseUse(scaled.reshape(len(scaled), -1, scaled.shape[-1]).sum(1))

    def _unit(self, inputs: Tensor) -> Tensor:
        """``x̂``: what one more unit of ``w`` adds to the output."""
        return self._at(1.0, 0.0, inputs) - self._at(0.0, 0.0, inputs)

    def _at(self, weight: float, bias: float, inputs: Tensor) -> Tensor:
        values = {"weight": weight, "bias": bias}
        return self._with(
            {n: torch.full_like(p, values[n]) for n, p in self.layer.named_parameters(recurse=False)}, inputs
        )

    def _check(self, inputs: Tensor) -> bool:
        weight: Any = self.layer._parameters["weight"]
        if inputs.shape[-1:] != weight.shape:
            return False
        made = self._at(0.0, 0.0, inputs) + self._unit(inputs) * weight
        bias = self.layer._parameters.get("bias")
        made = made if bias is None else made + bias
        output = self._forward(inputs)
        rounding = 8 * torch.finfo(output.dtype).eps * float(output.abs().max() + 1e-30)
        return made.shape == output.shape and float((made - output).abs().max()) <= max(rounding, 1e-6)


_RULES: tuple[type[Rule], ...] = (LinearRule, EmbeddingRule, NormRule, LeafRule)


def rule_for(layer: nn.Module, names: list[str]) -> Rule | None:
    """The first rule that fits a layer; None if its parameters have to be measured one sample at a time."""
    if parametrize.is_parametrized(layer):
        return None
    return next((rule(layer, names) for rule in _RULES if rule.fits(layer)), None)


def _is_conv1d(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Other ``forward`` functions for some layers, for a while."""
    had: dict[nn.Module, Any] = {layer: layer.__dict__.get("forward") for layer in forwards}
    try:
        for layer, forward in forwards.items():
            layer.__dict__["forward"] = forward
        yield
    finally:
        for layer, forward in had.items():
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = forward
