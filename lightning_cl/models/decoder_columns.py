"""Columns of decoder blocks in a language model, one for each task (progressive networks, Rusu et al. 2016).

The model that was there is column 0 and keeps its blocks and their names. Column k has blocks of its own, and reads all
earlier columns at each depth through bottlenecks that are added to its residual stream, after its block ``f``::

    h_k ← f_k(h_k) + Σ_{j<k} U_j relu(α_j V_j h_j)          j = 0 … k−1,  h_j after its own block

Embeddings, final norm and head are shared. ``U`` starts at 0 and ``α`` at 1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_cl.functional.progressive import lateral_sum
from lightning_cl.models.block_lists import architecture_of, check_whole, decoder_blocks, decoder_config
from lightning_cl.passes.heads import evaluated, few_tokens
from lightning_cl.random_state import seed_of, untouched_random_state


class _Columns:
    """State that the blocks of one model share: the columns' names, the active one, and a forward pass's streams."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.active = 0
        self.streams: list[Tensor] = []
        self.next_depth = 0


class _Lateral(nn.Module):
    """``V_j``, ``U_j`` and ``α_j`` from each earlier column into one block's stream."""

    def __init__(self, count: int, size: int, width: int, like: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.down = nn.ParameterList(
            nn.Parameter((torch.randn(width, size, generator=generator) / size**0.5).to(**options))
            for _ in range(count)
        )
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(size, width, **options)) for _ in range(count))
        self.scale = nn.ParameterList(nn.Parameter(torch.ones((), **options)) for _ in range(count))

    def forward(self, hidden: Sequence[Tensor]) -> Tensor:
        return lateral_sum(hidden, list(self.down), list(self.up), list(self.scale))


def columns_of(model: Any) -> list[str]:
    """The names of the columns that a model has besides its own blocks, in their order."""
    columns = _shared(model)
    return [] if columns is None else list(columns.names)


def has_columns(model: nn.Module) -> bool:
    """Tells if any part of a model has columns."""
    return any(hasattr(part, "columns") and isinstance(part.columns, _Columns) for part in model.modules())


def add_column(model: Any, name: str, width: int = 16, init: Literal["base", "random"] = "base", seed: int = 0) -> None:
    """Adds a frozen column for a task, which reads all columns before it. A column that is there stays as it is.

    Key-value caches are switched off in the model's configuration: each column would need one of its own.

    Args:
        model: a causal language model of ``transformers``, without adapters and not sharded.
        name: of the task.
        width: rows of ``V``, the width of the bottlenecks.
        init: of the new blocks: copies of the model's own (``base``), or ``random`` as the architecture draws them.
        seed: of the random numbers of this column; the global ones stay as they are.

    Raises:
        ValueError: if the model cannot have columns; it is as it was then, but for a message.

    Memory: a copy of all blocks, and ``2 · width · size + 1`` numbers for each block and earlier column.
    """
    check_whole(model)
    if getattr(model, "is_gradient_checkpointing", False):
        raise ValueError(
            f"model: {architecture_of(model)} computes blocks a second time in the backward pass"
            " (gradient_checkpointing), where the streams of the other columns are gone; switch it off"
        )
    if name in columns_of(model):
        return
    blocks, first = decoder_blocks(model), not has_columns(model)
    expected = _logits(model) if first else None
    columns = _shared(model) or _Columns()
    size = int(decoder_config(model).hidden_size)
    generator = torch.Generator().manual_seed(seed_of(seed, len(columns.names)))
    for depth, block in enumerate(blocks):
        made = _copy_block(block)
        if first:
            block.columns, block.depth, block.last = columns, depth, depth == len(blocks) - 1  # type: ignore[assignment]
            block.task_columns, block.task_laterals = nn.ModuleList(), nn.ModuleList()
            block.register_forward_pre_hook(_before, with_kwargs=True)
            block.register_forward_hook(_after, with_kwargs=True)
        like = next(p for p in block.parameters() if p.is_floating_point())
        laterals = _Lateral(len(columns.names) + 1, size, width, like, generator)
        block.task_columns.append(made)  # type: ignore[operator,union-attr]
        block.task_laterals.append(laterals)  # type: ignore[operator,union-attr]
        for parameter in (*made.parameters(), *laterals.parameters()):
            parameter.requires_grad_(False)
    columns.names.append(name)
    for config in (model.config, decoder_config(model), getattr(model, "generation_config", None)):
        if config is not None:
            config.use_cache = False
    if expected is not None:
        with using_column(model, name):
            if not torch.equal(_logits(model), expected):
                raise ValueError(
                    f"model: a copied column of {architecture_of(model)} does not compute what the model computes;"
                    " expected an architecture whose blocks read and give one stream, such as 'llama'"
                )
    if init == "random":
        _draw(model, [block.task_columns[-1] for block in blocks], seed_of(seed, len(columns.names), 1))  # type: ignore[index,misc]


def drop_columns(model: Any, count: int) -> None:
    """Removes all columns but the first `count`."""
    columns = _shared(model)
    if columns is None:
        return
    del columns.names[count:]
    columns.active = min(columns.active, count)
    for block in decoder_blocks(model):
        parts: tuple[Any, ...] = (block.task_columns, block.task_laterals)
        for part in parts:
            del part[count:]


def column_parameters(model: Any, name: str) -> dict[str, nn.Parameter]:
    """The parameters of a task's column and of what it reads through, by their names in `model`."""
    index = columns_of(model).index(name)
    wanted = {
        id(p)
        for block in decoder_blocks(model)
        for part in (block.task_columns[index], block.task_laterals[index])  # type: ignore[index]
        for p in part.parameters()  # type: ignore[union-attr]
    }
    return {path: p for path, p in model.named_parameters() if id(p) in wanted}


def use_column(model: Any, name: str | None) -> None:
    """Lets a model compute with the column of a task from now on; None: as it was without columns.

    Raises:
        ValueError: if the task has none.
    """
    columns = _shared(model)
    names = columns_of(model)
    if name is not None and name not in names:
        raise ValueError(f"task={name!r}: it has no column; there are columns of {names}")
    if columns is not None:
        columns.active = 0 if name is None else names.index(name) + 1
        columns.streams = []


@contextmanager
def using_column(model: Any, name: str | None) -> Iterator[None]:
    """:func:`use_column` inside; afterwards the model computes as before."""
    columns = _shared(model)
    before = columns.active if columns is not None else 0
    use_column(model, name)
    try:
        yield
    finally:
        if columns is not None:
            columns.active, columns.streams = before, []


def _shared(model: Any) -> _Columns | None:
    found = getattr(decoder_blocks(model)[0], "columns", None)
    return found if isinstance(found, _Columns) else None


def _copy_block(block: nn.Module) -> nn.Module:
    """A copy of a block as it was without columns; its configuration is shared."""
    memo: dict[int, Any] = {}
    for part in block.modules():
        config = getattr(part, "config", None)
        if config is not None:
            memo[id(config)] = config
    ours = {"task_columns", "task_laterals"}
    made = copy.copy(block)
    made.__dict__ = {k: v for k, v in block.__dict__.items() if k not in ("columns", "depth", "last")}
    made._modules = {k: v for k, v in block._modules.items() if k not in ours}
    for hooks in (
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
    ):
        made.__dict__[hooks] = type(block.__dict__[hooks])()
    return copy.deepcopy(made, memo)


def _logits(model: Any) -> Tensor:
    with evaluated(model), untouched_random_state():
        result: Tensor = model(input_ids=few_tokens(model), use_cache=False).logits
    return result


@torch.no_grad()
def _draw(model: Any, blocks: Sequence[nn.Module], seed: int) -> None:
    with untouched_random_state():
        torch.manual_seed(seed)
        for block in blocks:
            for part in block.modules():
                model._init_weights(part)


def _before(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Gives column 0 its own stream."""
    columns: _Columns = block.columns
    if not columns.active:
        return None
    if kwargs.get("past_key_values") is not None or kwargs.get("layer_past") is not None:
        raise ValueError(
            "use_cache=True: a key-value cache holds one column's keys, and each column of a progressive network needs"
            " its own; call the model, or generate, with use_cache=False"
        )
    hidden = args[0] if args else kwargs["hidden_states"]
    if block.depth == 0:
        columns.streams, columns.next_depth = [hidden] * (columns.active + 1), 0
    if block.depth != columns.next_depth:
        raise RuntimeError("progressive network: the blocks of the model are not called one after the other")
    return (
        ((columns.streams[0], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": columns.streams[0]})
    )


def _with_stream(stream: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})


def _after(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Runs the other columns at this depth; what comes out is the stream of the column that answers."""
    columns: _Columns = block.columns
    if not columns.active:
        return None
    made = [output[0] if isinstance(output, tuple) else output]
    for k in range(1, columns.active + 1):
        inputs, settings = _with_stream(columns.streams[k], args, kwargs)
        above = block.task_columns[k - 1](*inputs, **settings)
        above = above[0] if isinstance(above, tuple) else above
        made.append(above + block.task_laterals[k - 1](made[:k]))
    columns.streams, columns.next_depth = ([] if block.last else made), block.depth + 1
    return (made[-1], *output[1:]) if isinstance(output, tuple) else made[-1]
