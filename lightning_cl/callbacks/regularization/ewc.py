"""Elastic Weight Consolidation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_choice
from lightning_cl.callbacks.regularization import product_space
from lightning_cl.callbacks.regularization.fisher_importance import FisherImportance
from lightning_cl.callbacks.regularization.product_space import Product, ProductSums, find_products
from lightning_cl.callbacks.regularization.quadratic import Apply, StateDevice, StateDtype, Strength
from lightning_cl.core.placement import all_parameters, full_cpu, tensor_bytes, trainable_parameters
from lightning_cl.functional import merge_quadratics, normalize_importance
from lightning_cl.passes.fisher_losses import Estimator
from lightning_cl.passes.logits import OutputsFunction
from lightning_cl.passes.sample_sums import SampleSums, squared_batch_gradients, sum_over_samples


class EWC(FisherImportance):
    """Elastic Weight Consolidation (Kirkpatrick et al. 2017, eq. 3; online: Schwarz et al. 2018, section 3.2).

    ::

        L(θ) + strength / 2 · Σ_i F_i (θ_i − θ*_i)²

    ``F`` is the diagonal Fisher information of earlier tasks (:mod:`lightning_cl.functional.ewc` has the definition).
    At the end of each task it is measured on that task's data, in evaluation mode, from gradients of single samples.
    For language models a sequence is a sample and ``F = Σ_seq (∇ Σ_t log p)² / number of loss tokens``. So with
    ``normalize=False`` the strength is the λ of a Laplace approximation for a loss that is a mean over tokens. For
    modules without token counts F is the mean over samples. ``empirical`` assumes that the loss of ``training_step`` is
    a mean over the tokens that bear loss (over samples, if there are no tokens), without further terms. ``sample`` and
    ``exact`` do not use the loss, and assume that the logits go into a softmax.

    With LoRA and ``space="product"`` the penalty is ``strength / 2 · Σ_ij F_ij (s B A − s B* A*)²_ij``. Here ``F`` is
    the Fisher of the whole weight that the adapter changes (:mod:`lightning_cl.functional.product_penalty`). The model
    depends on the factors through their product alone. A penalty on ``A`` and ``B`` apart also holds back changes that
    change nothing, and does not know that each factor's importance depends on the other. All other trainable parameters
    are held as usual.

    Memory: 8 bytes per trainable parameter, for any number of tasks in both modes. During the measurement one more fp32
    tensor per parameter, and the logits of a whole batch (``batch_size=1`` helps where they are large). Compute per
    step: one pass over parameters, importance and anchor. Per task: one forward and backward pass over `samples`
    samples, in batches (:class:`~lightning_cl.functional.SampleGradients`).

    Args:
        strength: the factor λ, ``auto``, or a ``KLBudget``. Good values on the quickstart (three tasks, AdamW at 2e-3,
            ``normalize=True``): 0.001 to 0.01 for ``apply="gradient"``, 1 to 10 for ``apply="proximal"``.
        estimator: source of the Fisher's labels. ``sample``: one draw per position from the model's own softmax.
            ``empirical``: the data. ``exact``: the expectation over all labels (small outputs). ``auto``: ``empirical``
            if the logits cannot be found; else ``exact`` for outputs that are not tokens and have at most 32 positions
            times classes (one backward pass each), and ``sample`` for all others.
        samples: number of samples of a task that the Fisher is measured on; all samples if the task has fewer.
        mode: ``online``: ``F ← decay · (F + F_new)``, and the anchor is the latest task's weights. ``separate``: one
            penalty per task; their sum is one quadratic with importance ``Σ F_t`` and anchor ``Σ F_t θ_t / Σ F_t``.
        decay: γ of the online mode; ``importance`` is what the penalty multiplies, γ included.
        normalize: divide each task's F by its mean before it is added. Strengths then have one order of magnitude for
            different models and losses, and all tasks have the same weight. The sum grows with the number of tasks.
            False keeps the units of the papers.
        outputs: a function ``outputs(module, batch)`` that gives the logits. It is needed where no submodule returns an
            object with ``.logits``.
        batch_size: number of samples measured at once; default: the training loader's. It changes memory and speed. It
            changes the result only with ``batched``.
        apply: ``gradient`` or ``proximal``, see
            :class:`~lightning_cl.callbacks.regularization.quadratic.QuadraticPenalty`.
        last_task: True measures the last task of a sequence too. False saves that pass. If tasks are added later, the
            pass is made when the first of them starts, on the last task's data, with the same result.
        share: with ``strength="auto"``, the norm of the penalty's gradient divided by that of the task's gradient. In
            ``proximal`` mode, its move of the weights divided by the optimizer's step, both per learning rate.
        state_dtype: type of the importance. ``bfloat16`` halves its memory, with a relative rounding error of 0.4 %.
        state_device: ``model``: importance and anchor are on the device of the parameters. ``cpu``: they are in
            RAM, and each step copies them to the parameters one tensor at a time.
        space: ``parameters``, or ``product`` for LoRA, with ``mode="online"`` and ``apply="gradient"``. The importance
            of a product takes 4 bytes (``bfloat16``: 2) for each entry of the adapted weight, which may be quantised,
            and 4 more during the measurement. Those 4 bytes are 28 GB for all linear layers of a Llama with 8 billion
            parameters, and 2.7 GB for its query and value projections alone.

    Attributes:
        products: with ``product``, the name of each adapted weight to its importance, ``[out, in]``.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import EWC
        >>> penalty = EWC(strength=0.01, samples=64, mode="separate")
        >>> trainer = L.Trainer(callbacks=[penalty], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> penalty.report()["mode"]
        'separate'
    """

    def __init__(
        self,
        strength: Strength = "auto",
        estimator: Estimator = "auto",
        samples: int = 512,
        mode: Literal["online", "separate"] = "online",
        decay: float = 1.0,
        normalize: bool = True,
        outputs: OutputsFunction | None = None,
        batch_size: int | None = None,
        apply: Apply = "gradient",
        last_task: bool = True,
        share: float = 0.1,
        state_dtype: StateDtype = "float32",
        state_device: StateDevice = "model",
        space: Literal["parameters", "product"] = "parameters",
    ) -> None:
        super().__init__(
            strength,
            estimator,
            samples,
            decay,
            normalize,
            outputs,
            batch_size,
            apply,
            last_task,
            share,
            state_dtype,
            state_device,
        )
        self.mode = check_choice("mode", mode, ("online", "separate"))
        self.space = check_choice("space", space, ("parameters", "product"))
        self.products: dict[str, Tensor] = {}
        self._pairs: list[Product] = []
        if space == "product":
            self._check_space()

    def _check_space(self) -> None:
        for argument, value, right, reason in (
            ("mode", self.mode, "online", "the anchors of several tasks are no product of the same rank"),
            ("apply", self.apply, "gradient", "the proximal step of two factors has no closed form"),
        ):
            if value != right:
                raise ValueError(f"{argument}={value!r}: expected {right!r} with space='product'; {reason}")
        if self.estimator == "batched":
            raise ValueError("estimator='batched': expected another one with space='product', as 'auto'")

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.space == "product":
            find_products(pl_module)  # what cannot work is to be found before a task is trained
        super().on_task_start(trainer, pl_module)

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().place(trainer, pl_module)
        if self.space == "product":
            self._pairs = find_products(pl_module)
            parameters = all_parameters(pl_module)
            for pair in self._pairs:
                if pair.name in self.products and self.state_device != "cpu":
                    self.products[pair.name] = self.products[pair.name].to(parameters[pair.up].device)

    @override
    @torch.no_grad()
    def update_importance(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        fisher, estimator, left_out = self._fisher(trainer, pl_module)
        mean = normalize_importance(fisher) if self.normalize else None
        self.diagnose(
            fisher,
            "The loss has no gradient here: is it constant, or the fit perfect (estimator='empirical')?",
            estimator=estimator,
            normalized_by=mean,
            left_out=left_out,
        )
        if self.mode == "online":
            self._add_products({pair.name: fisher.pop(pair.name) for pair in self._pairs if pair.name in fisher})
            self.add_importance(fisher, self.decay)
            self.set_anchor(pl_module)
            return
        weights = {name: p.detach().float() for name, p in trainable_parameters(pl_module).items()}
        old_importance, old_anchor = (
            {name: t.float().to(weights[name].device) if name in weights else t for name, t in kept.items()}
            for kept in (self.importance, self.anchor)
        )
        importance, anchor, constant = merge_quadratics(old_importance, old_anchor, fisher, weights)
        self.importance = {name: self._kept(t, self.state_dtype) for name, t in importance.items()}
        self.anchor = {name: self._kept(t, t.dtype) for name, t in anchor.items()}
        self.constant += constant

    def _fisher(self, trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[dict[str, Tensor], str, int]:
        """Returns this task's Fisher diagonal, the estimator that was used, and the number of samples left out."""
        assert self.task is not None
        parameters = trainable_parameters(pl_module)
        samples = self.task_samples(trainer, f"{type(self).__name__}: Fisher of {self.task}")
        losses = self.losses(trainer, pl_module)
        if self.estimator == "batched":
            sums = squared_batch_gradients(trainer, pl_module, parameters, samples, losses)
        else:
            products = ProductSums(self._pairs, parameters) if self._pairs else None
            sums = sum_over_samples(trainer, pl_module, parameters, samples, losses, sink=products)
            if products is not None:
                self._take_products(trainer, sums, products)
        for value in sums.total.values():
            value.div_(max(sums.positions, 1))
        return self.without_non_finite(sums.total), "/".join(sorted(losses.used)), sums.left_out

    # ------------------------------------------------------------------ products of low-rank factors

    def _take_products(self, trainer: L.Trainer, sums: SampleSums, products: ProductSums) -> None:
        """Puts the importance of each product in the place of those of its factors, where it was measured."""
        apart = []
        for pair in self._pairs:
            total = trainer.strategy.reduce(products.total.pop(pair.name), reduce_op="sum")
            factors = {pair.down, pair.up}
            if factors & sums.loose or (not bool(total.any()) and any(bool(sums.total[f].any()) for f in factors)):
                apart.append(pair.name)
                continue
            for factor in factors:
                del sums.total[factor]
            sums.total[pair.name] = total
        if apart:
            rank_zero_warn(
                f"{type(self).__name__}(space='product'): {apart[0]} (and {len(apart) - 1} more) is used several times,"
                " or not by whole samples, so that the importance of its product cannot be measured; its factors are"
                " held apart"
            )

    def _add_products(self, new: dict[str, Tensor]) -> None:
        for name, tensor in new.items():
            old = self.products.get(name)
            total = tensor if old is None else tensor + old.to(tensor.device)
            self.products[name] = self._kept(total.mul_(self.decay), self.state_dtype)
        for name in self.products.keys() - new.keys():
            self.products[name].mul_(self.decay)

    def _apart(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those parameters that are held by themselves."""
        return {name: p for name, p in parameters.items() if name in self.importance}

    @override
    def add_gradients(self, parameters: Mapping[str, Tensor], strength: float, scale: float) -> None:
        if self.space == "parameters":
            super().add_gradients(parameters, strength, scale)
            return
        super().add_gradients(self._apart(parameters), strength, scale)
        product_space.add_gradients(self._pairs, parameters, self.anchor, self.products, strength, scale)

    @override
    def forces(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        if self.space == "parameters":
            yield from super().forces(parameters)
            return
        yield from super().forces(self._apart(parameters))
        for name, force in product_space.forces(self._pairs, parameters, self.anchor, self.products):
            yield name, force.new_zeros(()), force

    @override
    def other_value(self, parameters: Mapping[str, Tensor]) -> float:
        if self.space == "parameters":
            return 0.0
        return product_space.value(self._pairs, parameters, self.anchor, self.products)

    # ------------------------------------------------------------------ state and report

    @override
    def continual_state(self) -> dict[str, Any]:
        products = {"products": {name: full_cpu(t) for name, t in self.products.items()}} if self.products else {}
        return super().continual_state() | products

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        super().load_continual_state(state)
        self.products = {name: t.to(self.state_dtype) for name, t in state.get("products", {}).items()}

    @override
    def state_bytes(self) -> int:
        return super().state_bytes() + tensor_bytes(self.products)

    @override
    def report(self) -> dict[str, Any]:
        space = {"space": self.space} if self.space == "product" else {}
        return super().report() | {"mode": self.mode} | space
