"""Block expansion (LLaMA-Pro, Wu et al. 2024): copies of decoder blocks that change nothing until they are trained.

A copy comes directly after its original in the forward pass. Its projections into the residual stream are zero, weights
and biases, so that it adds nothing at first (section 3.2 of the paper). The result is a plain ``transformers`` model
with more blocks: the configuration is rewritten, and no class of this library is needed to load it again.

A base block always keeps its *position*, counted from 0 in the model before any expansion. The *index* of a block is
its position in the present list; it grows as blocks are inserted before it, and names of parameters grow with it
(:func:`moved_blocks`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from torch import nn

from lightning_cl.models import block_copies, block_lists
from lightning_cl.models.block_lists import architecture_of, decoder_blocks

__all__ = [
    "Structure",
    "active_blocks",
    "check_expandable",
    "decoder_blocks",
    "expand_blocks",
    "find_language_model",
    "inserted_blocks",
    "moved_blocks",
    "moved_names",
    "new_parameters",
    "rebuild_blocks",
    "silence_blocks",
    "spread_positions",
    "structure_of",
]

RECORD = "block_expansion"  # the setting of a configuration that says which blocks are new


class Structure(TypedDict):
    """The blocks of a model as plain data, for checkpoints and configurations.

    Attributes:
        base_blocks: blocks before any expansion.
        positions: for each task, the positions of the base blocks that have a copy of that task after them.
    """

    base_blocks: int
    positions: list[list[int]]


def find_language_model(module: nn.Module) -> Any:
    """The causal language model of ``transformers`` that a module is or contains.

    Raises:
        ValueError: if there is none, or more than one.
    """
    from transformers import PreTrainedModel

    found: list[tuple[str, PreTrainedModel]] = []
    for path, part in module.named_modules():
        inner = any(path.startswith(f"{outer}." if outer else "") for outer, _ in found)
        if isinstance(part, PreTrainedModel) and not inner and part.get_output_embeddings() is not None:
            found.append((path, part))
    if len(found) != 1:
        number = "no causal language model of transformers, or it is not built yet"
        if found:
            number = f"{len(found)} language models, {[path for path, _ in found]}"
        raise ValueError(
            f"{type(module).__name__}: it contains {number}; expected one, as CausalLM has, or any module with a"
            " transformers model that has a head"
        )
    return found[0][1]


def spread_positions(base_blocks: int, count: int) -> list[int]:
    """The positions of `count` base blocks, evenly spread: the last of each of `count` groups of about equal size.

    Where `count` divides `base_blocks`, these are the paper's groups; the last block is always among them.

    Args:
        base_blocks: blocks of the model before any expansion.
        count: blocks to insert, 1 to `base_blocks`.

    Raises:
        ValueError: if `count` is out of range.

    Example:
        >>> spread_positions(8, 2), spread_positions(7, 3)
        ([3, 7], [1, 4, 6])
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= base_blocks:
        raise ValueError(
            f"blocks={count!r}: expected a number of blocks to insert from 1 to {base_blocks}, the blocks of the model"
        )
    # Rounded half up in whole numbers: no floating point decides where a block stands.
    return [(2 * (group + 1) * base_blocks + count) // (2 * count) - 1 for group in range(count)]


def structure_of(model: Any) -> Structure | None:
    """The expansion of a model as plain data; None if it has none.

    It is read from the configuration, so that it survives ``save_pretrained``. A model without that record counts as a
    base model: delete ``config.block_expansion`` to take an expanded model as the base of a new run.

    Raises:
        ValueError: if the record does not fit the model's blocks.
    """
    record = getattr(block_lists.decoder_config(model), RECORD, None)
    if record is None:
        return None
    structure = _checked(record, f"config.{RECORD}")
    there, expected = len(decoder_blocks(model)), len(_order(structure))
    if there != expected:
        raise ValueError(
            f"config.{RECORD}={record!r}: {architecture_of(model)} has {there} blocks; expected {expected}: delete the"
            " setting if the model is a base model"
        )
    return structure


def expand_blocks(
    model: Any, blocks: int | Sequence[int], task: int = 0, outputs: Sequence[str] | None = None
) -> list[int]:
    """Inserts new blocks of one task into a causal language model; its logits stay the same to the bit.

    Each new block is a trainable copy of a base block with zeroed output projections. It stands after its original and
    after the copies of earlier tasks. Blocks that were there stay the same objects, and ``requires_grad`` of their
    parameters is left alone. Copies of quantised blocks have 16-bit weights.

    A task whose blocks are there already is not expanded again. The configuration object of the model is changed in
    place: another model that shares it would be spoilt.

    Args:
        model: a ``transformers`` model, without adapters and not sharded.
        blocks: a number of blocks, evenly spread (:func:`spread_positions`), or positions of base blocks, each once.
        task: 0 for the first expansion; the tasks before it must be there.
        outputs: for architectures that are not known: the parts of one block that write into the residual stream, as
            ``["attention.out", "mlp.out"]``. Each is a linear layer or a parameter.

    Returns:
        The indices of the task's blocks.

    Raises:
        ValueError: if an argument or the architecture does not fit; the model is then as it was.

    Memory: the new blocks, 4 to 16 bytes for each of their parameters when they are trained. Compute: one forward pass
    over 12 tokens here; later inference takes (base + new) / base of the time.
    """
    structure = structure_of(model) or {"base_blocks": len(decoder_blocks(model)), "positions": []}
    positions = _checked_positions(blocks, structure["base_blocks"])
    done = structure["positions"]
    if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task <= len(done):
        raise ValueError(
            f"task={task!r}: the model has the blocks of {len(done)} tasks; expected a number from 0 to {len(done)}"
        )
    if task < len(done):
        if done[task] != positions:
            raise ValueError(
                f"blocks={blocks!r}: task {task} has its blocks after the base blocks {done[task]} already; expected"
                " the same positions, or the number of the next task"
            )
    else:
        _insert(model, structure, {**structure, "positions": [*done, positions]}, outputs)
    return inserted_blocks(model, task)


def rebuild_blocks(model: Any, structure: Mapping[str, Any], outputs: Sequence[str] | None = None) -> None:
    """Gives a model the blocks of `structure`, so that the weights of an expanded model can be loaded into it.

    A model that has them is left alone; one that has the blocks of the first tasks gets the others.

    Args:
        model: a fresh base model, or an expanded one.
        structure: of :func:`structure_of`.
        outputs: as in :func:`expand_blocks`.

    Raises:
        ValueError: if the model is of another size, or has other blocks already.
    """
    wanted = _checked(structure, "structure")
    there = structure_of(model) or {"base_blocks": len(decoder_blocks(model)), "positions": []}
    count = len(there["positions"])
    if there["base_blocks"] != wanted["base_blocks"] or there["positions"] != wanted["positions"][:count]:
        raise ValueError(
            f"structure={dict(structure)!r}: {architecture_of(model)} has {dict(there)!r}; expected the same base, and"
            " the same first tasks"
        )
    if there != wanted:
        _insert(model, there, wanted, outputs)


def inserted_blocks(model: Any, task: int | None = None) -> list[int]:
    """The indices of the blocks that one task, or any task (None), has inserted."""
    structure = structure_of(model)
    order = [] if structure is None else _order(structure)
    return [i for i, (_, owner) in enumerate(order) if owner is not None and task in (None, owner)]


def new_parameters(model: Any, task: int | None = None) -> dict[str, nn.Parameter]:
    """The parameters of the blocks that one task, or any task (None), has inserted, by their names in `model`."""
    blocks = decoder_blocks(model)
    (prefix,) = (name for name, module in model.named_modules() if module is blocks)
    starts = tuple(f"{prefix}.{index}." for index in inserted_blocks(model, task))
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(starts)}


def moved_blocks(before: Structure | None, after: Structure) -> dict[int, int]:
    """For each index of a block in `before`, its index in `after`; names of parameters move in the same way.

    Args:
        before: the structure before an expansion; None: the base model.
        after: a structure that has all its blocks.

    Example:
        >>> moved_blocks(None, {"base_blocks": 3, "positions": [[0, 2]]})
        {0: 0, 1: 2, 2: 3}
    """
    order = _order(after)
    return {i: order.index(entry) for i, entry in enumerate(_order(before or {**after, "positions": []}))}


def moved_names(module: nn.Module, model: Any, names: Iterable[str], before: Structure | None) -> frozenset[str]:
    """The names that entries of ``state_dict()`` have now, from their names before an expansion.

    Args:
        module: is or contains the model.
        model: as it is now.
        names: in the module, when the model had the structure `before`.
        before: None: the base model.
    """
    after = structure_of(model)
    if after is None or after == before:
        return frozenset(names)
    indices = moved_blocks(before, after)
    blocks = decoder_blocks(model)
    prefix = next(name for name, part in module.named_modules() if part is blocks) + "."
    moved = set()
    for name in names:
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            name = f"{prefix}{indices[int(index)]}.{rest}"
        moved.add(name)
    return frozenset(moved)


@torch.no_grad()
def silence_blocks(model: Any, task: int = 0, outputs: Sequence[str] | None = None) -> None:
    """Sets the new blocks of a task back to what they were when they were inserted; parameters stay the same objects.

    Args:
        model: an expanded model, whose base blocks have not changed since.
        task: whose blocks.
        outputs: as in :func:`expand_blocks`.
    """
    structure = structure_of(model)
    order = [] if structure is None else _order(structure)
    blocks = list(decoder_blocks(model))
    for index in inserted_blocks(model, task):
        original = blocks[order.index((order[index][0], None))]
        blocks[index].load_state_dict(block_copies.silent_copy(model, original, outputs).state_dict())


@contextmanager
def active_blocks(model: Any, tasks: Sequence[int]) -> Iterator[None]:
    """Takes the new blocks of all other tasks out of the path inside; with no tasks, the base model remains.

    Inside it is a plain model that can be called, generate, and be saved; names of parameters are those of the shorter
    model. Nothing is copied. A key-value cache must not cross the border.

    Args:
        model: an expanded model.
        tasks: whose blocks stay.

    Raises:
        ValueError: if a task has no blocks.
    """
    structure = structure_of(model)
    known = len(structure["positions"]) if structure is not None else 0
    unknown = [task for task in tasks if task not in range(known)]
    if unknown:
        raise ValueError(f"tasks={list(tasks)!r}: the model has the blocks of {known} tasks, none of {unknown}")
    if structure is None:
        yield
        return
    keep = [i for i, (_, owner) in enumerate(_order(structure)) if owner is None or owner in tasks]
    positions = [at for task, at in enumerate(structure["positions"]) if task in tasks]
    blocks = list(decoder_blocks(model))
    undo = block_lists.arrange(
        model, [blocks[i] for i in keep], keep, {RECORD: {**structure, "positions": positions} if positions else None}
    )
    try:
        yield
    finally:
        undo()


def check_expandable(model: Any, outputs: Sequence[str] | None = None) -> None:
    """Finds models that cannot be expanded, without changing them or running them.

    Raises:
        ValueError: that names the architecture and says what would be right.
    """
    block_lists.check_whole(model)
    for block in decoder_blocks(model):
        block_copies.find_outputs(model, block, outputs)


def _insert(model: Any, before: Structure, after: Structure, outputs: Sequence[str] | None) -> None:
    """Inserts the blocks of `after` that `before` lacks; on an error the model is as it was."""
    check_expandable(model, outputs)
    there, wanted = _order(before), _order(after)
    old = list(decoder_blocks(model))
    sources = [there.index(entry if entry in there else (entry[0], None)) for entry in wanted]
    new = [i for i, entry in enumerate(wanted) if entry not in there]
    modules = [
        block_copies.silent_copy(model, old[source], outputs) if i in new else old[source]
        for i, source in enumerate(sources)
    ]
    undo = block_lists.arrange(model, modules, sources, {RECORD: dict(after)})
    try:
        block_lists.check_reload(model)
        block_copies.check_identity(model, [modules[i] for i in new], outputs)
        block_copies.keep_unquantized(model, [i for i, (_, owner) in enumerate(wanted) if owner is not None])
    except BaseException:
        undo()
        raise


def _order(structure: Structure) -> list[tuple[int, int | None]]:
    """For each block, in the order of the path: the position of its base block, and its task (None: the base)."""
    order: list[tuple[int, int | None]] = []
    for position in range(structure["base_blocks"]):
        order.append((position, None))
        order += [(position, task) for task, at in enumerate(structure["positions"]) if position in at]
    return order


def _checked_positions(blocks: Any, base_blocks: int) -> list[int]:
    if isinstance(blocks, int):
        return spread_positions(base_blocks, blocks)
    positions = list(blocks) if isinstance(blocks, Sequence) and not isinstance(blocks, str) else []
    whole = all(isinstance(at, int) and not isinstance(at, bool) and 0 <= at < base_blocks for at in positions)
    if not positions or not whole or len(set(positions)) < len(positions):
        raise ValueError(
            f"blocks={blocks!r}: expected a number of blocks, or different positions of base blocks from 0 to"
            f" {base_blocks - 1}"
        )
    return sorted(positions)


def _checked(structure: Any, argument: str) -> Structure:
    """A structure of plain containers.

    Raises:
        ValueError: if it is none.
    """
    try:
        base_blocks, positions = structure["base_blocks"], structure["positions"]
        if not isinstance(base_blocks, int) or base_blocks < 1:
            raise ValueError("no number of blocks")
        checked = [_checked_positions(list(at), base_blocks) for at in positions]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{argument}={structure!r}: expected {{'base_blocks': a number, 'positions': a list of positions for each"
            " task}"
        ) from error
    return {"base_blocks": base_blocks, "positions": checked}
