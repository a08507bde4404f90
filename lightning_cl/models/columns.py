"""Progressive networks (Rusu et al. 2016) of fully connected columns, for small models and for teaching."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_cl.arguments import check_choice
from lightning_cl.functional.progressive import lateral_sum


class ProgressiveColumns(nn.Module):
    """One column of layers for each task; a new column reads the layers of all earlier ones, which are frozen.

    Layer i of column k is ``f(W h + b + Σ_j U_j relu(α_j V_j h_j))`` (equation 2); ``f`` is a ReLU, and the identity in
    the last layer. Laterals begin at the second layer, since the first one reads the same input in all columns. ``U_j``
    starts at 0 and ``α_j`` at 1, so that a new column starts as it would without laterals, to the bit.

    Earlier tasks are never forgotten, and each row must come with its task. Memory: a column for each task and laterals
    for each pair of tasks (:func:`lightning_cl.functional.progressive.count_parameters`). Compute: task k runs columns
    0 to k.

    Args:
        inputs: width of the input.
        hidden: widths of the hidden layers, one or more.
        lateral_width: rows of ``V_j``, the width of the bottleneck.

    Raises:
        ValueError: if a width is below 1.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], lateral_width: int = 16) -> None:
        super().__init__()
        widths = [inputs, *hidden]
        if len(widths) < 2 or min(*widths, lateral_width) < 1:
            raise ValueError(
                f"inputs={inputs!r}, hidden={list(hidden)!r}, lateral_width={lateral_width!r}: expected one or more"
                " hidden layers, and widths of at least 1"
            )
        self.widths, self.lateral_width = widths, lateral_width
        self.columns = nn.ModuleList()
        self.laterals = nn.ModuleList()

    def add_column(self, outputs: int, init: Literal["random", "previous"] = "random", seed: int = 0) -> int:
        """Freezes all columns and adds a trainable one for the next task.

        Args:
            outputs: width of the task's output.
            init: of the hidden layers: ``random``, or copied from the ``previous`` column.
            seed: of the column's own random numbers; the global ones stay as they are.

        Returns:
            The number of the task, from 0.

        Raises:
            ValueError: if `outputs` is below 1, or `init` is no known choice.
        """
        check_choice("init", init, ("random", "previous"))
        if outputs < 1:
            raise ValueError(f"outputs={outputs!r}: expected a width of at least 1")
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        task = len(self.columns)
        generator = torch.Generator().manual_seed(seed)
        pairs = list(pairwise([*self.widths, outputs]))
        column = nn.ModuleList(_linear(*pair, generator) for pair in pairs)
        if init == "previous" and task > 0:
            for layer, source in zip(list(column)[:-1], self.columns[-1], strict=False):  # type: ignore[call-overload]
                layer.load_state_dict(source.state_dict())
        self.columns.append(column)
        self.laterals.append(
            nn.ModuleList(
                nn.ModuleList(_Lateral(*pair, self.lateral_width, generator) for _ in range(task)) for pair in pairs[1:]
            )
        )
        return task

    def forward(self, x: Tensor, task: int) -> Tensor:
        """The output of a task's column.

        Args:
            x: ``[…, inputs]``.
            task: of all rows.

        Returns:
            ``[…, outputs]`` of the task.

        Raises:
            ValueError: if the task has no column.
        """
        if task not in range(len(self.columns)):
            raise ValueError(f"task={task!r}: expected one of the {len(self.columns)} tasks that have a column, from 0")
        below: list[Tensor] = [x] * (task + 1)
        depth = len(self.widths)
        for i in range(depth):
            made = []
            for k in range(task + 1):
                if i == depth - 1 and k < task:
                    continue  # outputs of earlier tasks are not asked for
                above: Tensor = self.columns[k][i](below[k])  # type: ignore[index]
                if i > 0 and k > 0:
                    parts: list[_Lateral] = list(self.laterals[k][i - 1])  # type: ignore[index]
                    above = above + lateral_sum(
                        below[:k], [p.down for p in parts], [p.up for p in parts], [p.scale for p in parts]
                    )
                made.append(above if i == depth - 1 else torch.relu(above))
            below = made
        return below[-1]


class _Lateral(nn.Module):
    """``V_j``, ``U_j`` and ``α_j`` from one earlier column into one layer."""

    def __init__(self, inputs: int, outputs: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(width, inputs, generator=generator) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, width))
        self.scale = nn.Parameter(torch.ones(()))


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A layer with torch's usual uniform initialisation, from a generator of its own."""
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer
