"""Full tuning that leaves the outputs of linear layers for earlier inputs as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_cl.arguments import check_integer, check_positive
from lightning_cl.callbacks.architecture.input_bases import InputBases, samples_for
from lightning_cl.callbacks.architecture.linear_layers import (
    LINEAR,
    LinearLayer,
    find_linear_layers,
    find_lora_layers,
)
from lightning_cl.callbacks.architecture.projected import Others, ProjectedWeights
from lightning_cl.core.placement import full_cpu, placed_along, tensor_bytes
from lightning_cl.core.questions import EndCost, Need
from lightning_cl.data.text.text_tasks import TokenStream
from lightning_cl.functional.input_space import project_inputs_, protected_outputs
from lightning_cl.functional.subspace import protected_square
from lightning_cl.passes.general_data import check_general_data, general_samples
from lightning_cl.passes.task_samples import TaskSamples
from lightning_cl.tasks import TaskPosition

_PER_SAMPLE = 0.4  # a forward pass and the moments take so many training passes over the same samples


class InputFreeze(ProjectedWeights):
    """Training outside of the directions that earlier inputs take (GPM, Saha, Garg & Roy 2021, ICLR, eqs. 8 and 9).

    At a task's end one forward pass over its own data measures the second moments ``C = Σ x xᵀ`` of each linear
    layer's inputs, and a basis ``M`` grows by leading eigenvectors until it holds the share ``threshold`` of
    ``tr(C)``. In later tasks, after every step of the optimizer::

        W ← W − (W M − O) Mᵀ,   O = W M at the task's start

    So ``W x`` is unchanged for every ``x`` in the span of ``M``, weight decay included. The paper projects gradients,
    which holds for plain SGD only. The share ``1 − threshold`` of the energy is not protected, and what is protected
    is taken from later tasks: the basis only grows.

    A pretrained model is protected in the first task only with ``general``: about 100 batches of text like what it
    shall not forget. As soon as something is protected, biases of the targets are frozen, and so are all other
    parameters unless ``others="trained"``. Padding is left out.

    Memory: ``4 k (in + out)`` bytes per layer with ``k`` protected directions, in checkpoints too (layers that read the
    same input share ``M``), ``4 in²`` while a task ends, and a copy of the weights at logging steps. Compute:
    ``4 · out · in · k`` operations per weight and step, as much as training on ``2 k / 3`` more tokens; per task a
    forward pass over `batches` batches and a decomposition, ``10 · in³`` operations per layer. With FSDP2 each process
    projects its rows.

    Args:
        threshold: the share of the inputs' energy to protect, above 0 and at most 1. 0.98 leaves later tasks little.
        batches: so many batches' worth of a task's samples are measured.
        general: data of the kind that the model knows already, protected from the first task on: whatever a task's data
            can be, as for :class:`~lightning_cl.GeneralReplay`.
        targets: ``linear``, all linear layers but a language model's head and weights that are shared; or a list of
            layers' names, as ``["q_proj", "v_proj"]``.
        others: all other parameters are ``frozen`` or ``trained``, while something is protected. What comes before a
            layer changes its inputs: trained norms and embeddings weaken the protection.
        normalize: scale each position's input to length 1 before it is counted. Language models have a few positions
            whose inputs are a hundred times longer; without this they are all that is protected.

    Attributes:
        inputs: the bases ``M``, and which layers read the same input.

    Raises:
        ValueError, TypeError, FileNotFoundError: if an argument is out of its range, or the data is not there.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import InputFreeze
        >>> method = InputFreeze(threshold=0.9, general=["Text like what the model shall not forget."])
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.report()["threshold"]
        0.9
    """

    ends_long = True

    def __init__(
        self,
        threshold: float = 0.9,
        batches: int = 100,
        general: Any = None,
        targets: str | Sequence[str] = LINEAR,
        others: Others = "frozen",
        normalize: bool = True,
    ) -> None:
        super().__init__(targets, others)
        self.threshold = check_positive("threshold", threshold, "a share above 0 and at most 1", most=1)
        self.batches = check_integer("batches", batches, 1)
        if general is not None:
            check_general_data(general, "general")
        if not isinstance(normalize, bool):
            raise ValueError(f"normalize={normalize!r}: expected True or False")
        self.general, self.normalize = general, normalize
        self.inputs = InputBases(normalize)
        self._outputs: dict[str, Tensor] = {}  # of this task's start, for the protected directions
        self._knows_general = False
        self._read: Any = None  # the general data's samples, until they are measured
        self._layers: dict[str, LinearLayer] = {}

    @property
    def bases(self) -> dict[str, Tensor]:
        """The first of the layers that read the same input, to its basis."""
        return self.inputs.bases

    # ------------------------------------------------------------------ layers

    def _find(self, pl_module: L.LightningModule) -> dict[str, LinearLayer]:
        if find_lora_layers(pl_module, LINEAR):
            raise MisconfigurationException(
                f"{type(self).__name__}: it keeps full weights in bounds, and {type(pl_module).__name__} trains LoRA"
                " adapters; use InfLoRA, or full tuning"
            )
        return find_linear_layers(pl_module, self.targets)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        fresh = stage == "fit" and self.run.driven and self.run.checkpoint_path is None
        if fresh and self.general is not None and not self._knows_general:
            # Here, and not when the first task starts: data that cannot be used is found before anything is evaluated.
            self._read = general_samples(self.run, self.general, type(self).__name__, "general")

    @override
    def choose_trainable(self, pl_module: L.LightningModule, task: TaskPosition) -> None:
        layers = self._find(pl_module)
        if task.index == 0 and self.general is None and not self.bases:
            return
        if self.others == "frozen":
            self.freeze_others(pl_module, [layer.weight for layer in layers.values()])
        else:
            biases = {id(layer.bias) for layer in layers.values() if layer.bias is not None}
            self.freeze_others(pl_module, [p for p in pl_module.parameters() if id(p) not in biases])

    # ------------------------------------------------------------------ a task starts

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._layers = self._find(pl_module)
        if self.general is not None and not self._knows_general:
            self._grow(trainer, pl_module, self._general_samples(trainer), "general data")
            self._knows_general = True
        self._outputs = {}
        self._place_bases()
        for path, layer in self._layers.items():
            basis = self.inputs.of(path)
            if basis is not None and basis.shape[1]:
                outputs = protected_outputs(layer.matrix, placed_along(basis, layer.matrix, 1))
                self._outputs[path] = placed_along(outputs, layer.matrix, 0)
        self.note(
            {
                "layers": len(self._outputs),
                "directions": sum(outputs.shape[1] for outputs in self._outputs.values()),
                "of": sum(layer.matrix.shape[1] for layer in self._layers.values()),
                "bytes": self.state_bytes(),
            }
        )

    def _general_samples(self, trainer: L.Trainer) -> TaskSamples:
        name, task_loader = type(self).__name__, trainer.train_dataloader
        samples, self._read = self._read, None
        if samples is None:
            samples = general_samples(self.run, self.general, name, "general")
        size = getattr(task_loader, "batch_size", None) or 8
        if isinstance(samples, TokenStream):
            samples = list(islice(samples(0), self.batches * size))
        if not hasattr(samples, "__getitem__") or not hasattr(samples, "__len__"):
            raise MisconfigurationException(
                f"{name}(general=…): {type(samples).__name__} has no length and no index; give a map-style data set"
            )
        if len(samples) == 0:
            raise ValueError(f"{name}(general=…): there is nothing in it")
        loader: DataLoader[Any] = DataLoader(samples, size, collate_fn=getattr(task_loader, "collate_fn", None))
        return self._samples(trainer, loader, 0, "general data")

    def _samples(self, trainer: L.Trainer, loader: Any, seed: int, what: str) -> TaskSamples:
        return samples_for(trainer, loader, self.batches, seed, type(self).__name__, what)

    def _place_bases(self) -> None:
        self.inputs.place({path: layer.weight.device for path, layer in self._layers.items()})

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._layers = self._find(pl_module)
        missing = sorted(self._outputs.keys() - self._layers.keys())
        if missing:
            raise MisconfigurationException(
                f"{type(self).__name__}: it protects {missing[0]!r} (and {len(missing) - 1} more), which"
                f" {type(pl_module).__name__} does not train; was the model changed since the checkpoint?"
            )
        self._place_bases()
        for path, outputs in self._outputs.items():
            self._outputs[path] = placed_along(outputs, self._layers[path].matrix, 0)

    # ------------------------------------------------------------------ steps

    @override
    def matrices(self) -> Mapping[str, Tensor]:
        return {path: self._layers[path].matrix for path in self._outputs}

    @override
    def project_(self, name: str, matrix: Tensor) -> None:
        project_inputs_(matrix, self._basis(name, matrix), self._outputs[name])

    def _basis(self, name: str, matrix: Tensor) -> Tensor:
        basis = self.inputs.of(name)
        assert basis is not None
        return placed_along(basis, matrix, 1)

    @override
    def protected(self, name: str, step: Tensor) -> Tensor:
        return protected_square(step, right=self._basis(name, step))

    # ------------------------------------------------------------------ a task ends

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        self._layers = self._find(pl_module)
        samples = self._samples(trainer, trainer.train_dataloader, self.task.index, str(self.task))
        self._grow(trainer, pl_module, samples, str(self.task))
        self._outputs = {}
        self.history[self.task.name]["directions_after"] = sum(
            basis.shape[1] for path in self._layers if (basis := self.inputs.of(path)) is not None
        )

    @torch.no_grad()
    def _grow(self, trainer: L.Trainer, pl_module: L.LightningModule, samples: TaskSamples, what: str) -> None:
        """Adds directions of what the layers read; on all ranks the same."""
        parts = {path: layer.part for path, layer in self._layers.items()}
        widths = {path: layer.matrix.shape[1] for path, layer in self._layers.items()}
        moments = self.inputs.measure(trainer, pl_module, parts, widths, samples)
        self.inputs.grow(trainer, moments, self.threshold, f"{type(self).__name__}: directions of {what}")

    @override
    def end_cost(self, trainer: L.Trainer, loader: Any, task: TaskPosition) -> EndCost | None:
        samples = self._samples(trainer, loader, task.index, "")
        return EndCost("inputs", samples.count_samples(), samples.count_batches(), _PER_SAMPLE)

    # ------------------------------------------------------------------ state and report

    @override
    def continual_state(self) -> dict[str, Any]:
        return super().continual_state() | {
            **self.inputs.state(),
            "outputs": {path: full_cpu(outputs) for path, outputs in self._outputs.items()},
            "knows_general": self._knows_general,
        }

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        super().load_continual_state(state)
        self.inputs.load(state)
        self._outputs, self._knows_general = dict(state["outputs"]), state["knows_general"]

    @override
    def state_bytes(self) -> int:
        return self.inputs.bytes() + tensor_bytes(self._outputs)

    @override
    def report(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "batches": self.batches,
            "others": self.others,
            "tasks": {task: dict(entry) for task, entry in self.history.items()},
            "sentences": [f"{type(self).__name__}, {task}: {_describe(e)}" for task, e in self.history.items()],
        }

    @override
    def advice(self, need: Need) -> str | None:
        name = type(self).__name__
        if need == "begin":
            return None
        if need == "keep" and self.general is None:
            return f"{name}(general=…) with text of the kind that is to be kept"
        return f"a {'larger' if need == 'keep' else 'smaller'} {name}(threshold=…), {self.threshold:g} now"


def _describe(entry: Mapping[str, Any]) -> str:
    if entry["layers"]:
        text = (
            f"{entry['directions']:,} of {entry['of']:,} input directions were protected"
            f" ({entry['bytes'] / 2**20:,.1f} MB)"
        )
    else:
        text = "nothing was protected yet"
    if entry["protected_share"] is not None and entry["layers"]:
        text += f", and at most {entry['protected_share']:.1e} of a squared step lay in them"
    after = entry.get("directions_after")
    return text if after is None else f"{text}; from now on {after:,} are, {1 - after / entry['of']:.0%} are free"
