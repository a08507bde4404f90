"""Sums over samples of squared (or absolute) gradients, from one forward and one backward pass over a batch.

Squaring the gradient of a batch's loss mixes the samples. Here the parameters take no part in autograd: each layer
computes the gradient at its input as always, and from what it saw and what came back adds ``Σ_b (∂L_b/∂θ)²`` to a
total (:mod:`lightning_cl.functional.layer_rules`). One product of matrices per weight, as in an ordinary backward pass,
and no gradient for each sample in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl.functional.adapter_rules import adapter_rule
from lightning_cl.functional.layer_rules import Rule, Transform, Use, replaced_forwards, rule_for

UseSink = Callable[[nn.Module, str, Tensor, Tensor], bool]
"""``sink(layer, name, inputs, gradients)`` takes what a layer saw; True: the parameter needs nothing else."""


class SampleGradients:
    """Adds up transformed gradients of single samples over batches.

    The module must fulfil two conditions. Samples come first in every layer's input and output, and a sample's loss
    depends on that sample alone (evaluation mode: no batch statistics, no dropout). Parameters of which this is not so,
    or that are used outside of a layer's ``forward``, are found by :meth:`check` and end up in :attr:`loose`; they have
    to be measured one sample at a time. Under gradient checkpointing the layers are run again as always.

    Memory: one fp32 tensor per parameter (the total), one temporary of the size of a block of the largest weight; for a
    parameter used several times (tied embeddings), one gradient of its size. Compute: that of one forward and backward
    pass, and one pass over each weight per batch.

    Args:
        module: the module, in evaluation mode.
        parameters: name to parameter, as in ``module.named_parameters()``.
        transform: in place, applied to each sample's gradient: ``Tensor.square_`` or ``Tensor.abs_``.
        sink: called with each layer's input and output gradient instead, where it wants them (Kronecker factors).

    Attributes:
        total: name to ``Σ_b transform(∂L_b/∂θ)``, fp32.
        loose: the names that no rule covers; their totals are not to be used.
        never: those of them that no check can clear.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, Tensor],
        transform: Transform = Tensor.square_,
        sink: UseSink | None = None,
    ) -> None:
        self.module, self.parameters, self.transform, self.sink = module, dict(parameters), transform, sink
        self.total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        self.loose: set[str] = set()
        self._names = {id(p): name for name, p in parameters.items()}
        self._rules = self._find_rules()
        self._anchor = torch.zeros((), requires_grad=True, device=next(iter(parameters.values())).device)
        self._samples = 0
        self._in_backward = False
        self._calls: dict[str, int] = defaultdict(int)
        self._pending: dict[str, list[Use]] = defaultdict(list)
        # A compiled module runs code of its own instead of its layers' `forward`.
        if any(type(part).__name__ == "OptimizedModule" for part in module.modules()):
            self.loose.update(self.parameters)
        self.never = frozenset(self.loose)

    def _find_rules(self) -> list[Rule]:
        rules = []
        for layer in self.module.modules():
            if isinstance(layer, nn.ParameterDict):
                continue  # it computes nothing; who it belongs to may have a rule
            wanted = [n for n, p in layer._parameters.items() if p is not None and id(p) in self._names]
            rule = rule_for(layer, wanted) if wanted else adapter_rule(layer, self._names)
            if rule is not None:
                rules.append(rule)
        return rules

    def add(self, samples: int, losses: Callable[[], Iterable[Tensor]]) -> bool:
        """Adds a batch, if its loss is finite: NaN of one sample would stay in every sum.

        Args:
            samples: number of samples in the batch.
            losses: runs the forward pass and gives scalars, each the sum over the batch of every sample's loss (with
                several, their graphs may be shared).

        Returns:
            False if the (first) loss is NaN or infinite, and nothing was added.
        """
        if len(self.loose) == len(self.parameters):
            return True
        self._samples = samples
        self._calls.clear()
        with torch.enable_grad(), replaced_forwards({rule.layer: self._watched(rule) for rule in self._rules}):
            for number, (loss, last) in enumerate(with_last(losses())):
                if number == 0 and not bool(loss.isfinite()):
                    return False
                self._backward(loss, retain_graph=not last)
        return True

    def check(self, samples: int, losses: Callable[[], Iterable[Tensor]], singles: list[Callable[[], Any]]) -> None:
        """Compares a batch with its samples one by one; what differs is :attr:`loose` from then on.

        Args:
            samples: number of samples in the batch.
            losses: as in :meth:`add`.
            singles: the same for each sample of the batch alone.
        """
        totals, self.total = self.total, {n: torch.zeros_like(t) for n, t in self.total.items()}
        try:
            if not self.add(samples, losses):
                self.loose.update(self.parameters)  # the pass over single samples finds the ones that fail
                return
            made = self.total
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError):
            self.loose.update(self.parameters)  # the module takes single samples alone
            return
        finally:
            self.total = totals
        expected = {name: torch.zeros_like(value) for name, value in made.items()}
        for single in singles:
            add_one_by_one_(expected, single(), self.parameters, self.transform)
        scale = max((float(value.norm()) for value in expected.values()), default=0.0)
        for name, value in expected.items():
            # Rounding of 16-bit arithmetic passes; a layer that is used in another way is off by far more. NaN does not
            # pass, because of `not`.
            if not float((made[name] - value).norm()) <= 0.02 * float(value.norm()) + 1e-6 * scale:
                self.loose.add(name)

    def _backward(self, loss: Tensor, retain_graph: bool) -> None:
        self._in_backward = True
        self._pending.clear()
        try:
            wanted = list(self.parameters.values())
            found = torch.autograd.grad(loss, [self._anchor, *wanted], retain_graph=retain_graph, allow_unused=True)
            for name, gradient in zip(self.parameters, found[1:], strict=True):
                if gradient is not None:
                    self.loose.add(name)  # it was used outside of the layers that are watched
            for name, uses in self._pending.items():
                self._add_together(name, uses)
        finally:
            self._in_backward = False
            self._pending.clear()

    @torch.no_grad()
    def _add_together(self, name: str, uses: list[Use]) -> None:
        """Several uses of one parameter: added up for each sample before anything is squared."""
        if name in self.loose:
            return
        total = self.total[name]
        gradient = torch.empty_like(total)
        for sample in range(self._samples):
            gradient.zero_()
            for use in uses:
                use.add_sample_(gradient, sample)
            total.add_(self.transform(gradient))

    def _watched(self, rule: Rule) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            inputs = args[0] if len(args) == 1 and not kwargs else None
            if isinstance(inputs, Tensor) and rule.is_shared(inputs):
                inputs = inputs.expand(self._samples, *inputs.shape[1:])
            if not (isinstance(inputs, Tensor) and inputs.ndim > 0 and len(inputs) == self._samples):
                return rule._forward(*args, **kwargs)
            if not torch.is_grad_enabled():
                return rule.forward(inputs)
            output = _Layer.apply(self._anchor, inputs, rule, self)
            if isinstance(output, Tensor) and len(output) == self._samples:
                if not self._in_backward:
                    for name in rule.names:
                        self._calls[self._names[id(rule.parameter(name))]] += 1
                return output
            return rule._forward(*args, **kwargs)

        return forward

    def _arrived(self, rule: Rule, inputs: Tensor, gradients: Tensor) -> None:
        for name, use in rule.uses(inputs, gradients):
            full = self._names[id(rule.parameter(name))]
            if full in self.loose:
                continue
            if self._calls[full] > 1:
                self._pending[full].append(use)
            elif self.sink is None or not self.sink(rule.layer, full, inputs, gradients):
                use.add_transformed_(self.total[full], self.transform)


class _Layer(torch.autograd.Function):
    """A layer whose parameters are constants to autograd, and which tells what came back to it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, inputs: Tensor, rule: Rule, owner: SampleGradients) -> Any:
        ctx.rule, ctx.owner = rule, owner
        ctx.save_for_backward(inputs)
        device = inputs.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return rule.forward(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors[0].detach()
        device, dtype, enabled = ctx.autocast
        # A leaf is run again in the precision of its forward pass; products of matrices are what autograd's are.
        with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            wanted = ctx.rule.backward(inputs, gradients[0]) if ctx.needs_input_grad[1] else None
            ctx.owner._arrived(ctx.rule, inputs, gradients[0])
        return None, wanted, None, None


def add_one_by_one_(
    total: Mapping[str, Tensor], losses: Iterable[Tensor], parameters: Mapping[str, Tensor], transform: Transform
) -> bool:
    """The same for a batch of one sample, by plain autograd.

    Args:
        total: name to fp32 tensor, added to in place.
        losses: scalars; their graphs may be shared.
        parameters: name to parameter.
        transform: in place, applied to the sample's gradient.

    Returns:
        False if the (first) loss is NaN or infinite, and nothing was added.
    """
    with torch.enable_grad():
        for number, (loss, last) in enumerate(with_last(losses)):
            if number == 0 and not bool(loss.isfinite()):
                return False
            gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=not last, allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[name].add_(transform(gradient.detach().float()))
    return True


def with_last(items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Each item, and whether it is the last one: only that may free a shared graph."""
    iterator = iter(items)
    try:
        item = next(iterator)
    except StopIteration:
        return
    for following in iterator:
        yield item, False
        item = following
    yield item, True


@contextmanager
def only_trainable(module: nn.Module, parameters: Iterable[Tensor]) -> Iterator[None]:
    """No other parameter asks for a gradient, so that a backward pass is as short as it can be."""
    wanted = {id(parameter) for parameter in parameters}
    others = [p for p in module.parameters() if p.requires_grad and id(p) not in wanted]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
