"""A router that finds the task of a prompt: linear discriminant analysis of mean token embeddings.

It needs no forward pass and no gradient. A prompt is the mean of its tokens' input embeddings. A task is the mean of
its prompts, and all tasks share one covariance (streaming LDA: Hayes & Kanan 2020, CVPR Workshops, arXiv:1909.01520;
the distance and its use against unknown inputs: Lee et al. 2018, NeurIPS, arXiv:1807.03888, eq. 2)::

    d²(x, t) = (x − μ_t)ᵀ (Σ + λ I)⁻¹ (x − μ_t)        λ = shrinkage · mean of the diagonal of Σ
    Σ = 1 / (N − T) · Σ_t Σ_{x of t} (x − μ_t)(x − μ_t)ᵀ

Sums are kept, in fp64. So prompts may come in any order and in several parts, the parts of several processes are added
up, and a new task never moves the mean of an earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

NONE_OF_THEM = -1
"""The task of a prompt that is like no task's prompts."""

WIDEST = 1024
"""Features with more dimensions than this are projected first."""

PROJECTED = 512
"""Dimensions after the projection."""


def prompt_means(embeddings: Tensor, mask: Tensor, tokens: int | None = 64) -> Tensor:
    """Mean of the embeddings of each prompt's first tokens; padding on either side does not count.

    Args:
        embeddings: token embeddings of shape ``[batch, length, width]``, in any floating-point type.
        mask: ``[batch, length]``, True or non-zero at the tokens of the prompt.
        tokens: how many tokens of a prompt count at most; None: all.

    Returns:
        fp32 ``[batch, width]``.

    Raises:
        ValueError: if the shapes do not fit, or a row has no token.

    Example:
        >>> import torch
        >>> from lightning_cl.functional.routing import prompt_means
        >>> prompt_means(torch.tensor([[[9.0], [1.0], [3.0]]]), torch.tensor([[0, 1, 1]]))
        tensor([[2.]])
    """
    if embeddings.ndim != 3 or mask.shape != embeddings.shape[:2]:
        raise ValueError(
            f"mask of shape {list(mask.shape)}, embeddings of shape {list(embeddings.shape)}: expected [batch, length]"
            " and [batch, length, width]"
        )
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens={tokens}: expected a positive integer, or None for all tokens")
    chosen = mask != 0
    if tokens is not None:
        chosen = chosen & (chosen.cumsum(1) <= tokens)
    counts = chosen.sum(1)
    if bool((counts == 0).any()):
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"mask: rows {empty[:3]} have no token; each row needs at least one")
    kept = embeddings.float().masked_fill(~chosen[..., None], 0.0)  # what stands in padding may be NaN
    return kept.sum(1) / counts[:, None]


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
    farther away than nearly all of its own prompts were. Each own prompt counts there as if it had not been fitted
    (leave one out, in closed form): else few prompts in many dimensions look nearer than new ones ever are. These
    limits follow the covariance when tasks are added, for each task keeps a sample of its prompts.

    State: 8·d² bytes for the covariance, and for each task 8·d for its mean and 4·d for each prompt of its sample
    (512 dimensions: 2 MB and 1 MB a task). Compute: d² for each prompt and pass; one Cholesky factorisation after a
    change.

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
        self._samples: list[Tensor] = []
        self._factor: Tensor | None = None  # Cholesky's, until something changes

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

    def update(self, features: Tensor, task: int) -> None:
        """Adds prompts of a task.

        Args:
            features: ``[prompts, width]``, from :func:`prompt_means`.
            task: index of their task, from 0.

        Raises:
            ValueError: if the shape does not fit, a number is not finite, or the index is negative.
        """
        if task < 0:
            raise ValueError(f"task={task}: expected an index from 0")
        rows = self._project(features)
        if not bool(rows.isfinite().all()):
            raise ValueError("features: some of them are not finite")
        self._grow(task + 1)
        self._counts[task] += len(rows)
        self._sums[task] += rows.sum(0)
        self._moment += rows.T @ rows
        self._samples[task] = _smallest_keys(torch.cat([self._samples[task], rows.float()]), self.keep)
        self._factor = None

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
        for task in range(len(counts)):
            more = state["samples"].cpu()[state["sample_tasks"].cpu() == task]
            self._samples[task] = _smallest_keys(torch.cat([self._samples[task], more.float()]), self.keep)
        self._factor = None

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

    def limits(self) -> Tensor:
        """Distance within which `quantile` of each task's own prompts lie, each left out of the fit in turn.

        Returns:
            fp64 ``[tasks]``; infinite for a task of fewer than two prompts.
        """
        found = torch.full((self.tasks,), math.inf, dtype=torch.float64)
        for task, sample in enumerate(self._samples):
            count = int(self._counts[task])
            if count < 2:
                continue
            inside = self._distances(sample.double())[:, task]
            # Without x its mean moves away from it and its share leaves the covariance (Sherman & Morrison).
            share = count / ((count - 1) * self._freedom())
            outside = (count / (count - 1)) ** 2 * inside / (1 - share * inside).clamp(min=1e-12)
            found[task] = torch.quantile(outside, self.quantile)
        return found

    def route(self, features: Tensor, reject: bool = True) -> Tensor:
        """Index of the nearest task of each prompt.

        Args:
            features: ``[prompts, width]``.
            reject: prompts outside the limit of their nearest task get −1; else each prompt gets a task.

        Returns:
            int64 ``[prompts]`` on the CPU.

        Raises:
            ValueError: if there is no task yet, or the shape does not fit.
        """
        nearest = self.distances(features).min(1)
        if not reject:
            return nearest.indices
        outside = nearest.values > self.limits()[nearest.indices]
        return nearest.indices.masked_fill(outside, NONE_OF_THEM)

    # ------------------------------------------------------------------ state

    def state(self) -> dict[str, Tensor]:
        """The fitted sums and samples, as tensors; the arguments are not in it."""
        owners = [torch.full((len(sample),), task) for task, sample in enumerate(self._samples)]
        return {
            "counts": self._counts.clone(),
            "sums": self._sums.clone(),
            "moment": self._moment.clone(),
            "samples": torch.cat([*self._samples, torch.zeros(0, self.size)]),
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
        self._samples += [torch.zeros(0, self.size) for _ in range(more)]

    def _freedom(self) -> int:
        return max(1, int(self._counts.sum()) - int((self._counts > 0).sum()))

    def _distances(self, rows: Tensor) -> Tensor:
        if self._factor is None:
            self._factor = torch.linalg.cholesky(self.covariance())
        means = self._sums / self._counts.clamp(min=1)[:, None]
        found = rows.new_full((len(rows), self.tasks), math.inf)
        for task in (self._counts > 0).nonzero().flatten().tolist():
            white = torch.linalg.solve_triangular(self._factor, (rows - means[task]).T, upper=False)
            found[:, task] = white.square().sum(0)
        return found


def _smallest_keys(rows: Tensor, count: int) -> Tensor:
    """At most `count` of the rows, those with the smallest keys: an even draw that does not depend on their order."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator) | 1
    keys = (rows.contiguous().view(torch.int32).long() * factors).sum(1)  # wraps around
    keys = (keys ^ (keys >> 31)) * -7046029254386353131
    return rows[(keys ^ (keys >> 29)).argsort(stable=True)[:count]]
