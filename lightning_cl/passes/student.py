"""The student: callbacks read the outputs that a module has just computed, so no forward pass is run twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from lightning_cl.passes.heads import SplitHead
from lightning_cl.passes.logits import LogitsReader, OutputsFunction
from lightning_cl.passes.passes import leaving_no_trace, training_loss

Head = Callable[[Tensor], Tensor]


class Call(NamedTuple):
    """One call of a part of the module, with a function that reads hidden states or logits from its result."""

    part: nn.Module
    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    read: Callable[[Any], Tensor]
    head: nn.Module | None = None
    bend: Callable[[Tensor], Tensor] | None = None
    classes: int | None = None

    @property
    def has_trained_inputs(self) -> bool:
        """True if a trained part, such as a projector or a soft prompt, made the inputs."""
        found: list[Tensor] = []
        apply_to_collection((self.args, self.kwargs), Tensor, found.append)
        return any(tensor.requires_grad for tensor in found)

    def head_with(self, tensors: Mapping[str, Tensor]) -> Head:
        """A function from hidden states to logits: the head with other tensors; the identity if there is no head."""

        def logits(hidden: Tensor) -> Tensor:
            if self.head is None or self.bend is None:
                return hidden
            there = hidden.to(next(iter(tensors.values())).device) if tensors else hidden
            made = functional_call(self.head, dict(tensors), (there,)) if tensors else self.head(there)
            return self.bend(made).to(hidden.device)

        return logits


class Student:
    """Reads the predictions of a training step from the part of the module that computes them.

    A user's function has priority; it runs the module once more. Next comes the decoder of a ``transformers`` causal
    language model, whose head is then applied at the needed positions only. Last comes a submodule whose output has
    ``.logits``.

    Args:
        trainer: the Trainer.
        pl_module: the module.
        outputs: a user's function, or None.
        owner: the callback's name, for messages.

    Attributes:
        shifted: True if position t predicts token t + 1.
    """

    def __init__(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: OutputsFunction | None, owner: str
    ) -> None:
        self._trainer, self._module, self._outputs, self._owner = trainer, pl_module, outputs, owner
        self._part: nn.Module | None = None
        self._split: Any = None
        self._last: tuple[tuple[Any, ...], dict[str, Any], Any] | None = None
        self._handle: RemovableHandle | None = None
        self._paused = False
        self.shifted = True

    def find(self, batch: Any) -> None:
        """Looks for the part to watch, with one forward pass over a batch.

        Raises:
            MisconfigurationException: if there is none.
        """
        reader = LogitsReader(self._trainer, self._module, self._outputs)
        if self._outputs is not None:
            reader(batch)
            self.shifted = reader.shifted
            return
        if self._find_decoder(batch):
            return
        logits = reader(batch)
        if logits is None or reader.source is None:
            raise MisconfigurationException(
                f"{self._owner}: nothing that {type(self._module).__name__} calls returns an object with `.logits`;"
                f" give {self._owner}(outputs=lambda module, batch: logits)"
            )
        self._part, self.shifted = reader.source, reader.shifted

    def _find_decoder(self, batch: Any) -> bool:
        calls: list[Any] = []
        for part in self._module.modules():
            if part is self._module or not (hasattr(part, "get_decoder") and hasattr(part, "get_output_embeddings")):
                continue
            split = SplitHead(part, quiet=True)
            if split.exact:
                self._part, self._split = split.decoder, split
                handle = split.decoder.register_forward_hook(lambda *call: calls.append(None))
                try:
                    training_loss(self._trainer, self._module, batch)
                finally:
                    handle.remove()
                if calls:
                    return True
            break  # parts of this model are not tried, since they are not complete models
        self._part = self._split = None
        return False

    def watch(self) -> None:
        """Begins to keep the latest call of the part."""
        if self._part is None or self._handle is not None:
            return

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self._paused and torch.is_grad_enabled():  # calls during validation are not kept
                self._last = (args, kwargs, output)

        self._handle = self._part.register_forward_hook(keep, with_kwargs=True)

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Stops keeping calls inside the block, for calls of the teacher."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def take(self, batch: Any) -> tuple[Tensor, Call]:
        """Returns the outputs of the last training step with their graph, and the call, to repeat with other weights.

        Raises:
            MisconfigurationException: if the part was not called.
        """
        if self._outputs is not None:
            function = self._outputs
            call = Call(self._module, lambda item: function(self._module, item), (batch,), {}, lambda logits: logits)
            # `training_step` has already updated running statistics with this batch, so they are restored.
            kept = {name: buffer.detach().clone() for name, buffer in self._module.named_buffers()}
            logits = function(self._module, batch)
            for name, buffer in self._module.named_buffers():
                buffer.data.copy_(kept[name])
            return logits, call
        if self._last is None or self._part is None:
            raise MisconfigurationException(
                f"{self._owner}: {type(self._module).__name__}.training_step did not call {type(self._part).__name__},"
                f" as it did before training; give {self._owner}(outputs=lambda module, batch: logits)"
            )
        (args, kwargs, output), self._last = self._last, None
        if self._split is not None:
            call = Call(
                self._part,
                self._part,
                args,
                kwargs,
                lambda result: result.last_hidden_state,
                self._split.head,
                self._split.bend,
                self._split.vocabulary,
            )
        else:
            call = Call(self._part, self._part, args, kwargs, _logits_of)
        return call.read(output), call

    def again(self, batch: Any) -> Any:
        """Returns the part's output in one more ``training_step``, needed if trained parts make its inputs."""
        outputs: list[Any] = []
        assert self._part is not None
        handle = self._part.register_forward_hook(lambda part, args, output: outputs.append(output))
        try:
            with self.unwatched(), leaving_no_trace(self._module):
                training_loss(self._trainer, self._module, batch)
        finally:
            handle.remove()
        return outputs[-1]

    def release(self) -> None:
        """Stops watching."""
        self._last = None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _logits_of(output: Any) -> Tensor:
    result: Tensor = output["logits"] if isinstance(output, Mapping) else output.logits
    return result
