"""A router that finds the task of a prompt: linear discriminant analysis of mean token embeddings.

It needs no forward pass and no gradient. A prompt is the mean of its tokens' input embeddings. A task is the mean of
its prompts, and all tasks share one covariance (streaming LDA: Hayes & Kanan 2020, CVPR Workshops, arXiv:1909.01520;
the distance and its use against unknown inputs: Lee et al. 2018, NeurIPS, arXiv:1807.03888, eq. 2)::

    d²(x, t) = (x − μ_t)ᵀ (Σ + λ I)⁻¹ (x − μ_t)        λ = shrinkage · mean of the diagonal of Σ
    Σ = 1 / (N − T) · Σ_t Σ_{x of t} (x − μ_t)(x − μ_t)ᵀ

The mean of n tokens varies about as a + b / n. The nearest task hardly depends on n, but its distance does: prompts of
8 tokens are six times as far from their own task as prompts of 64. So there are limits for each length, which decide on
"none of them" (:func:`.prompt_beginnings`).

Sums are kept, in fp64. So prompts may come in any order and in several parts, the parts of several processes are added
up, and a new task never moves the mean of an earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_cl.functional.routing_limit import DistanceLimit, row_keys

NONE_OF_THEM = -1
"""The task of a prompt that is like no task's prompts."""

WIDEST = 1024
"""Features with more dimensions than this are projected first."""

PROJECTED = 512
"""Dimensions after the projection."""


def random_projection(width: int, size: int = PROJECTED, seed: int = 0) -> Tensor:
    """A seeded random matrix that nearly keeps distances: independent normal numbers of variance 1 / `size`.

    Args:
        width: dimensions before.
        size: dimensions after.
        seed: of a generator of its own; the global random state is not touched.

    Returns:
        fp64 ``[width, size]``, the same on every machine.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, size, generator=generator).double() / math.sqrt(size)


class TaskRouter:
    """Finds the task of a prompt among those it was fitted on, or says that it is none of them.

    Distances are squared Mahalanobis distances, without a unit. "None of them" means that even the nearest task is
    farther away than nearly all of its own prompts of that length were. Each own prompt counts there as if it had not
    been fitted (leave one out, in closed form): else few prompts in many dimensions look nearer than new ones ever are.
    These limits follow the covariance when tasks are added, for each task keeps a sample of its prompts and of their
    beginnings.

    State: 8·d² bytes for the covariance, and for each task 8·d for its mean and 8·d for each prompt of its sample
    (512 dimensions: 2 MB and 2 MB a task). Compute: d² for each prompt; after a change one Cholesky factorisation, and
    2·d² for each prompt of the samples.

    Args:
        width: dimensions of the features; above 1024 they are projected to 512 (:func:`random_projection`).
        shrinkage: what is added to the covariance's diagonal, as a share of its mean.
        quantile: share of a task's own prompts that lie within its limit.
        keep: how many prompts of a task are kept for its limit, drawn evenly and whatever their order.
        seed: of the projection.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_cl.functional.routing import TaskRouter
        >>> router = TaskRouter(width=2)
        >>> router.update(torch.tensor([[0.0, 0.1], [0.1, 0.0], [0.0, -0.1], [-0.1, 0.0]]), task=0)
        >>> router.update(torch.tensor([[5.0, 0.1], [5.1, 0.0], [5.0, -0.1], [4.9, 0.0]]), task=1)
        >>> router.route(torch.tensor([[0.02, 0.0], [4.95, 0.0], [50.0, 50.0]])).tolist()
        [0, 1, -1]
    """

    def __init__(
        self, width: int, shrinkage: float = 0.1, quantile: float = 0.99, keep: int = 512, seed: int = 0
    ) -> None:
        for name, number in (("width", width), ("keep", keep)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name}={number!r}: expected a positive integer")
        if not (math.isfinite(shrinkage) and shrinkage > 0):
            raise ValueError(f"shrinkage={shrinkage!r}: expected a positive, finite number")
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile={quantile!r}: expected a share in (0, 1]")
        self.width, self.shrinkage, self.quantile, self.keep, self.seed = width, shrinkage, quantile, keep, seed
        self.size = width if width <= WIDEST else PROJECTED
        self._projection = None if width <= WIDEST else random_projection(width, self.size, seed)
        self._counts = torch.zeros(0, dtype=torch.int64)
        self._sums = torch.zeros(0, self.size, dtype=torch.float64)
        self._moment = torch.zeros(self.size, self.size, dtype=torch.float64)  # Σ x xᵀ of all tasks together
        self._samples: list[Tensor] = []  # rows of a prompt, its beginning, and their lengths
        self._forget()

    def _forget(self) -> None:
        """Forgets what was computed from the sums, since they change."""
        self._factor: Tensor | None = None  # Cholesky's
        self._known: dict[int, DistanceLimit] = {}

    # ------------------------------------------------------------------ fitting

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return len(self._counts)

    @property
    def counts(self) -> Tensor:
        """Number of prompts of each task: int64 ``[tasks]``."""
        return self._counts.clone()

    @property
    def means(self) -> Tensor:
        """Mean of each task's features, after the projection: fp64 ``[tasks, size]``, NaN for a task without any."""
        return self._sums / self._counts[:, None]

    def update(
        self,
        features: Tensor,
        task: int,
        lengths: Tensor | None = None,
        beginnings: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Adds prompts of a task.

        Args:
            features: ``[prompts, width]``, from :func:`.prompt_means`.
            task: index of their task, from 0.
            lengths: how many tokens each is the mean of, ``[prompts]``; None: not known, so a task has one limit for
                prompts of all lengths.
            beginnings: of the same prompts, from :func:`.prompt_beginnings`, from which the limits of shorter prompts
                are learnt.

        Raises:
            ValueError: if a shape does not fit, a number is not finite, or the index is negative.
        """
        if task < 0:
            raise ValueError(f"task={task}: expected an index from 0")
        counts = torch.ones(len(features)) if lengths is None else lengths
        starts, shorter = (features, counts) if beginnings is None else beginnings
        shapes = [list(tensor.shape) for tensor in (counts, starts, shorter)]
        if shapes != [[len(features)], list(features.shape), [len(features)]]:
            raise ValueError(
                f"lengths of shape {shapes[0]}, beginnings of shapes {shapes[1]} and {shapes[2]}: expected one of each"
                f" of {len(features)} prompts"
            )
        rows, parts = self._project(features), self._project(starts)
        if not bool(rows.isfinite().all() and parts.isfinite().all()):
            raise ValueError("features: some of them are not finite")
        sample = torch.cat([rows, parts, counts[:, None].cpu(), shorter[:, None].cpu()], 1).float()
        self._grow(task + 1)
        self._counts[task] += len(rows)
        self._sums[task] += rows.sum(0)
        self._moment += rows.T @ rows
        self._samples[task] = self._draw(self._samples[task], sample)
        self._forget()

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Adds what another router of the same width and seed was fitted on, as another process's.

        Args:
            state: the other's :meth:`state`.

        Raises:
            ValueError: if the other has another number of dimensions.
        """
        counts, sums, moment = state["counts"].cpu(), state["sums"].cpu(), state["moment"].cpu()
        if moment.shape != self._moment.shape:
            raise ValueError(
                f"state: it has {moment.shape[-1]} dimensions, this router {self.size}: expected one of the same model"
            )
        self._grow(len(counts))
        self._counts[: len(counts)] += counts
        self._sums[: len(counts)] += sums.double()
        self._moment += moment.double()
        samples = state["samples"].cpu()
        if samples.shape[1] == self.size:  # of an earlier version: one limit for prompts of all lengths
            samples = torch.cat([samples.float(), samples.float(), torch.ones(len(samples), 2)], 1)
        for task in range(len(counts)):
            more = samples[state["sample_tasks"].cpu() == task]
            self._samples[task] = self._draw(self._samples[task], more.float())
        self._forget()

    # ------------------------------------------------------------------ routing

    def covariance(self) -> Tensor:
        """The pooled covariance within the tasks, with what is added to its diagonal: fp64 ``[size, size]``."""
        means = self._sums / self._counts.clamp(min=1)[:, None]
        scatter = self._moment - self._sums.T @ means
        pooled = (scatter + scatter.T) / (2 * self._freedom())
        mean = float(pooled.diagonal().mean())
        # Of single prompts, or of equal ones, nothing is known: plain distances are left.
        added = self.shrinkage * mean if mean > 1e-12 * float(self._moment.diagonal().mean()) else 1.0
        return pooled + added * torch.eye(self.size, dtype=torch.float64)

    def distances(self, features: Tensor) -> Tensor:
        """Squared Mahalanobis distance of each prompt to each task.

        Args:
            features: ``[prompts, width]``.

        Returns:
            fp64 ``[prompts, tasks]`` on the CPU, infinite for a task that has no prompts.

        Raises:
            ValueError: if there is no task yet, or the shape does not fit.
        """
        if not bool((self._counts > 0).any()):
            raise ValueError("TaskRouter: it was fitted on no prompt yet; call update(features, task) first")
        return self._distances(self._project(features))

    def limits(self, lengths: Tensor | None = None) -> Tensor:
        """Distance within which `quantile` of a task's prompts of a length lie, each left out of the fit in turn.

        Args:
            lengths: numbers of tokens, int64 ``[prompts]``; None: as long as the task's longest. A prompt longer than
                those has their limit.

        Returns:
            fp64 ``[prompts, tasks]``, or ``[tasks]`` without `lengths`; infinite for a task of fewer than two prompts.
        """
        asked = torch.tensor([math.inf]) if lengths is None else lengths.cpu()
        each, places = asked.double().unique(return_inverse=True)
        found = torch.full((len(each), self.tasks), math.inf, dtype=torch.float64)
        for task in (self._counts >= 2).nonzero().flatten().tolist():
            if task not in self._known:
                self._known[task] = self._limit(task)
            for row, length in enumerate(each.tolist()):
                found[row, task] = self._known[task].at(length)
        return found[0] if lengths is None else found[places]

    def route(self, features: Tensor, reject: bool = True, lengths: Tensor | None = None) -> Tensor:
        """Index of the nearest task of each prompt.

        Args:
            features: ``[prompts, width]``.
            reject: prompts outside the limit of their nearest task get −1; else each prompt gets a task.
            lengths: how many tokens each is the mean of, int64 ``[prompts]``, for :meth:`limits`.

        Returns:
            int64 ``[prompts]`` on the CPU.

        Raises:
            ValueError: if there is no task yet, or a shape does not fit.
        """
        if lengths is not None and lengths.shape != features.shape[:1]:
            raise ValueError(f"lengths of shape {list(lengths.shape)}: expected [{len(features)}], one of each prompt")
        nearest = self.distances(features).min(1)
        if not reject:
            return nearest.indices
        limits = self.limits(lengths).expand(len(features), self.tasks)
        outside = nearest.values > limits.gather(1, nearest.indices[:, None])[:, 0]
        return nearest.indices.masked_fill(outside, NONE_OF_THEM)

    # ------------------------------------------------------------------ state

    def state(self) -> dict[str, Tensor]:
        """The fitted sums and samples, as tensors; the arguments are not in it."""
        owners = [torch.full((len(sample),), task) for task, sample in enumerate(self._samples)]
        return {
            "counts": self._counts.clone(),
            "sums": self._sums.clone(),
            "moment": self._moment.clone(),
            "samples": torch.cat([*self._samples, self._nothing()]),
            "sample_tasks": torch.cat([*owners, torch.zeros(0, dtype=torch.int64)]),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over :meth:`state` of a router of the same width and seed; what was fitted before is forgotten.

        Raises:
            ValueError: if the other has another number of dimensions.
        """
        fresh = TaskRouter(self.width, self.shrinkage, self.quantile, self.keep, self.seed)
        fresh.merge(state)
        self.__dict__.update(fresh.__dict__)

    # ------------------------------------------------------------------ parts

    def _project(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[1] != self.width:
            raise ValueError(f"features of shape {list(features.shape)}: expected [prompts, {self.width}]")
        rows = features.detach().cpu().double()
        return rows if self._projection is None else rows @ self._projection

    def _grow(self, tasks: int) -> None:
        more = max(0, tasks - self.tasks)
        self._counts = torch.cat([self._counts, torch.zeros(more, dtype=torch.int64)])
        self._sums = torch.cat([self._sums, torch.zeros(more, self.size, dtype=torch.float64)])
        self._samples += [self._nothing() for _ in range(more)]

    def _nothing(self) -> Tensor:
        return torch.zeros(0, 2 * self.size + 2)

    def _draw(self, kept: Tensor, more: Tensor) -> Tensor:
        """At most `keep` of the rows, those with the smallest keys: an even draw that does not depend on the order."""
        rows = torch.cat([kept, more])
        return rows[row_keys(rows[:, : self.size]).argsort(stable=True)[: self.keep]]

    def _freedom(self) -> int:
        return max(1, int(self._counts.sum()) - int((self._counts > 0).sum()))

    def _white(self, rows: Tensor) -> Tensor:
        """Coordinates in which the distance is the plain one."""
        if self._factor is None:
            self._factor = torch.linalg.cholesky(self.covariance())
        white: Tensor = torch.linalg.solve_triangular(self._factor, rows.T, upper=False).T
        return white

    def _distances(self, rows: Tensor) -> Tensor:
        white, means = self._white(rows), self._white(self._sums / self._counts.clamp(min=1)[:, None])
        found = rows.new_full((len(rows), self.tasks), math.inf)
        for task in (self._counts > 0).nonzero().flatten().tolist():
            found[:, task] = (white - means[task]).square().sum(1)
        return found

    def _limit(self, task: int) -> DistanceLimit:
        count, sample = int(self._counts[task]), self._samples[task].double()
        mean = self._white(self._sums[task : task + 1] / count)
        whole = self._white(sample[:, : self.size]) - mean
        part = self._white(sample[:, self.size : -2]) - mean
        # Without a prompt its mean moves away from it and its share leaves the covariance (Sherman & Morrison).
        share = count / ((count - 1) * self._freedom())
        left = (1 - share * whole.square().sum(1)).clamp(min=1e-12)
        outside = []
        for rows in (whole, part):
            moved = rows + whole / (count - 1)
            outside.append(moved.square().sum(1) + share * (moved * whole).sum(1).square() / left)
        return DistanceLimit(torch.cat(outside), sample[:, -2:].T.flatten(), self.quantile)
