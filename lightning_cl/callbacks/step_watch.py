"""What one optimizer step started from: the gradient and the weights, for methods that follow the path of training."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor


class StepWatch:
    """Keeps each parameter's gradient and value before a step; afterwards gives the gradient and the step taken.

    Memory: 8 bytes per parameter, kept from step to step: allocating anew costs more than the copies.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def before(self, parameters: Mapping[str, Tensor], names: Collection[str], scale: float) -> None:
        """Copies what the coming step starts from.

        Args:
            parameters: name to parameter; one without ``.grad`` takes no part in this step.
            names: the parameters that are followed.
            scale: the factor that the gradients carry, divided out.
        """
        for name in self._held.keys() - parameters.keys():
            del self._held[name]  # frozen since
        for name, parameter in parameters.items():
            if parameter.grad is None or name not in names:
                self._held.pop(name, None)
                continue
            if name not in self._held or self._held[name][0].shape != parameter.shape:
                empty = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
                self._held[name] = (empty, torch.empty_like(empty))
            gradient, weights = self._held[name]
            gradient.copy_(parameter.grad)
            if scale != 1.0:
                gradient.div_(scale)
            weights.copy_(parameter)

    @torch.no_grad()
    def after(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """For each parameter that was followed its name, its gradient, and ``Δθ``; both may be overwritten."""
        for name, (gradient, weights) in self._held.items():
            yield name, gradient, torch.sub(parameters[name].detach(), weights, out=weights)

    def clear(self) -> None:
        """Frees the memory."""
        self._held.clear()
