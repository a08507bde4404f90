"""Gradient and weights before each optimizer step, for methods that follow the path of training."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_cl.core.placement import local


class StepWatch:
    """Keeps each parameter's gradient and value before a step, and afterwards gives the gradient and the step.

    Memory: 8 bytes per parameter. It is kept between steps, since a new allocation costs more than the copies.

    Attributes:
        spoilt: number of steps whose gradient was NaN or infinite, although the step was taken (the gradient was
            cleaned afterwards). It is a tensor, so that the CPU does not wait for a GPU.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[Tensor, Tensor]] = {}
        self.spoilt = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def before(self, parameters: Mapping[str, Tensor], names: Collection[str], scale: float) -> None:
        """Copies gradients and weights before the coming step.

        Args:
            parameters: name to parameter; one without ``.grad`` takes no part in this step.
            names: the parameters that are followed.
            scale: the factor in the gradients; the copies are divided by it.
        """
        for name in self._held.keys() - parameters.keys():
            del self._held[name]  # it has been frozen since
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
        """Yields the name, the gradient and ``Δθ`` of each followed parameter; both tensors may be overwritten."""
        sums = []
        for name, (gradient, weights) in self._held.items():
            sums.append(local(gradient).sum())
            yield name, gradient, torch.sub(parameters[name].detach(), weights, out=weights)
        if sums:
            spoilt = ~torch.stack([total.to(sums[0].device) for total in sums]).isfinite().all()
            self.spoilt = self.spoilt.to(spoilt.device) + spoilt

    def end(self, owner: str, task: object) -> int:
        """Ends a task: frees the memory, warns of :attr:`spoilt` steps, and resets their count.

        Args:
            owner: the callback's name.
            task: the task that ends.

        Returns:
            The number of spoilt steps.
        """
        self._held.clear()
        spoilt, self.spoilt = int(self.spoilt), torch.zeros((), dtype=torch.int64)
        if spoilt:
            rank_zero_warn(
                f"{owner}: in {spoilt} steps of {task} a gradient was NaN or infinite, and the step was taken all the"
                " same (a hook or the clipping has cleaned it); the weights concerned are not followed in these steps"
            )
        return spoilt
