"""Logits that are stored next to samples and compared with the model when these samples are replayed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.buffers import ReplayBuffer
from lightning_cl.buffers.disk.segment import RemovedError
from lightning_cl.data.mixing.contents import Kinds, Part
from lightning_cl.functional.cross_entropy import head_cross_entropy
from lightning_cl.functional.derpp import UNKNOWN, head_dark_loss, head_top_logits, index_type
from lightning_cl.passes.logits import OutputsFunction, aligned, loss_positions
from lightning_cl.passes.passes import forward_context, leaving_no_trace, to_device, training_loss
from lightning_cl.passes.student import Call, Student
from lightning_cl.passes.task_samples import TaskSamples, groups_of_like_length

VALUES, CLASSES = "top_logits", "top_classes"
_MOST_SAMPLES = 64  # in a batch of short samples


class Replayed(NamedTuple):
    """The replayed positions of a batch, and their stored logits.

    Attributes:
        hidden: ``[positions, width]``, the head's inputs with their graph; without a head, the logits.
        values: ``[positions, k + 1]``, the stored logits, the last for all other classes together; ``[positions, k]``
            if all classes of all positions were stored.
        indices: ``[positions, k]``, the classes of the first k.
        labels: ``[positions]``; None if no labels are found in the batch.
        call: the model's call from which the head is taken.
        classes: the number of logits of a position.
        bearing: the number of positions of the whole batch that bear loss.
    """

    hidden: Tensor
    values: Tensor
    indices: Tensor
    labels: Tensor | None
    call: Call
    classes: int
    bearing: int

    def distance(self) -> Tensor:
        """Returns the sum of :func:`~lightning_cl.functional.derpp.dark_loss` over the positions."""
        return head_dark_loss(self.hidden, self.values, self.indices, self.call.head_with({}), self.classes)

    def cross_entropy(self) -> Tensor:
        """Returns the sum of the labels' cross-entropy over the positions."""
        assert self.labels is not None
        mean, _ = head_cross_entropy(self.hidden, self.labels, self.call.head_with({}), self.classes)
        return mean * len(self.labels)


class DarkLogits:
    """Stored logits of a callback's samples.

    Args:
        owner: the callback's name, for messages.
        top_k: the number of logits that are stored per position.
        outputs: a user's function that gives logits, or None.

    Attributes:
        classes: the most classes that stored logits were chosen from.
        spoilt: the number of positions whose logits were not finite, so that nothing is stored for them.
    """

    def __init__(self, owner: str, top_k: int, outputs: OutputsFunction | None) -> None:
        self.owner, self.top_k, self.outputs = owner, top_k, outputs
        self.classes = self.spoilt = 0
        self._student: Student | None = None

    def place(self, trainer: L.Trainer, pl_module: L.LightningModule, buffer: ReplayBuffer) -> None:
        """Finds the source of the logits, and tries a stored sample, so that errors come before training.

        Raises:
            MisconfigurationException: if there are no logits, or they do not fit those that are stored.
        """
        self.release()
        self._student = Student(trainer, pl_module, self.outputs, self.owner)
        with leaving_no_trace(pl_module), torch.no_grad():
            batch = TaskSamples(trainer, 1, 0, f"{self.owner}: logits").one()
            if batch is not None:
                self._student.find(batch)
                self._compute(trainer, pl_module, batch)
                self._positions(batch, 1)
            # One sample of each task is tried: another method may have stored the tasks of an earlier run.
            for number in dict(zip(buffer.tasks, buffer.numbers, strict=True)).values():
                stored = _batch(trainer, [buffer.get(number)])
                self._compute(trainer, pl_module, stored)
                found = self.replayed(stored, [[Part(True, None, buffer, number)]], buffer)
                if found is None:
                    continue
                self.classes = max(self.classes, int(found.indices.max()) + 1)
                if found.classes < self.classes:
                    raise MisconfigurationException(
                        f"{self.owner}: stored logits are of {self.classes} classes, {type(pl_module).__name__} gives"
                        f" {found.classes} now: a head may grow between tasks, but not shrink"
                    )

    def watch(self) -> None:
        """Keeps the outputs of training steps for :meth:`replayed` from now on."""
        if self._student is not None:
            self._student.watch()

    def release(self) -> None:
        """Stops watching."""
        if self._student is not None:
            self._student.release()
            self._student = None

    # ------------------------------------------------------------------ storing

    def of_samples(
        self, trainer: L.Trainer, pl_module: L.LightningModule, samples: Sequence[Any]
    ) -> list[dict[str, Tensor]]:
        """Returns the present module's logits at the loss positions of samples, in evaluation mode.

        Args:
            trainer: inside ``fit``.
            pl_module: the module; it is left as it was.
            samples: the samples, as the data set gives them.

        Returns:
            for each sample ``top_logits`` (fp16 ``[positions, top_k + 1]``, the last for all other classes) and
            ``top_classes`` (``[positions, top_k]``); with at most `top_k` classes, both ``[positions, classes]``.
        """
        found: list[dict[str, Tensor]] = [{} for _ in samples]
        with leaving_no_trace(pl_module), torch.no_grad():
            for group in _groups(samples, trainer.train_dataloader):
                batch = _batch(trainer, [samples[index] for index in group])
                self._compute(trainer, pl_module, batch)
                with forward_context(trainer):
                    outputs, call, mask = self._positions(batch, len(group))
                    classes = call.classes or outputs.shape[-1]
                    hidden = outputs[:, : mask.shape[1]][mask.to(outputs.device)]
                    kept = head_top_logits(hidden, call.head_with({}), classes, self.top_k)
                self.classes = max(self.classes, classes)
                self.spoilt += int((kept[0] == UNKNOWN).all(-1).sum())
                counts = mask.sum(1).tolist()
                for index, values, indices in zip(group, *(side.split(counts) for side in kept), strict=True):
                    found[index] = {VALUES: values.clone(), CLASSES: indices.clone()}
        return found

    def _compute(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Runs one ``training_step``, if the logits come from there."""
        assert self._student is not None
        if self.outputs is None:
            self._student.watch()
            with torch.enable_grad():  # the student takes a call without a graph for a validation
                training_loss(trainer, pl_module, batch)

    def difference_from_cross_entropy(self, trainer: L.Trainer, pl_module: L.LightningModule) -> str | None:
        """Says why the module's loss is not the mean cross-entropy at the positions that bear loss; None if it is.

        The check uses a few samples of the current task, in evaluation mode.
        """
        with leaving_no_trace(pl_module), torch.no_grad():
            samples = TaskSamples(trainer, 8 * trainer.world_size, 0, f"{self.owner}: loss")
            probe = samples.probe(8)
            if probe is None:
                return None
            batch = probe[1]
            loss = training_loss(trainer, pl_module, batch)
            self._compute(trainer, pl_module, batch)
            with forward_context(trainer):
                outputs, call, mask = self._positions(batch, len(probe[0]))
                labels = _labels(batch, self._shifted, mask.shape)
                if loss is None or not mask.any():
                    return None
                if labels is None:
                    return (
                        "a batch has no labels where they are usual (`labels`, `label`, or the second of two tensors)"
                    )
                at = mask.to(outputs.device)
                hidden = outputs[:, : mask.shape[1]][at]
                own, _ = head_cross_entropy(hidden, labels[at], call.head_with({}), call.classes or outputs.shape[-1])
            coarse = outputs.dtype in (torch.float16, torch.bfloat16)
            if torch.isclose(loss.float(), own, rtol=2e-2 if coarse else 1e-3, atol=1e-4):
                return None
            return f"training_step returns {float(loss):.4g}, and the cross-entropy is {float(own):.4g}"

    # ------------------------------------------------------------------ comparing

    def replayed(self, batch: Any, kinds: Kinds, buffer: ReplayBuffer) -> Replayed | None:
        """Returns the outputs of the last training step for a buffer's samples; None if there are none.

        Args:
            batch: the step's batch.
            kinds: the kinds of its rows.
            buffer: the buffer whose samples are meant.

        Raises:
            MisconfigurationException: if a sample has no logits, or they belong to other positions.
        """
        if not any(part.replayed and part.owner is buffer for row in kinds for part in row):
            return None
        outputs, call, mask = self._positions(batch, len(kinds))
        rows, columns, values, indices = [], [], [], []
        for row, parts in enumerate(kinds):
            for part, columns_of_part in zip(parts, self._columns(mask[row], parts), strict=True):
                if not part.replayed or part.owner is not buffer:
                    continue
                try:
                    stored = buffer.extra(part.number)
                except RemovedError:
                    continue  # the sample was removed after this batch was fetched
                self._check(stored, len(columns_of_part))
                rows.append(torch.full_like(columns_of_part, row))
                columns.append(columns_of_part)
                values.append(stored[VALUES])
                indices.append(stored[CLASSES])
        if not rows or sum(map(len, rows)) == 0:
            return None
        at = tuple(torch.cat(axis).to(outputs.device) for axis in (rows, columns))
        labels = _labels(batch, self._shifted, mask.shape)
        kept, classes = _joined(values, indices)
        return Replayed(
            outputs[at],
            kept.to(outputs.device),
            classes.to(outputs.device),
            None if labels is None else labels[at],
            call,
            call.classes or outputs.shape[-1],
            int(mask.sum()),
        )

    @property
    def _shifted(self) -> bool:
        return self._student is None or self._student.shifted

    def _positions(self, batch: Any, rows: int) -> tuple[Tensor, Call, Tensor]:
        """Returns ``[rows, length, width]``, the call, and the loss mask ``[rows, positions]`` on the CPU."""
        assert self._student is not None
        outputs, call = self._student.take(batch)
        if len(outputs) != rows:
            raise MisconfigurationException(
                f"{self.owner}: a batch of {rows} samples gives logits of {len(outputs)}; give"
                f" {self.owner}(outputs=lambda module, batch: logits) with those of each sample, in their order"
            )
        outputs = aligned(batch, outputs, self._shifted)
        mask = loss_positions(batch, outputs, self._shifted)
        if mask is not None:
            return outputs, call, mask.cpu()
        outputs = outputs.reshape(len(outputs), -1, outputs.shape[-1])
        return outputs, call, torch.ones(outputs.shape[:2], dtype=torch.bool)

    def _columns(self, mask: Tensor, parts: Sequence[Part]) -> Iterator[Tensor]:
        """Yields the positions that bear loss, for each part of a row."""
        start = 0
        for part in parts:
            end = len(mask) if part.length is None else start + part.length
            # The last token of a part predicts nothing, or the first token of the next part.
            last = end - 1 if self._shifted and part.length is not None else end
            yield start + mask[start:last].nonzero()[:, 0]
            start = end

    def _check(self, stored: Mapping[str, Tensor], positions: int) -> None:
        if VALUES not in stored:
            raise MisconfigurationException(
                f"{self.owner}: its buffer holds a sample without logits, which {self.owner} stores next to each sample"
                " that it keeps: another method has filled this buffer. Give another folder, or use Replay with it"
            )
        if len(stored[VALUES]) != positions:
            raise MisconfigurationException(
                f"{self.owner}: a sample has logits at {len(stored[VALUES])} positions, and in a batch it bears loss at"
                f" {positions}: collate_fn must make the same of a sample every time, and not mask or cut it at random"
            )


def _batch(trainer: L.Trainer, samples: list[Any]) -> Any:
    loader: Any = trainer.train_dataloader
    return to_device(trainer, loader.collate_fn(samples))


def _groups(samples: Sequence[Any], loader: Any) -> Iterator[list[int]]:
    """Groups samples of similar length to batches, with at most as many tokens as a batch of training."""
    size = getattr(loader, "batch_size", None)
    rows = size if isinstance(size, int) else 8
    lengths = [_length(sample) for sample in samples]
    return groups_of_like_length(lengths, rows, getattr(loader, "block_length", None), max(rows, _MOST_SAMPLES))


def _length(sample: Any) -> int:
    """Returns a sample's number of tokens; 1 if it has none."""
    return max(len(sample["input_ids"]), 1) if isinstance(sample, Mapping) and "input_ids" in sample else 1


def _joined(values: Sequence[Tensor], indices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Joins samples along the positions; a smaller head's missing logits are unknown."""
    k = max(side.shape[-1] for side in indices)
    others = any(v.shape[-1] > i.shape[-1] for v, i in zip(values, indices, strict=True))
    filled = [_filled(v, i, k) for v, i in zip(values, indices, strict=True)]
    joined = torch.cat([v for v, _ in filled])
    return joined if others else joined[:, :k], torch.cat([i for _, i in filled])


def _filled(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns ``[positions, k + 1]`` values, the last for all other classes, and ``[positions, k]`` classes."""
    own = indices.shape[-1]
    of_classes, of_others = values[:, :own].float(), values[:, own:].float()
    pad = torch.nn.functional.pad
    of_classes = pad(of_classes, (0, k - own), value=UNKNOWN)
    of_others = pad(of_others, (0, 1 - of_others.shape[-1]), value=UNKNOWN)
    own_classes = indices.long()
    # The padding repeats an own class; another class would be missing among all others.
    return torch.cat([of_classes, of_others], -1), torch.cat([own_classes, own_classes[:, -1:].expand(-1, k - own)], -1)


def _labels(batch: Any, shifted: bool, shape: torch.Size) -> Tensor | None:
    """Returns the labels ``[rows, positions]``; None if they are not in a usual key or position."""
    if isinstance(batch, Mapping):
        labels = batch.get("labels", batch.get("label", batch.get("input_ids") if shifted else None))
    else:
        labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    if labels.ndim == 1:
        labels = labels[:, None]
    elif shifted and isinstance(batch, Mapping) and "input_ids" in batch:
        labels = labels[:, 1:]
    return labels if labels.shape == shape else None


def bytes_of_position(classes: int, top_k: int) -> int:
    """Returns the bytes of one position's logits."""
    return min(classes, top_k) * (2 + index_type(classes).itemsize) + (2 if top_k < classes else 0)
