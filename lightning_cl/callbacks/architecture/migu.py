"""MIGU: rows of a linear layer whose outputs are small for a task get no gradient from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_cl.arguments import check_share
from lightning_cl.core.checks import refuse_sharded
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.placement import clean_name
from lightning_cl.core.questions import Need
from lightning_cl.functional.migu import mask_rows_, output_magnitudes, row_mask


class MIGU(ContinualCallback):
    """MIGU (Du et al. 2024, arXiv:2406.17245): updates of the rows whose outputs are large for the task, alone.

    ::

        n_i = Σ_t |h_ti| / ‖h_t‖₁,   gradient of row i ← 0  for the share `masked` of rows with the smallest n_i

    for the outputs ``h`` of each linear layer at the positions of a step (:mod:`lightning_cl.functional.migu`). Of an
    adapted layer they are those of base and adapter together, and the rows are those of ``B``. It starts with the
    second task. It needs no data of earlier tasks, and no labels of tasks.

    What is masked is the gradient: an optimizer with momentum still moves masked rows, and Adam, which divides by the
    gradients' size, undoes a part; weight decay moves them too. So it protects less than the formula says. Padding is
    left out where the batch has an ``attention_mask`` of the outputs' shape. Layers whose weight is that of an
    embedding, too, are left alone, and so are those that the forward pass does not call.

    Memory: one number for each row. Compute: three passes over the outputs of each linear layer in the forward pass,
    which can cost a tenth of a step, and one over the masked gradients; over several processes, one sum of all numbers.

    Args:
        masked: the share of each layer's rows that get no gradient, from 0 (bit for bit training without this callback)
            to below 1.

    Raises:
        ValueError: if `masked` is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import MIGU
        >>> method = MIGU(masked=0.5)
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.report()["masked"]
        0.5
    """

    edit_order = 2

    def __init__(self, masked: float = 0.7) -> None:
        super().__init__()
        self.masked = check_share("masked", masked)
        if self.masked == 1.0:
            raise ValueError("masked=1.0: expected a share from 0 to below 1, as 0.7; with 1 nothing would be learnt")
        self._sums: dict[str, Tensor] = {}  # n of the micro-batches of this step, for each layer
        self._rows: dict[str, Tensor] = {}  # those that are updated in this step
        self._counted: Tensor | None = None  # positions of the batch that are no padding
        self._hooks: list[RemovableHandle] = []
        self._parts: dict[str, list[Tensor]] = {}  # for each layer the parameters whose rows are its outputs
        self._norms: dict[str, list[float]] = {}  # for each task the sums of ‖masked part‖² and ‖gradient‖²

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_sharded(trainer, f"{type(self).__name__} masks whole rows, which it does not find in")

    @property
    def is_active(self) -> bool:
        """True if the current task is masked: from the second on."""
        return self.masked > 0 and self.task is not None and (self.task.index > 0 or self.tasks_done > 0)

    # ------------------------------------------------------------------ magnitudes

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._unhook()
        if not self.is_active:
            return
        assert self.task is not None
        self._norms.setdefault(self.task.name, [0.0, 0.0])
        for name, (part, parameters) in _layers(pl_module).items():
            self._parts[name] = parameters
            self._hooks.append(part.register_forward_hook(self._seen_by(name)))

    def _seen_by(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(part: nn.Module, inputs: Any, output: Any) -> None:
            # Extra passes without a graph, and those in evaluation mode, are no part of the step.
            if not (part.training and torch.is_grad_enabled() and isinstance(output, Tensor)):
                return
            counted = self._counted
            if counted is not None and counted.shape != output.shape[:-1]:
                counted = None
            found = output_magnitudes(output, counted)
            self._sums[name] = self._sums[name] + found if name in self._sums else found

        return hook

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self._counted = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    @override
    def observe_gradients(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer, scale: float
    ) -> None:
        # Before anybody edits: extra passes that make a reference gradient do not count.
        sums, self._sums = self._sums, {}
        if sums and trainer.world_size > 1:
            names, sizes = list(sums), [len(value) for value in sums.values()]
            together = trainer.strategy.reduce(torch.cat([sums[name] for name in names]), reduce_op="sum")
            sums = dict(zip(names, together.split(sizes), strict=True))
        self._rows = {name: row_mask(value, self.masked) for name, value in sums.items()}

    @override
    @torch.no_grad()
    def edit_gradients(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer, scale: float
    ) -> None:
        rows, self._rows, self._sums = self._rows, {}, {}
        log = bool(rows) and self.is_log_step(trainer)
        before = _norm_squared(pl_module) if log else 0.0
        for name, updated in rows.items():
            for parameter in self._parts[name]:
                if parameter.grad is not None:
                    mask_rows_(parameter.grad, updated)
        if log and before > 0:
            assert self.task is not None
            norms = self._norms[self.task.name]
            left = _norm_squared(pl_module)
            norms[0], norms[1] = norms[0] + (before - left) / scale**2, norms[1] + before / scale**2
            self.log_scalar("masked_share", max(0.0, 1.0 - left / before) ** 0.5)

    @override
    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self._sums = {}

    @override
    def close_path(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._unhook()

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._unhook()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._unhook()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._unhook()

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._parts, self._sums, self._rows, self._counted = [], {}, {}, {}, None

    # ------------------------------------------------------------------ state and report

    @override
    def continual_state(self) -> dict[str, Any]:
        return {"norms": {name: list(values) for name, values in self._norms.items()}}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self._norms = {name: list(values) for name, values in state["norms"].items()}

    @override
    def report(self) -> dict[str, Any]:
        shares = {name: (part / whole) ** 0.5 for name, (part, whole) in self._norms.items() if whole > 0}
        return {
            "masked": self.masked,
            "masked_share": shares,
            "sentences": [
                f"{type(self).__name__}, {name}: the masked rows had {share:.0%} of the gradient's norm"
                for name, share in shares.items()
            ],
        }

    @override
    def advice(self, need: Need) -> str | None:
        if need == "begin":
            return None
        return f"a {'larger' if need == 'keep' else 'smaller'} {type(self).__name__}(masked=…), {self.masked:g} now"


def _layers(module: nn.Module) -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """Linear layers, plain or with an adapter, and for each the trainable parameters whose rows are its outputs."""
    embedded = {id(p) for part in module.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    found: dict[str, tuple[nn.Module, list[Tensor]]] = {}
    inside: set[int] = set()
    for name, part in module.named_modules():
        if id(part) in inside:
            continue
        rows: list[Tensor] = []
        base = getattr(part, "base_layer", None)
        if base is not None and isinstance(getattr(part, "lora_B", None), nn.ModuleDict):
            inside |= {id(below) for below in part.modules()}
            rows = [p for up in part.lora_B.values() for p in up.parameters()]
            part_of_rows = base
        else:
            part_of_rows = part
        if isinstance(part_of_rows, nn.Linear):
            rows += [p for p in (part_of_rows.weight, part_of_rows.bias) if p is not None]
        rows = [p for p in rows if p.requires_grad and id(p) not in embedded]
        if rows:
            found[clean_name(name)] = (part, rows)
    return found


def _norm_squared(module: nn.Module) -> float:
    return sum(
        float(p.grad.float().square().sum(dtype=torch.float64)) for p in module.parameters() if p.grad is not None
    )
