"""New decoder blocks that learn, in a model that stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl.arguments import check_integer
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.placement import tensor_bytes
from lightning_cl.core.questions import Need, Trait
from lightning_cl.models.block_copies import find_outputs
from lightning_cl.models.expansion import (
    active_blocks,
    decoder_blocks,
    expand_blocks,
    find_language_model,
    inserted_blocks,
    new_parameters,
    silence_blocks,
    structure_of,
)
from lightning_cl.tasks import TaskPosition

_TAKEN: Mapping[Trait, str] = MappingProxyType(
    {
        "shared parameters": (
            "each task starts new blocks from the base (per_task=True), and nothing that an earlier task trained is"
            " trained again: the penalty would hold nothing. Leave it out, or use BlockExpansion(per_task=False)"
        ),
        "earlier outputs": (
            "the blocks of an earlier task are not in the path of a later one (per_task=True): there is no earlier"
            " output to keep. Leave it out, or use BlockExpansion(per_task=False)"
        ),
        "earlier samples": (
            "the blocks of a task would be trained on the samples of others, and each task has its own"
            " (per_task=True). Leave it out, or use BlockExpansion(per_task=False)"
        ),
    }
)


class BlockExpansion(ContinualCallback):
    """Training of new decoder blocks in a frozen language model (LLaMA-Pro, Wu et al. 2024, arXiv:2401.02415).

    After some of the model's blocks a copy is inserted whose projections into the residual stream are zero, so that
    at first the model computes what it did, to the bit (section 3.2)::

        x ← x + attention(x);  x ← x + mlp(x)          with W_o = 0 and W_down = 0 in a new block

    Only the new blocks are trained. The result is a plain ``transformers`` model with more blocks: it is saved and
    loaded as any other, and needs nothing of this library.

    By default all tasks train the same new blocks. Then later tasks overwrite what earlier ones learnt in them, and
    only the base's own weights are safe: use it with replay or a penalty. With ``per_task`` each task trains blocks of
    its own, which start from the base again. An evaluation of a task has its blocks alone in the path, so that its
    outcome stays the same to the bit; a task that was not trained gets the base, and a question without a task the
    newest blocks. The model never has more than one set; the others are in this callback and its checkpoints.

    The module is a :class:`~lightning_cl.CausalLM` without LoRA, or any module that contains one causal language model
    of ``transformers``. A ``CausalLM`` from disk leaves the frozen base out of its checkpoints.

    Memory: the new blocks, 4 to 16 bytes a parameter while they are trained; with ``per_task`` one set a task, in main
    memory. Compute: with k new blocks on L, training and inference run (L + k) / L of the blocks.

    Args:
        blocks: how many to insert, evenly spread over the model, or after which blocks, counted from 0.
        per_task: whether each task has new blocks of its own.
        outputs: for architectures that are not known: the parts of a block that write into the residual stream, as
            ``["attention.out", "mlp.out"]``.

    Attributes:
        blocks_of: with ``per_task``: for each task that has ended the weights of its blocks, by their names in the
            model.

    Raises:
        ValueError: if an argument is out of its range; before training, if the model cannot be expanded: adapters,
            sharded weights, an architecture that is not known.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import BlockExpansion
        >>> method = BlockExpansion(blocks=4)
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.report()["per_task"]
        False
    """

    owns = "the trainable parameters"

    def __init__(
        self, blocks: int | Sequence[int] = 8, per_task: bool = False, outputs: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.blocks: int | list[int] = (
            check_integer("blocks", blocks, 1, "a number of blocks to insert of at least 1, or a list of positions")
            if isinstance(blocks, (int, float, str))
            else list(blocks)
        )
        self.per_task = per_task
        self.outputs = None if outputs is None else list(outputs)
        self.blocks_of: dict[str, dict[str, Tensor]] = {}
        self.takes_away = _TAKEN if per_task else MappingProxyType({})
        self.unanswered = frozenset() if per_task else frozenset({"deployed"})
        self._begun: int | None = None  # index of the task that the blocks in the model belong to
        self._sizes: dict[str, int] = {}

    @override
    def on_sequence_start(self) -> None:
        self.blocks_of, self._begun = {}, None

    # ------------------------------------------------------------------ structure

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Now: the checksum is of the weights as they are loaded, before a Trainer's precision changes them.
        leave_base_out = getattr(pl_module, "leave_base_out", None)
        if callable(leave_base_out):
            leave_base_out()

    @override
    def build(self, trainer: L.Trainer, pl_module: L.LightningModule, tasks: Sequence[str]) -> None:
        model = find_language_model(pl_module)
        if tasks:
            expand_blocks(model, self.blocks, 0, self.outputs)
        new = new_parameters(model)
        self._sizes = {
            "new_blocks": len(inserted_blocks(model)),
            "base_blocks": len(decoder_blocks(model)) - len(inserted_blocks(model)),
            "new_parameters": sum(p.numel() for p in new.values()),
            "new_bytes": sum(p.numel() * p.element_size() for p in new.values()),
        }

    @override
    def choose_trainable(self, pl_module: L.LightningModule, task: TaskPosition) -> None:
        model = find_language_model(pl_module)
        pl_module.requires_grad_(False)
        for parameter in new_parameters(model).values():
            parameter.requires_grad_(True)
        if not self.per_task or self._begun == task.index:
            return
        if self._begun is None and not self._silent(model):
            raise MisconfigurationException(
                f"{type(self).__name__}(per_task=True): {type(pl_module).__name__} has trained blocks already, and the"
                " first task would start them anew; give a fresh module. To take the blocks as a part of the base,"
                " delete config.block_expansion of the model"
            )
        silence_blocks(model, 0, self.outputs)
        self._begun = task.index

    def _silent(self, model: Any) -> bool:
        """Tells if the new blocks add nothing yet."""
        blocks = decoder_blocks(model)
        parts = [part for i in inserted_blocks(model) for part in find_outputs(model, blocks[i], self.outputs)]
        tensors = [p for part in parts for p in (part.parameters() if isinstance(part, nn.Module) else [part])]
        return not any(bool(tensor.any()) for tensor in tensors)

    # ------------------------------------------------------------------ tasks

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.per_task:
            assert self.task is not None
            new = new_parameters(find_language_model(pl_module))
            self.blocks_of[self.task.name] = {name: p.detach().cpu().clone() for name, p in new.items()}

    @torch.no_grad()
    def use_task(self, pl_module: L.LightningModule, task: str) -> None:
        """Puts the blocks of a task into the model for good: what is saved then is that task's model.

        Args:
            pl_module: the module.
            task: the name of a task that has ended.

        Raises:
            ValueError: if the task has no blocks of its own.
        """
        if task not in self.blocks_of:
            raise ValueError(f"task={task!r}: it has no blocks; there are blocks of {list(self.blocks_of)}")
        new = new_parameters(find_language_model(pl_module))
        for name, value in self.blocks_of[task].items():
            new[name].copy_(value)

    @override
    def deployed(
        self, trainer: L.Trainer, pl_module: L.LightningModule, task: str | None
    ) -> AbstractContextManager[None]:
        if task is None:
            return nullcontext()
        model = find_language_model(pl_module)
        if task in self.blocks_of and structure_of(model) is not None:
            return _swapped(new_parameters(model), self.blocks_of[task])
        return active_blocks(model, [])

    # ------------------------------------------------------------------ state and report

    @override
    def continual_state(self) -> dict[str, Any]:
        return {"blocks_of": {task: dict(blocks) for task, blocks in self.blocks_of.items()}, "begun": self._begun}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.blocks_of = {task: dict(blocks) for task, blocks in state["blocks_of"].items()}
        self._begun = state["begun"]

    @override
    def state_bytes(self) -> int:
        return sum(tensor_bytes(blocks) for blocks in self.blocks_of.values())

    @override
    def report(self) -> dict[str, Any]:
        sentences = []
        if self._sizes:
            new, base = self._sizes["new_blocks"], self._sizes["base_blocks"]
            whose = "for each task" if self.per_task else "for all tasks"
            sentences = [
                f"{type(self).__name__}: {new} new blocks {whose} next to {base} frozen ones,"
                f" {self._sizes['new_parameters']:,} parameters ({self._sizes['new_bytes'] / 1e6:,.1f} MB); the model"
                f" runs {new / base:.0%} more blocks than its base"
            ]
        if self.blocks_of:
            sentences.append(
                f"{type(self).__name__}: the model holds the blocks of {list(self.blocks_of)[-1]};"
                " use_task(module, name) puts those of another task into it"
            )
        return {"per_task": self.per_task, **self._sizes, "tasks": list(self.blocks_of), "sentences": sentences}

    @override
    def advice(self, need: Need) -> str | None:
        name = type(self).__name__
        if need == "learn":
            return f"more blocks in {name}(blocks=…), {self._sizes.get('new_blocks', self.blocks)} now"
        if need == "keep" and not self.per_task:
            return f"{name}(per_task=True), where it is known which task is asked about"
        return None


@contextmanager
def _swapped(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Lets parameters have other values inside."""
    before = {name: parameters[name].data for name in values}
    for name, value in values.items():
        parameters[name].data = value.to(before[name].device, before[name].dtype, copy=True)
    try:
        yield
    finally:
        for name, value in before.items():
            parameters[name].data = value
