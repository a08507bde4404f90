"""Dark Experience Replay: replayed samples are stored with the model's earlier predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_integer, check_strength
from lightning_cl.buffers.buffer import Unit
from lightning_cl.buffers.policies import PolicyName
from lightning_cl.callbacks.replay.base import Fill, Storage
from lightning_cl.callbacks.replay.dark_logits import DarkLogits, Replayed, bytes_of_position
from lightning_cl.callbacks.replay.replay import Replay
from lightning_cl.core.checks import refuse_several_loaders, refuse_sharded
from lightning_cl.core.questions import Need
from lightning_cl.data.mixing.drawing import Draw
from lightning_cl.data.mixing.plan import MixMode
from lightning_cl.passes.logits import OutputsFunction


class DERpp(Replay):
    """DER++ (Buzzega et al. 2020, NeurIPS, eq. 6): replay that also keeps the model close to its earlier logits.

    For each sample that ``Replay`` keeps, the k largest logits are stored at each position that bears loss, and the
    ``logsumexp`` of all other logits as one more class. For a classifier with at most k classes, just all logits are
    stored. At a replayed position the loss is

    ::

        its own (the labels' cross-entropy)  +  alpha · 1/n Σ_i ((z_i − mean z) − (v_i − mean v))²

    z are the model's logits and v the stored ones, of those n = k + 1 classes (the last is all others together; n = k
    if there are none). Each side is mean-centred, because a softmax does not change when one number is added to all
    logits (:func:`~lightning_cl.functional.derpp.dark_loss`). The k logits alone would not be enough: a new task that
    raises all other classes leaves the k logits unchanged relative to each other. Classes that a head gets later count
    among all others, if there are any. The sum over a batch's replayed positions is divided by the number of all its
    positions that bear loss, as in the mean of the module's own loss. So accumulated batches and several ranks give the
    same result as one batch, as far as they do for that loss. In the paper, new and replayed samples have separate
    means: its β is ``ratio / (1 − ratio)``, and its α is ``alpha`` times β. So `ratio` sets the amount of both, and
    `alpha` their proportion (0.1 to 1 in the paper).

    Two things differ from the paper. Logits are computed at the end of the task, in evaluation mode, and not when a
    sample is stored. With ``fill="training"`` they are computed when it is stored, before the step, also in evaluation
    mode. And both terms use the same replayed samples, with one pass through the model instead of three.

    Memory: 4 bytes per stored logit (6 for a vocabulary above 65,536) and 2 for all others, on disk next to the sample
    itself. With 64 logits this is 258 bytes (386) per position that bears loss. A budget counts samples or their
    tokens, and not the logits; so it cannot be in ``bytes``. Compute per step: the head once more for the replayed
    positions, without a pass through the model (with `outputs`, one pass). At a task's end, one forward pass over the
    samples that are kept. With ``fill="training"`` this pass is made for each batch, over its samples that are kept.

    Args:
        buffer_size: the budget, over all tasks, in `unit`.
        ratio: share of replayed tokens, as in ``Replay``.
        alpha: weight of the logits' distance relative to the labels' loss; 0 stores logits and adds no loss.
        policy: the choice of the samples that are kept, as in ``Replay``.
        mode: ``replace`` or ``add``, as in ``Replay``.
        seed: seed for the choice of stored and of replayed samples.
        top_k: the number of logits that are stored per position.
        outputs: a function ``outputs(module, batch)`` that gives the logits. It is needed where no submodule returns an
            object with ``.logits``.
        unit: unit of the budget: ``samples`` or ``tokens``.
        draw: how often each sample is replayed, as in ``Replay``.
        fill: ``task_end`` or ``training``: the moment when samples are offered and their logits are computed.
        storage: ``disk`` or ``memory`` (RAM).
        folder: folder for the files; default: the run's folder.

    Attributes:
        buffer: the :class:`~lightning_cl.buffers.ReplayBuffer`; ``buffer.extra(number)`` gives ``top_logits`` and
            ``top_classes`` of a record.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import DERpp
        >>> method = DERpp(buffer_size=500, ratio=0.1, alpha=0.5)
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.report()["alpha"]
        0.5
    """

    def __init__(
        self,
        buffer_size: int = 10_000,
        ratio: float | str | list[list[float]] = 0.05,
        alpha: float = 0.5,
        policy: PolicyName = "reservoir",
        mode: MixMode = "replace",
        seed: int = 0,
        *,
        top_k: int = 64,
        outputs: OutputsFunction | None = None,
        unit: Unit = "samples",
        draw: Draw = "uniform",
        fill: Fill = "task_end",
        storage: Storage = "disk",
        folder: str | None = None,
    ) -> None:
        super().__init__(
            buffer_size, ratio, policy, mode, seed, unit=unit, draw=draw, fill=fill, storage=storage, folder=folder
        )
        self.alpha = check_strength(alpha, "alpha")
        check_integer("top_k", top_k, 1, "a positive number of logits of a position, as 64")
        if unit == "bytes":
            raise ValueError(
                "unit='bytes': the logits next to a sample take many times its own bytes, and a budget does not count"
                f" them; give unit='tokens', each with about {6 * top_k} bytes of logits, or 'samples'"
            )
        self.top_k, self.outputs = top_k, outputs
        self._dark = DarkLogits(type(self).__name__, top_k, outputs)
        self._spoilt: dict[str, int] = {}  # for each task: positions whose logits could not be stored
        self._totals: dict[str, Tensor] = {}  # for each task: the sum of distances, and the number of positions

    @property
    def is_active(self) -> bool:
        """True if there is anything to add to the loss."""
        return self.alpha > 0 and self.mixes

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_sharded(trainer, f"{type(self).__name__}: the head cannot be applied to single positions with")

    @override
    def check_loader(self, loader: Any, task: str) -> None:
        refuse_several_loaders(loader, task, type(self).__name__)
        super().check_loader(loader, task)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._dark.release()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._dark.release()

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._dark.place(trainer, pl_module, self.buffer)
        if self.is_active:
            self._dark.watch()

    @override
    def extras(
        self, trainer: L.Trainer, pl_module: L.LightningModule, samples: Sequence[Any]
    ) -> list[dict[str, Tensor]]:
        return self._dark.of_samples(trainer, pl_module, samples)

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_task_end(trainer, pl_module)
        own = torch.tensor(self._dark.spoilt, device=trainer.strategy.root_device)
        spoilt = int(trainer.strategy.reduce(own, reduce_op="sum"))
        if spoilt:
            assert self.task is not None
            self._spoilt[self.task.name] = spoilt
            rank_zero_warn(
                f"{type(self).__name__}: the logits of {spoilt} positions of {self.task} are NaN or infinite; nothing"
                " is stored of them"
            )
        self._dark.spoilt = 0

    # ------------------------------------------------------------------ the term

    @override
    def extra_loss(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> Tensor | None:
        kinds = self.run.kinds
        if not self.is_active or kinds is None:
            return None
        with trainer.precision_plugin.forward_context():
            replayed = self._dark.replayed(batch, kinds, self.buffer)
            return None if replayed is None else self._term(replayed) / replayed.bearing

    def _term(self, replayed: Replayed) -> Tensor:
        """Returns the term for the replayed positions, as a sum over them."""
        distance = replayed.distance()
        self._note(distance.detach(), len(replayed.hidden))
        return self.alpha * distance

    def _note(self, distance: Tensor, positions: int) -> None:
        self.log_scalar("dark_loss", distance / positions)
        assert self.task is not None
        # A value that is not finite is logged, but left out of the mean over training.
        new = torch.stack([distance, torch.full_like(distance, positions)]) * distance.isfinite()
        new = new.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        old = self._totals.get(self.task.name)
        self._totals[self.task.name] = new if old is None else old.to(new.device) + new

    # ------------------------------------------------------------------ state

    @override
    def continual_state(self) -> dict[str, Any]:
        totals = {name: total.cpu() for name, total in self._totals.items()}
        mine = {"classes": self._dark.classes, "totals": totals}
        return super().continual_state() | mine | {"spoilt": dict(self._spoilt), "spoilt_so_far": self._dark.spoilt}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        super().load_continual_state(state)
        self._dark.classes, self._totals = state["classes"], dict(state["totals"])
        self._spoilt, self._dark.spoilt = dict(state.get("spoilt", {})), state.get("spoilt_so_far", 0)

    @override
    def report(self) -> dict[str, Any]:
        means = {name: float(total[0] / total[1]) for name, total in self._totals.items() if total[1] > 0}
        name = type(self).__name__
        return {
            "alpha": self.alpha,
            "top_k": self.top_k,
            "logit_bytes_per_position": bytes_of_position(self._dark.classes, self.top_k),
            "dark_loss": means,
            "positions_without_logits": dict(self._spoilt),
            **super().report(),
            "sentences": [
                f"{name}, {task}: replayed logits were {mean:.3g} from the stored ones (mean square), over training"
                for task, mean in means.items()
            ]
            + [
                f"{name}, {task}: the logits of {count} positions were NaN or infinite, and are not stored"
                for task, count in self._spoilt.items()
            ],
        }

    @override
    def advice(self, need: Need) -> str | None:
        return f"a {'larger' if need == 'keep' else 'smaller'} {type(self).__name__}(ratio=…, alpha=…)"


class DER(DERpp):
    """DER (Buzzega et al. 2020, NeurIPS, eq. 5): :class:`DERpp` without the labels of the replayed samples.

    Replayed samples are in the batch, and their share of the module's own loss is subtracted. The loss of the new
    samples remains, and at a replayed position the loss is ``alpha`` times the distance of its logits. This works only
    if the module's loss is the mean cross-entropy over all positions that bear loss, as in Hugging Face's models and
    ``F.cross_entropy``; this is checked before each task. The loss that the module logs still includes the replayed
    labels.

    Memory: as :class:`DERpp`. Compute per step: the head twice more for the replayed positions.

    Args:
        buffer_size: the budget, over all tasks, in `unit`.
        ratio: share of replayed tokens, as in ``Replay``.
        alpha: weight of the logits' distance. The paper's α is ``alpha · ratio / (1 − ratio)``.
        policy: the choice of the samples that are kept, as in ``Replay``.
        mode: ``replace`` or ``add``, as in ``Replay``.
        seed: seed for the choice of stored and of replayed samples.
        top_k: the number of logits that are stored per position.
        outputs: a function ``outputs(module, batch)`` that gives the logits. It is needed where no submodule returns an
            object with ``.logits``.
        unit: unit of the budget: ``samples`` or ``tokens``.
        draw: how often each sample is replayed, as in ``Replay``.
        fill: ``task_end`` or ``training``: the moment when samples are offered and their logits are computed.
        storage: ``disk`` or ``memory`` (RAM).
        folder: folder for the files; default: the run's folder.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import DER
        >>> method = DER(buffer_size=500, ratio=0.1, top_k=32)
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.report()["top_k"]
        32
    """

    @property
    @override
    def is_active(self) -> bool:
        return self.mixes  # labels are left out with every alpha

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().place(trainer, pl_module)
        difference = self._dark.difference_from_cross_entropy(trainer, pl_module)
        if difference is not None:
            raise MisconfigurationException(
                f"{type(self).__name__}: {difference}; the labels of replayed samples can be taken off the mean"
                f" cross-entropy of {type(pl_module).__name__}'s logits alone. Use DERpp, which leaves the labels in"
            )

    @override
    def _term(self, replayed: Replayed) -> Tensor:
        return super()._term(replayed) - replayed.cross_entropy()
