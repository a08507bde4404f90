"""Full tuning, or LoRA, outside of each weight's leading singular directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl.arguments import check_share
from lightning_cl.callbacks.architecture.linear_layers import (
    LINEAR,
    LinearLayer,
    LoraLayer,
    find_linear_layers,
    find_lora_layers,
)
from lightning_cl.callbacks.architecture.projected import Others, ProjectedWeights, on_one_rank_each
from lightning_cl.core.placement import full_cpu, placed_along
from lightning_cl.core.questions import Need
from lightning_cl.functional.subspace import (
    PrincipalSubspace,
    directions_of_share,
    principal_subspace,
    project_weights_,
    protected_square,
    remove_span_,
)
from lightning_cl.tasks import TaskPosition

Side = Literal["both", "in", "out"]


class _Bounded(NamedTuple):
    """A matrix that is kept in bounds, by the subspace of a layer."""

    layer: LinearLayer | LoraLayer
    side: Side

    @property
    def matrix(self) -> Tensor:
        if isinstance(self.layer, LinearLayer):
            return self.layer.matrix
        return (self.layer.down if self.side == "in" else self.layer.up).detach()


class SubspaceFreeze(ProjectedWeights):
    """Training outside of the leading singular directions of each weight (OSF, Nayak et al. 2025, arXiv:2504.07097).

    At a task's start each weight is taken apart, ``W = U S Vᵀ``. The leading ``share`` of its directions, ``U_h`` and
    ``V_h``, is protected, and after every step of the optimizer::

        W ← W_h + P_U W P_V,   W_h = U_h S_h V_hᵀ,   P_U = I − U_h U_hᵀ,   P_V = I − V_h V_hᵀ

    So ``W x`` stays as it is for ``x`` in the span of ``V_h``, and no output moves along ``U_h``. Outputs on earlier
    data are not the same, for their inputs have parts outside. It keeps a pretrained base at full tuning, without
    data and at no cost at inference; checkpoints and exports are plain weights. Published code projects gradients; with
    Adam about 5 % of each squared step then lies in protected space, and here less than 1e-6 in fp32. Weights in 16
    bits are protected up to their rounding.

    With LoRA the subspaces are those of the frozen weight, and both factors are kept out of them:
    ``A ← A P_V``, ``B ← P_U B`` (OPLoRA, 2025, arXiv:2510.13003). Quantised weights are refused.

    Memory: ``4 k (out + in)`` bytes per weight with ``k = share · min(out, in)``, in checkpoints inside a task too, and
    a copy of the weights at logging steps. Compute: ``8 · out · in · k`` operations per weight and step, as much as
    training on ``4 k / 3`` more tokens; a task begins with one decomposition per weight, minutes on a GPU for billions
    of parameters, hours on a CPU. With FSDP2 each process projects its rows, and the weights are gathered one at a time
    to be taken apart.

    Args:
        share: of each weight's directions that is protected, from 0 (bit for bit training without this callback) to 1
            (frozen). A list has one share for each task, as ``[0.3, 0.5, 0.7]``; the last holds for all further tasks.
        targets: ``linear``, all linear layers but a language model's head and weights that are shared; or a list of
            layers' names, as ``["q_proj", "v_proj"]``.
        others: all other parameters (embeddings, norms, biases, the head) are ``frozen`` or ``trained``. Frozen keeps
            more of the base; trained learns more of tasks that are new to it.
        every: project after so many steps only. The protected part is the same at the task's end, and has moved in
            between.

    Attributes:
        subspaces: layer to its protected subspace, while a task is trained.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import SubspaceFreeze
        >>> method = SubspaceFreeze(share=[0.3, 0.5], others="trained")
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.report()["share"]
        [0.3, 0.5]
    """

    def __init__(
        self,
        share: float | list[float] = 0.5,
        targets: str | Sequence[str] = LINEAR,
        others: Others = "frozen",
        every: int = 1,
    ) -> None:
        super().__init__(targets, others, every)
        if isinstance(share, (list, tuple)):
            if not share:
                raise ValueError(f"share={share!r}: expected at least one share, for the first task")
            self.share: float | list[float] = [check_share(f"share[{i}]", one) for i, one in enumerate(share)]
        else:
            self.share = check_share("share", share)
        self.subspaces: dict[str, PrincipalSubspace] = {}
        self._bounded: dict[str, _Bounded] = {}

    def share_of(self, index: int) -> float:
        """Returns the share of a task's weights that is protected."""
        return self.share[min(index, len(self.share) - 1)] if isinstance(self.share, list) else self.share

    # ------------------------------------------------------------------ layers

    def _find(self, pl_module: nn.Module) -> dict[str, LinearLayer] | dict[str, LoraLayer]:
        adapted = find_lora_layers(pl_module, self.targets)
        if adapted and isinstance(self.share, list) and len(set(self.share)) > 1:
            raise MisconfigurationException(
                f"{type(self).__name__}(share={self.share}): with LoRA the frozen weight is the same in all tasks;"
                " expected one share"
            )
        return adapted or find_linear_layers(pl_module, self.targets)

    @override
    def choose_trainable(self, pl_module: L.LightningModule, task: TaskPosition) -> None:
        layers = self._find(pl_module)
        for path, layer in layers.items():
            shape = _weight(layer).shape
            for share in self.share if isinstance(self.share, list) else [self.share]:
                try:
                    directions_of_share(share or 1.0, shape)
                except ValueError as error:
                    raise MisconfigurationException(
                        f"{type(self).__name__}: {path}: {error}; or leave the layer out of targets=[…]"
                    ) from error
        if self.others == "frozen":
            kept = [[x.weight] if isinstance(x, LinearLayer) else [x.down, x.up] for x in layers.values()]
            self.freeze_others(pl_module, [parameter for some in kept for parameter in some])

    # ------------------------------------------------------------------ a task

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        layers, share = self._find(pl_module), self.share_of(self.task.index)
        weights = {path: _weight(layer) for path, layer in layers.items()} if share > 0 else {}

        def decompose(path: str, weight: Tensor) -> PrincipalSubspace:
            return PrincipalSubspace(*(part.cpu() for part in principal_subspace(weight, share)))

        label = f"{type(self).__name__}: directions of {self.task}"
        self.subspaces = on_one_rank_each(trainer, weights, decompose, label)
        directions = sum(len(subspace.values) for subspace in self.subspaces.values())
        numbers = sum(weight.numel() for weight in weights.values())
        # 8 · out · in · k operations against 6 · out · in for each token.
        tokens = sum(weights[path].numel() * len(s.values) for path, s in self.subspaces.items()) * 4 / 3
        self.note(
            {
                "share": share,
                "layers": len(weights),
                "directions": directions,
                "of": sum(min(weight.shape) for weight in weights.values()),
                "bytes": self._bytes(),
                "tokens_per_step": tokens / max(numbers, 1) / self.every if not self._adapts(layers) else 0.0,
            }
        )
        if self._adapts(layers):
            # The random factor of a fresh adapter lies partly in protected space; its product is zero either way.
            self.place(trainer, pl_module)
            self._project()

    @staticmethod
    def _adapts(layers: Mapping[str, LinearLayer | LoraLayer]) -> bool:
        return any(isinstance(layer, LoraLayer) for layer in layers.values())

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        layers = self._find(pl_module)
        missing = sorted(self.subspaces.keys() - layers.keys())
        if missing:
            raise MisconfigurationException(
                f"{type(self).__name__}: it has the directions of {missing[0]!r} (and {len(missing) - 1} more), which"
                f" {type(pl_module).__name__} does not train; was the model changed since the checkpoint?"
            )
        self._bounded = {}
        for path, subspace in self.subspaces.items():
            layer = layers[path]
            rows, columns = (layer.matrix,) * 2 if isinstance(layer, LinearLayer) else (layer.up, layer.down)
            left, right = placed_along(subspace.left, rows, 0), placed_along(subspace.right, columns, 1)
            values = placed_along(subspace.values, columns, None)
            self.subspaces[path] = PrincipalSubspace(left, values, right)
            if isinstance(layer, LinearLayer):
                self._bounded[path] = _Bounded(layer, "both")
            else:
                self._bounded[f"{path}.A"], self._bounded[f"{path}.B"] = _Bounded(layer, "in"), _Bounded(layer, "out")

    @override
    def matrices(self) -> Mapping[str, Tensor]:
        return {name: bounded.matrix for name, bounded in self._bounded.items()}

    @override
    def project_(self, name: str, matrix: Tensor) -> None:
        bounded = self._bounded[name]
        subspace = self.subspaces[bounded.layer.path]
        if bounded.side == "both":
            project_weights_(matrix, subspace)
        elif bounded.side == "in":
            remove_span_(matrix, subspace.right)
        else:
            remove_span_(matrix.T, subspace.left)

    @override
    def protected(self, name: str, step: Tensor) -> Tensor:
        bounded = self._bounded[name]
        subspace = self.subspaces[bounded.layer.path]
        return protected_square(
            step,
            left=None if bounded.side == "in" else subspace.left,
            right=None if bounded.side == "out" else subspace.right,
        )

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.subspaces, self._bounded = {}, {}  # the next task has those of its own weights

    # ------------------------------------------------------------------ state and report

    @override
    def continual_state(self) -> dict[str, Any]:
        kept = {path: [full_cpu(part) for part in subspace] for path, subspace in self.subspaces.items()}
        return super().continual_state() | {"subspaces": kept}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        super().load_continual_state(state)
        self.subspaces = {path: PrincipalSubspace(*parts) for path, parts in state["subspaces"].items()}
        self._bounded = {}

    def _bytes(self) -> int:
        return sum(part.numel() * part.element_size() for subspace in self.subspaces.values() for part in subspace)

    @override
    def state_bytes(self) -> int:
        return self._bytes()

    @override
    def report(self) -> dict[str, Any]:
        name = type(self).__name__
        return {
            "share": self.share,
            "others": self.others,
            "every": self.every,
            "tasks": {task: dict(entry) for task, entry in self.history.items()},
            "sentences": [f"{name}, {task}: {_describe(entry)}" for task, entry in self.history.items()],
        }

    @override
    def advice(self, need: Need) -> str | None:
        shares = self.share if isinstance(self.share, list) else [self.share]
        if need == "begin" or set(shares) == {1.0 if need == "keep" else 0.0}:
            return None
        return f"a {'larger' if need == 'keep' else 'smaller'} {type(self).__name__}(share=…), {self.share} now"


def _weight(layer: LinearLayer | LoraLayer) -> Tensor:
    return layer.matrix if isinstance(layer, LinearLayer) else layer.base.matrix


def _describe(entry: Mapping[str, Any]) -> str:
    if not entry["layers"]:
        return "nothing was protected"
    text = (
        f"{entry['directions']:,} of {entry['of']:,} directions of {entry['layers']} layers were protected"
        f" ({entry['bytes'] / 2**20:,.1f} MB while it was trained)"
    )
    if entry["tokens_per_step"]:
        text += f", at the cost of {entry['tokens_per_step']:,.0f} more tokens in each step"
    measured = entry["protected_share"]
    return text if measured is None else f"{text}; at most {measured:.1e} of a squared step lay in protected space"
