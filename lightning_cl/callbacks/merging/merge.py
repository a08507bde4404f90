"""Merging of tasks: the model answers with one combination of what each task did to the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_integer, check_share, is_number
from lightning_cl.callbacks.merging.low_rank_pairs import Factors, merge_products, pairs_in
from lightning_cl.core.checks import refuse_sharded
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.placement import all_parameters, full_cpu, set_weight_, tensor_bytes, trainable_parameters
from lightning_cl.core.precision import reshard
from lightning_cl.core.questions import Need, Trait
from lightning_cl.functional.merge import METHODS, Method, accumulate, merge, task_vector

_RUNNING = ("mean", "arithmetic", "magmax")


class Merge(ContinualCallback):
    """Merging of task vectors into the model that answers, while training continues from what it left.

    ::

        θ_merged = θ_0 + scale · m(τ_1 … τ_T),   τ_t = θ_t − θ_0

    with ``m`` as in :mod:`lightning_cl.functional.merge`: task arithmetic (Ilharco et al. 2023), TIES (Yadav et al.
    2023), DARE (Yu et al. 2024), MagMax (Marczak et al. 2024), or the plain mean. Whatever asks the model between tasks
    and after them gets the merge of the tasks that have ended: columns of the matrix, evaluations, predictions, and the
    module that ``fit_tasks`` leaves (so also ``save_pretrained``). It is one ordinary model, and costs nothing at
    inference.

    With ``tasks="sequential"`` training is what it would be without this callback, bit for bit: each task starts where
    the one before ended. Boundary checkpoints hold these weights, and a further task starts from them. With
    ``tasks="independent"`` each task starts from ``θ_0``. On the models where both were tried, sequential tasks merge
    better, and the plain mean is as good as TIES and DARE.

    Low-rank adapters are merged by their products ``B A``, never factor by factor. ``mean`` and ``arithmetic`` are the
    best adapter of the same rank for the exact sum. The others combine the products entry by entry, one layer at a
    time, and take the best adapter of that rank for the result; it takes a singular value decomposition of ``[out,
    in]`` for each layer. Of a quantised model only adapters are trained, and so only they are merged. Buffers, as the
    running statistics of batch norms, are those of the last task.

    Memory, in that of the machine and in checkpoints: ``θ_0``, one fp32 copy of the trainable parameters for any number
    of tasks (``mean``, ``arithmetic``, ``magmax``), or one copy for each task (``ties``, ``dare``); of adapters always
    one for each task; and the merge itself. While the model is asked, one more copy on its device. Compute: some passes
    over all of them at each boundary. With FSDP2 each process keeps whole copies in its machine's memory, and gathers
    one parameter at a time.

    Args:
        method: ``mean``, ``ties``, ``dare``, ``magmax`` or ``arithmetic``, the sum.
        scale: the factor of the merged vector. For ``arithmetic``, values near 1 / T are right; 1 ruins models from a
            few tasks on.
        density: the share of entries of each tensor that ``ties`` keeps, or the probability to be kept of ``dare``.
        tasks: ``sequential`` or ``independent``.
        seed: of the draws of ``dare``.

    Attributes:
        start_weights: parameter name to ``θ_0``.
        merged: the tasks that are in the merge, in their order.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import Merge
        >>> method = Merge("magmax")
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.report()["merged"]
        []
    """

    def __init__(
        self,
        method: Method = "mean",
        scale: float = 1.0,
        density: float = 0.5,
        tasks: Literal["sequential", "independent"] = "sequential",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.method: Method = check_choice("method", method, METHODS)  # type: ignore[assignment]
        if not is_number(scale) or not math.isfinite(scale):
            raise ValueError(f"scale={scale!r}: expected a finite number, as 1.0")
        self.scale = float(scale)
        self.density = check_share("density", density)
        if self.density == 0.0:
            raise ValueError("density=0.0: expected a share above 0 and at most 1, as 0.5")
        self.tasks = check_choice("tasks", tasks, ("sequential", "independent"))
        self.seed = check_integer("seed", seed)
        if self.tasks == "independent":
            self.takes_away: Mapping[Trait, str] = _INDEPENDENT
        self.start_weights: dict[str, Tensor] = {}
        self.merged: list[str] = []
        self._total: dict[str, Tensor] | None = None  # the running merge, of methods that have one
        self._ends: list[dict[str, Tensor]] = []  # for each task what has no running merge: its θ_t
        self._training: dict[str, Tensor] = {}  # θ_T, while the module itself holds the merge
        self._result: dict[str, Tensor] | None = None  # the merge, when it was asked for
        self._moved: list[float] = []  # for each task ‖τ_t‖ / ‖θ_0‖
        self._module: int | None = None  # whose weights these are, where no checkpoint gave them

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_sharded(trainer, f"{type(self).__name__} sets whole weights, which it cannot with", rows_are_fine=True)

    # ------------------------------------------------------------------ the tasks

    @override
    @torch.no_grad()
    def start_from(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._module is not None and self._module != id(pl_module):
            raise MisconfigurationException(
                f"{type(self).__name__}: it has merged tasks of another module; give the Trainer a new one, or continue"
                " that run with ckpt_path"
            )
        self._module = id(pl_module)
        weights = self.start_weights if self.tasks == "independent" else self._training
        _set(pl_module, weights)
        self._training = {}

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = trainable_parameters(pl_module)
        if not self.start_weights:
            self.start_weights = {name: full_cpu(p) for name, p in now.items()}
            return
        shapes, known = ({n: t.shape for n, t in group.items()} for group in (now, self.start_weights))
        if shapes != known:
            name = sorted(n for n in shapes.keys() | known.keys() if shapes.get(n) != known.get(n))[0]
            raise MisconfigurationException(
                f"{type(self).__name__}: {name!r} is not what was trained in the first task (shape"
                f" {_shape(known, name)} then, {_shape(shapes, name)} in {self.task}); tasks can be merged only if all"
                " of them train the same parameters"
            )

    @override
    @torch.no_grad()
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        now = {name: full_cpu(p) for name, p in trainable_parameters(pl_module).items()}
        vectors = _Vectors(self.start_weights, now)
        length = math.sqrt(sum(float(vectors[name].square().sum()) for name in now))
        before = math.sqrt(sum(float(t.float().square().sum()) for t in self.start_weights.values()))
        self._moved.append(length / max(before, 1e-30))
        kept = set(now)
        if self.method in _RUNNING:
            in_pairs = {name for pair in pairs_in(now) for name in pair}
            self._total = accumulate(self._total, {n: vectors[n] for n in now if n not in in_pairs}, self.method)
            kept = in_pairs
        self._ends.append({name: now[name] for name in sorted(kept)})
        self.merged.append(self.task.name)
        self._result = None

    # ------------------------------------------------------------------ the merge

    def weights(self, pl_module: L.LightningModule) -> dict[str, Tensor]:
        """The merge of the tasks that have ended, by parameter name, on the CPU; empty before the first has.

        Args:
            pl_module: says on which device it is computed, one tensor at a time.
        """
        if self._result is None:
            self._result = dict(self._merge(all_parameters(pl_module))) if self.merged else {}
        return self._result

    @torch.no_grad()
    def _merge(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        pairs = pairs_in(self.start_weights)
        in_pairs = {name for pair in pairs for name in pair}
        for name, start in self.start_weights.items():
            if name in in_pairs:
                continue
            base = start.to(parameters[name].device)
            running = self._total is not None
            vectors = [self._total] if self._total is not None else self._vectors()
            tensors = [{name: vector[name].to(base.device)} for vector in vectors]
            scale = self.scale / len(self.merged) if running and self.method == "mean" else self.scale
            method: Method = "arithmetic" if running and self.method == "mean" else self.method
            yield name, merge({name: base}, tensors, method, scale, self.density, self.seed)[name].cpu()
        for pair in pairs:
            device = parameters[pair.down].device
            states = (self.start_weights, *self._ends)
            sets: list[Factors] = [(values[pair.down].to(device), values[pair.up].to(device)) for values in states]
            a, b = merge_products(sets, self.method, self.scale, self.density, self.seed, pair.down)
            yield pair.down, a.cpu()
            yield pair.up, b.cpu()

    def _vectors(self) -> list[Mapping[str, Tensor]]:
        return [_Vectors(self.start_weights, end) for end in self._ends]

    @override
    @contextmanager
    def deployed(self, trainer: L.Trainer, pl_module: L.LightningModule, task: str | None) -> Iterator[None]:
        merged = self.weights(pl_module)
        parameters = all_parameters(pl_module)
        before = {name: parameters[name].detach().clone() for name in merged}
        _set(pl_module, merged)
        try:
            yield
        finally:
            _set(pl_module, before)

    @override
    def on_sequence_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        reshard(pl_module)
        merged, parameters = self.weights(pl_module), all_parameters(pl_module)
        if not self._training:
            self._training = {name: full_cpu(parameters[name]) for name in merged}
        _set(pl_module, merged)

    # ------------------------------------------------------------------ state and report

    @override
    def continual_state(self) -> dict[str, Any]:
        return {
            "start": dict(self.start_weights),
            "total": None if self._total is None else dict(self._total),
            "ends": [dict(end) for end in self._ends],
            "training": dict(self._training),
            "merged": list(self.merged),
            "moved": list(self._moved),
        }

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.start_weights, self._module = dict(state["start"]), None
        self._total = None if state["total"] is None else dict(state["total"])
        self._ends = [dict(end) for end in state["ends"]]
        self._training = dict(state["training"])
        self.merged, self._moved, self._result = list(state["merged"]), list(state["moved"]), None

    @override
    def state_bytes(self) -> int:
        return tensor_bytes(self.start_weights, self._total or {}, *self._ends)

    @override
    def report(self) -> dict[str, Any]:
        name, sentences = type(self).__name__, []
        if self.merged:
            one = f"{'its' if len(self.merged) == 1 else 'their'} {self.method}"
            sentences.append(
                f"{name}: the model answers with {', '.join(self.merged)} merged ({one}, scale {self.scale:g}); its"
                f" state takes {self.state_bytes() / 1e6:.3g} MB"
            )
        sentences += [
            f"{name}, {task}: the weights are {moved:.2%} of their norm away from those before the first task"
            for task, moved in zip(self.merged, self._moved, strict=True)
        ]
        return {
            "method": self.method,
            "scale": self.scale,
            "density": self.density if self.method in ("ties", "dare") else None,
            "tasks": self.tasks,
            "merged": list(self.merged),
            "moved": list(self._moved),
            "sentences": sentences,
        }

    @override
    def advice(self, need: Need) -> str | None:
        if need == "begin" or (need == "keep" and self.scale == 0.0):
            return None
        return f"a {'smaller' if need == 'keep' else 'larger'} {type(self).__name__}(scale=…), {self.scale:g} now"


_INDEPENDENT: Mapping[Trait, str] = {
    "earlier samples": (
        "with tasks='independent' each task starts from the weights before the first one, so that earlier samples would"
        " be learnt anew in every task; use tasks='sequential'"
    ),
    "shared parameters": (
        "with tasks='independent' each task starts from the weights before the first one, and the penalty would pull it"
        " to where another task ended; use tasks='sequential'"
    ),
}


class _Vectors(Mapping[str, Tensor]):
    """A task vector whose tensors are computed when they are asked for."""

    def __init__(self, start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> None:
        self._start, self._end = start, end

    def __getitem__(self, name: str) -> Tensor:
        return task_vector(self._start, {name: self._end[name]})[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._end)

    def __len__(self) -> int:
        return len(self._end)


@torch.no_grad()
def _set(pl_module: L.LightningModule, weights: Mapping[str, Tensor]) -> None:
    parameters = all_parameters(pl_module) if weights else {}
    for name, value in weights.items():
        set_weight_(parameters[name], value)


def _shape(shapes: Mapping[str, torch.Size], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "none"
