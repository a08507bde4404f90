"""A router that finds the task of a prompt: linear discriminant analysis of mean token embeddings.

It needs no forward pass and no gradient. A prompt is the mean of its tokens' input embeddings. A task is the mean of
its prompts, and all tasks share one covariance (streaming LDA: Hayes & Kanan 2020, CVPR Workshops, arXiv:1909.01520;
the distance and its use against unknown inputs: Lee et al. 2018, NeurIPS, arXiv:1807.03888, eq. 2)::

    d²(x, t) = (x − μ_t)ᵀ (Σ + λ I)⁻¹ (x − μ_t)        λ = shrinkage · mean of the diagonal of Σ
    Σ = 1 / (N − T) · Σ_t Σ_{x of t} (x − μ_t)(x − μ_t)ᵀ

The mean of n tokens varies about as a + b / n. The nearest task hardly depends on n, but its distance does: prompts of
8 tokens are six times as far from their own task as prompts of 64. So there are limits for each length, which decide on
"none of them" (:func:`prompt_beginnings`).

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
    return _means(embeddings, _counted(embeddings, mask, tokens))


def prompt_beginnings(embeddings: Tensor, mask: Tensor, tokens: int | None = 64) -> tuple[Tensor, Tensor]:
    """Mean of a beginning of each prompt: one token of it, or two, four, eight and so on, or all that count.

    They show how far from their task shorter prompts are. Each length is equally likely. The draw depends on the prompt
    alone, so it is the same in any order.

    Args:
        embeddings: as for :func:`prompt_means`.
        mask: as for :func:`prompt_means`.
        tokens: as for :func:`prompt_means`.

    Returns:
        The means, fp32 ``[batch, width]``, and how many tokens each is of, int64 ``[batch]``.

    Raises:
        ValueError: as :func:`prompt_means`.
    """
    counted = _counted(embeddings, mask, tokens)
    counts = counted.sum(1)
    powers = 2 ** torch.arange(63, device=counts.device)
    choices = (powers < counts[:, None]).sum(1) + 1  # powers of two below the count, and the count
    drawn = powers[row_keys(_means(embeddings, counted)) % choices]
    lengths = torch.minimum(drawn, counts)
    return _means(embeddings, counted & (counted.cumsum(1) <= lengths[:, None])), lengths


def _counted(embeddings: Tensor, mask: Tensor, tokens: int | None) -> Tensor:
    """The first tokens of each prompt, as a mask."""
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
    return chosen


def _means(embeddings: Tensor, chosen: Tensor) -> Tensor:
    kept = embeddings.float().masked_fill(~chosen[..., None], 0.0)  # what stands in padding may be NaN
    return kept.sum(1) / chosen.sum(1, keepdim=True)


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
        self._samples: list[Tensor] = []  # rows of a prompt, its beginning, and the beginning's length
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

    def update(self, features: Tensor, task: int, beginnings: tuple[Tensor, Tensor] | None = None) -> None:
        """Adds prompts of a task.

        Args:
            features: ``[prompts, width]``, from :func:`prompt_means`.
            task: index of their task, from 0.
            beginnings: of the same prompts, from :func:`prompt_beginnings`. Without them a task has one limit for
                prompts of all lengths.

        Raises:
            ValueError: if a shape does not fit, a number is not finite, or the index is negative.
        """
        if task < 0:
            raise ValueError(f"task={task}: expected an index from 0")
        starts, lengths = (features, torch.ones(len(features))) if beginnings is None else beginnings
        if starts.shape != features.shape or lengths.shape != features.shape[:1]:
            raise ValueError(
                f"beginnings of shapes {list(starts.shape)} and {list(lengths.shape)}: expected {list(features.shape)}"
                f" and [{len(features)}], one of each prompt"
            )
        rows, parts = self._project(features), self._project(starts)
        if not bool(rows.isfinite().all() and parts.isfinite().all()):
            raise ValueError("features: some of them are not finite")
        sample = torch.cat([rows, parts, lengths[:, None].cpu().double()], 1).float()
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
        for task in range(len(counts)):
            more = state["samples"].cpu()[state["sample_tasks"].cpu() == task]
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
        return torch.zeros(0, 2 * self.size + 1)

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
        part = self._white(sample[:, self.size : -1]) - mean
        # Without a prompt its mean moves away from it and its share leaves the covariance (Sherman & Morrison).
        part = part + whole / (count - 1)
        share = count / ((count - 1) * self._freedom())
        along, own = (part * whole).sum(1), whole.square().sum(1)
        outside = part.square().sum(1) + share * along.square() / (1 - share * own).clamp(min=1e-12)
        return DistanceLimit(outside, sample[:, -1], self.quantile)
