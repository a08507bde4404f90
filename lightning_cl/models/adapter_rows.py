"""Rows of one batch under different adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl.models.adapter_factors import has_gates
from lightning_cl.models.adapter_names import task_name
from lightning_cl.models.adapters import adapter_of, find_peft_model, keep_switches

_BASE = "__base__"  # peft's word


@contextmanager
def adapters_per_row(module: nn.Module, tasks: Sequence[str | None]) -> Iterator[None]:
    """Inside, each row of a batch is computed with the adapter of its own task.

    Every row gets, to the last bit, what the whole batch gives under its adapter. Around a quantised base that holds up
    to rounding; with ``int8`` the rows of a batch influence each other in the base already. It works through the
    ``PeftModel``, through its decoder alone, and in ``generate`` with its cache and left padding; where a search
    repeats each row (beams), its task is repeated. In evaluation mode only.

    Compute: one pass of the base, and one of each adapter that a row has, over all rows.

    Args:
        module: contains a ``PeftModel``.
        tasks: for each row a task that has an adapter; None: the base alone.

    Raises:
        ValueError: if a task has no adapter, or the adapters do not work row by row (DoRA, adapters of experts,
            merged ones); inside, if a layer's input does not have these rows, or is in training mode.
    """
    from peft.tuners.lora.layer import Linear, LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    model = find_peft_model(module)
    rows = _Rows([_BASE if task is None else adapter_of(module, task) for task in tasks], model)
    kinds = (LoraLayer, AuxiliaryTrainingWrapper)
    layers: list[tuple[str, Any]] = [(p, m) for p, m in model.named_modules() if isinstance(m, kinds)]
    _check(model, layers, rows)
    handles: list[Any] = []
    with keep_switches(model, enabled=True):
        try:
            for path, layer in layers:
                # peft rounds what an adapter adds before it is added; its own way of one adapter rounds the sum.
                exact = type(layer) is Linear and not set(rows.names) & set(layer.lora_variant)
                before = _Before(path, rows, base_only=exact)
                handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
                if exact:
                    handles.append(layer.register_forward_hook(_After(rows), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _check(model: Any, layers: Sequence[tuple[str, Any]], rows: _Rows) -> None:
    if not rows.names:
        raise ValueError("tasks: it is empty; expected a task, or None, for each row")
    for name in dict.fromkeys(rows.names):
        if name != _BASE and model.peft_config[name].use_dora:
            raise ValueError(
                f"tasks: the adapter of {task_name(name) or name!r} is a DoRA one, which works on whole batches only;"
                " use one task at a time"
            )
    for path, layer in layers:
        if getattr(layer, "merged", False):
            raise ValueError(f"tasks: an adapter is merged into {path}; call unmerge_adapter() first")
        if any(has_gates(layer, name) for name in rows.names):
            raise ValueError(
                f"tasks: the adapters of {path} have gates to earlier ones, which work on whole batches only; use one"
                " task at a time, or save each task's adapter, which folds them in"
            )
        if "experts" in path.split(".") or hasattr(layer, "parameter_name"):
            raise ValueError(
                f"tasks: {path} belongs to experts, which see single tokens and no rows; use one task at a time"
            )


class _Rows:
    """The adapters of the rows, and the rows' positions in the input of a layer."""

    def __init__(self, names: list[str], model: Any) -> None:
        self.names = names
        # Transformers have [batch, length, width]; of two axes none is known to be the batch.
        self._axes = 3 if hasattr(getattr(model.get_base_model(), "config", None), "model_type") else 2
        self._places: dict[tuple[int, torch.device], dict[str, Tensor]] = {}

    def of(self, path: str, x: Tensor) -> list[str]:
        """The adapter of each row of an input; ValueError if it does not have these rows."""
        times, rest = divmod(len(x), len(self.names))
        axes = self._axes if x.is_floating_point() else 2
        if rest or times < 1 or x.ndim < axes or (self._axes == 2 and times != 1):
            raise ValueError(
                f"tasks: {len(self.names)} were given, but the input of {path} has the shape {list(x.shape)}: expected"
                " a row for each task"
            )
        return [name for name in self.names for _ in range(times)]

    def places(self, x: Tensor) -> dict[str, Tensor]:
        """For each adapter the indices of its rows in an input."""
        times = len(x) // len(self.names)
        key = (times, x.device)
        if key not in self._places:
            repeated = [name for name in self.names for _ in range(times)]
            self._places[key] = {
                name: torch.tensor([i for i, other in enumerate(repeated) if other == name], device=x.device)
                for name in dict.fromkeys(repeated)
                if name != _BASE
            }
        return self._places[key]


class _Before:
    """Tells a layer the adapters of its rows; with `base_only`, that all are of the base."""

    def __init__(self, path: str, rows: _Rows, base_only: bool) -> None:
        self.path, self.rows, self.base_only = path, rows, base_only

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if layer.training:
            raise ValueError(f"tasks: {self.path} is in training mode; call module.eval() first")
        names = self.rows.of(self.path, args[0])
        return args, {**kwargs, "adapter_names": [_BASE] * len(names) if self.base_only else names}


class _After:
    """Adds to each row what its adapter gives, in the same operations as a linear layer of peft with one adapter."""

    def __init__(self, rows: _Rows) -> None:
        self.rows = rows

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> Tensor:
        x = args[0]
        for name, places in self.rows.places(x).items():
            if name not in layer.lora_A:
                continue
            down, up = layer.lora_A[name], layer.lora_B[name]
            # Of all rows: products of fewer rows may be rounded in another way.
            added = up(down(layer.lora_dropout[name](x.to(down.weight.dtype)))) * layer.scaling[name]
            result[places] = (result[places] + added[places]).to(result.dtype)
        return result
