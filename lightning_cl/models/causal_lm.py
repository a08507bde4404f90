"""A causal language model as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_cl.core.loops import steps_of_task
from lightning_cl.evaluation.model_card import Base, Kind, describe_base
from lightning_cl.functional.cross_entropy import head_cross_entropy
from lightning_cl.models.adapters import use_adapter
from lightning_cl.models.expansion import Structure, moved_names, structure_of
from lightning_cl.models.frozen_base import (
    changed_settings,
    checksum,
    describe_config,
    frozen_names,
    load_without_base,
)
from lightning_cl.models.loading import Precision, Quantization, add_lora, check_lora, load_pretrained
from lightning_cl.models.positions import check_positions
from lightning_cl.models.saving import check_card, save_adapters, save_whole, write_cards
from lightning_cl.models.schedule import WarmupDecay
from lightning_cl.models.scratch import from_config
from lightning_cl.models.step_mean import MeanOver, StepMean
from lightning_cl.models.visibility import check_causality, check_isolation
from lightning_cl.passes.generation import answers, prompt_tokens
from lightning_cl.passes.heads import SplitHead
from lightning_cl.random_state import untouched_random_state

ScheduleCallable = Callable[[torch.optim.Optimizer, int], LRScheduler]

BASE_KEY = "frozen_base"
"""Of the entry in a checkpoint that names the weights that were left out of it."""


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW as language models are fine-tuned: learning rate 5e-5, betas 0.9 and 0.95, weight decay 0.1."""
    return torch.optim.AdamW(parameters, lr=5e-5, betas=(0.9, 0.95), weight_decay=0.1)


class CausalLM(L.LightningModule):
    """A Hugging Face causal language model: full tuning or LoRA, 16, 8 or 4 bits, loss, generation, saving.

    Nothing in this library needs it: any LightningModule that returns a loss works. Batches are Hugging Face's
    (``input_ids``, ``attention_mask`` or ``position_ids``, ``labels``), as :class:`~lightning_cl.TaskDataModule` makes
    them. Logged are ``loss``, ``perplexity`` and ``token_accuracy``, with ``train_`` and ``val_`` in front; validation
    is a mean over the tokens that bear loss. The loss is computed at those alone, a chunk at a time: no
    ``[batch, length, vocabulary]`` tensor exists (where the architecture's head can be taken apart; a message says
    where not).

    A frozen base (under LoRA) stays out of checkpoints: its name and a checksum are in them, and another base is
    refused.

    Args:
        model: the name of a model on the hub, a folder, a ``.gguf`` file, ``sample:SmolLM2-135M-Instruct`` (of the
            extra ``demo``), or a configuration to train from scratch: ``{"model_type": "llama", "hidden_size": 160,
            …}``, whose vocabulary is the DataModule's tokenizer's.
        optimizer: makes the optimizer from parameter groups, anew for each task. Norms and biases get no weight decay.
        schedule: makes the schedule from the optimizer and the task's number of steps, anew for each task, stepped
            after each optimizer step; None keeps the learning rate constant. If it has a method ``begin_task``, that is
            told the task's index.
        lora: train a LoRA adapter, one for all tasks, and freeze the rest: arguments of peft's ``LoraConfig``, as in
            ``{"r": 8}``. Unless they are named, the targets are all linear layers but the head, and ``lora_alpha`` is
            twice the rank. It wants a higher learning rate than full tuning, about 2e-4.
        quantization: load the frozen base in 4 (``nf4``) or 8 bits (``int8``); needs `lora` and the extra ``4bit``.
        dtype: of the weights. Default: ``float32`` where they are trained, for small updates are lost in 16 bits;
            ``bfloat16`` around a quantised base; as they are stored for another frozen base.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2`` …; default: transformers' choice.
        gradient_checkpointing: keep only the layers' inputs for the backward pass and compute the rest again: a third
            more compute, a fraction of the memory.
        model_kwargs: further arguments of ``from_pretrained``, as ``{"revision": "main"}``.
        max_new_tokens: how many tokens ``predict_step`` generates at most.
        mean_over: the tokens over which the trained loss is a mean: those of an optimizer ``step``, with all its
            accumulated batches on all processes, or those of a ``batch``, so that accumulated batches with fewer tokens
            weigh as much as others. Logged losses are means over a batch.

    Attributes:
        lm: the ``transformers`` (under LoRA, ``peft``) model, once Lightning has called ``configure_model``.
        tokenizer: the DataModule's.

    Raises:
        TypeError, ValueError: if an argument is not one of the above.
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        optimizer: OptimizerCallable = adamw,
        schedule: ScheduleCallable | None = WarmupDecay,
        lora: dict[str, Any] | None = None,
        quantization: Quantization | None = None,
        dtype: Precision | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        max_new_tokens: int = 64,
        mean_over: MeanOver = "step",
    ) -> None:
        super().__init__()
        _check_model(model)
        for name, value, choices in (("quantization", quantization, Quantization), ("dtype", dtype, Precision)):
            if value is not None and value not in get_args(choices):
                raise ValueError(f"{name}={value!r}: expected one of {list(get_args(choices))}, or None")
        if mean_over not in get_args(MeanOver):
            raise ValueError(f"mean_over={mean_over!r}: expected one of {list(get_args(MeanOver))}")
        if lora is not None:
            check_lora(lora)
        if quantization is not None and (lora is None or isinstance(model, dict)):
            raise ValueError(
                f"quantization={quantization!r}: quantised weights cannot be trained; it needs a pretrained `model` and"
                " an adapter, as lora={'r': 8}"
            )
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: expected a positive integer")
        self.source = dict(model) if isinstance(model, dict) else str(model)
        self.lora = dict(lora) if lora is not None else None
        self.quantization, self.precision = quantization, dtype
        self.optimizer, self.schedule = optimizer, schedule
        self.model_kwargs = dict(model_kwargs or {})
        if attn_implementation is not None:
            self.model_kwargs["attn_implementation"] = attn_implementation
        self.gradient_checkpointing, self.max_new_tokens = gradient_checkpointing, max_new_tokens
        self._step_mean = StepMean() if mean_over == "step" else None
        self.lm: Any = None
        self.tokenizer: Any = None
        self._base: frozenset[str] = frozenset()  # names of weights that checkpoints leave out while they are frozen
        self._base_checksum: str | None = None
        self._base_config = ""
        self._base_structure: Structure | None = None  # the blocks when the names were taken; new ones move them
        self._wants_base_out = False
        self._loaded_as: torch.dtype | None = None
        self._as_loaded = False  # True until weights are trained, or come from a checkpoint
        self._scale = ""  # of the adapter that the model is built with
        self.run_report: dict[str, Any] | None = None  # of the run that has left these weights, for the model card
        self._head: SplitHead | None = None
        self._causality_checked = self._isolation_checked = False

    # ------------------------------------------------------------------ the model

    @override
    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is not None:
            self.tokenizer = tokenizer

    @override
    def configure_model(self) -> None:
        if self.lm is None:
            # When the model is built depends on who asks first; what training draws must not depend on that.
            with untouched_random_state():
                built = self._build()
            self._as_loaded = True
            self.lm = built.train()  # from_pretrained gives a model in evaluation mode: without dropout
            self._loaded_as = self.lm.dtype
            if self.lora is not None:
                self._describe_weights(frozen_names(self))
            elif self._wants_base_out:
                self.leave_base_out()
            # An adapter's scale is no parameter: with another one it is another model. Tasks may add adapters later.
            config = next(iter(self.lm.peft_config.values())) if hasattr(self.lm, "peft_config") else None
            if config is not None:
                self._scale = f"r={config.r}, lora_alpha={config.lora_alpha}, use_rslora={config.use_rslora}"
        if self.tokenizer is not None:
            rows = len(self.lm.get_input_embeddings().weight)
            if len(self.tokenizer) > rows:
                raise MisconfigurationException(
                    f"tokenizer: it has {len(self.tokenizer)} tokens, the model only {rows} embeddings; give the"
                    " tokenizer that belongs to the model"
                )
        data: Any = getattr(self._trainer, "datamodule", None)
        needed = getattr(data, "longest_row", None)
        if needed is not None:
            check_positions(self.lm, needed, data.max_length)

    def _build(self) -> Any:
        if isinstance(self.source, dict):
            model = from_config(self.source, self.tokenizer, self.precision, self.model_kwargs)
        else:
            model = load_pretrained(
                self.source, self._weights_dtype(), self.quantization, self._device_to_load_to(), self.model_kwargs
            )
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model if self.lora is None else add_lora(model, self.lora)

    def leave_base_out(self) -> None:
        """Leaves all weights that the model has now out of checkpoints, as long as they are frozen.

        A method asks for it that freezes the model and trains parts of its own, before it adds them. The name of the
        model and a checksum of its weights are in the checkpoints then. Nothing happens if the weights could not be
        loaded again from where they came from (made from a configuration, or trained since), and under LoRA, where it
        is so anyway.

        Compute: one pass over the weights.
        """
        self._wants_base_out = True  # if there is no model yet, as soon as it is built
        if self.lm is None or self._base or self.lora is not None:
            return
        if self._as_loaded and self.lm.dtype == self._loaded_as:
            self._describe_weights(frozenset(name for name, _ in self.named_parameters(remove_duplicate=False)))

    def _describe_weights(self, names: frozenset[str]) -> None:
        if isinstance(self.source, dict):
            return
        self._base, self._base_structure = names, structure_of(self.lm)
        # Now: later somebody may train a part of the base, or a Trainer's precision change its bits.
        self._base_checksum = checksum(self, names) if names else None
        self._base_config = describe_config(self.lm.config)

    def _base_now(self) -> frozenset[str]:
        """The base's names, which new blocks before them have moved."""
        return moved_names(self, self.lm, self._base, self._base_structure) if self._base else self._base

    def _weights_dtype(self) -> str | None:
        if self.precision is not None:
            return self.precision
        if self.quantization is not None:
            return "bfloat16"
        return "float32" if self.lora is None else None

    def _device_to_load_to(self) -> torch.device | None:
        attached = self.quantization is not None and self._trainer is not None
        return self.trainer.strategy.root_device if attached else None

    @override
    def forward(self, **batch: Any) -> Any:
        """The ``transformers`` model's output, with ``loss`` and ``logits``."""
        return self.lm(**batch | {"use_cache": False})

    def batch_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """``[batch, length, vocabulary]``: for callbacks that need them, since ``training_step`` makes none."""
        result: Tensor = self(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return result

    # ------------------------------------------------------------------ steps

    @override
    def on_train_start(self) -> None:
        self._as_loaded, self.run_report = False, None
        if self._step_mean is not None:
            self._step_mean.begin()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._step_mean is not None:
            self._step_mean.begin_batch(self.trainer, batch)

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(loss if self._step_mean is None else self._step_mean.weighted(loss), *args, **kwargs)

    @override
    def on_after_backward(self) -> None:
        if self._step_mean is not None:
            self._step_mean.end_batch(self.trainer, self.parameters())

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self._step(batch, "val")

    @override
    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self._step(batch, "test")

    def _step(self, batch: dict[str, Any], stage: str) -> Tensor:
        if not self._causality_checked:
            check_causality(self.lm)
            self._causality_checked = True
        if not self._isolation_checked and "attention_mask" not in batch and "position_ids" in batch:
            check_isolation(self.lm)
            self._isolation_checked = True
        loss, hits, tokens = self._loss(batch)
        self.log_dict(
            {f"{stage}_loss": loss.detach(), f"{stage}_token_accuracy": hits / max(tokens, 1)},
            batch_size=tokens,  # weighs a mean over batches by their tokens
            prog_bar=stage == "train",
            sync_dist=stage != "train",
        )
        if stage == "train":
            self.log("train_perplexity", loss.detach().exp(), batch_size=tokens)
        return loss

    def _loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
        """Mean loss, right predictions and number of the tokens that bear loss."""
        labels = batch["labels"][:, 1:]
        known = labels != -100
        if self._head is None:
            self._head = SplitHead(self.lm)
        if self._head.exact:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            hidden = self._head.hidden_states(inputs)[:, :-1][known]
            loss, hits = head_cross_entropy(hidden, labels[known], self._head.logits, self._head.vocabulary)
            return loss, hits.float(), len(hidden)
        output = self(**batch)
        with torch.no_grad():
            hits = (output.logits[:, :-1].argmax(-1) == labels)[known].sum()
        tokens = int(known.sum())
        loss = output.loss if tokens else output.logits.float().sum() * 0.0  # a mean over nothing is NaN
        return loss, hits.float(), tokens

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_perplexity("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_perplexity("test")

    def _log_perplexity(self, stage: str) -> None:
        # Of the mean loss, not the mean of the batches' perplexities; Lightning numbers several loaders.
        for name, loss in list(self.trainer.callback_metrics.items()):
            if name.split("/")[0] == f"{stage}_loss":
                self.log(name.replace("_loss", "_perplexity"), loss.exp())

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, str]]:
        """Answers to a batch of ``{"prompt": [ids], "reference": [ids]}`` (lists of token ids), as texts."""
        generated = answers(self.lm, self.tokenizer, batch["prompt"], self.max_new_tokens)
        return [
            {
                "prompt": self.tokenizer.decode(prompt),
                "generated": text,
                "reference": self.tokenizer.decode(reference, skip_special_tokens=True),
            }
            for prompt, text, reference in zip(batch["prompt"], generated, batch["reference"], strict=True)
        ]

    # ------------------------------------------------------------------ optimisation

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(_parameter_groups(self))
        if self.schedule is None:
            return optimizer
        steps = steps_of_task(self.trainer)
        if steps is None:
            raise MisconfigurationException(
                "CausalLM(schedule=…): the number of steps of this task is not known; set max_steps, or schedule=None"
            )
        schedule = self.schedule(optimizer, steps)
        if hasattr(schedule, "begin_task"):
            schedule.begin_task(getattr(getattr(self.trainer, "datamodule", None), "index", 0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ------------------------------------------------------------------ text

    def use_task(self, task: str | None) -> None:
        """Lets the model compute with the adapter of a task from now on; what is trainable stays as it is.

        Args:
            task: its name; None: the base without an adapter.

        Raises:
            ValueError: if the task has no adapter.
            RuntimeError: if there is no model yet.
        """
        if self.lm is None:
            raise RuntimeError("CausalLM.use_task: there is no model yet; train or validate first")
        use_adapter(self, task)

    def generate(self, prompt: str, max_new_tokens: int = 64, chat: bool = False) -> str:
        """Continues a text, greedily.

        Args:
            prompt: the text.
            max_new_tokens: how many tokens at most.
            chat: the prompt is what a user says, in the tokenizer's chat template.
        """
        if self.lm is None or self.tokenizer is None:
            raise RuntimeError("CausalLM.generate: there is no model or no tokenizer yet; train or validate first")
        ids = prompt_tokens(self.tokenizer, prompt, chat)
        return answers(self.lm, self.tokenizer, [ids], max_new_tokens)[0]

    # ------------------------------------------------------------------ files

    def save_pretrained(
        self,
        folder: str | Path,
        task: str | None = None,
        merge: bool = False,
        card: Mapping[str, Any] | str | Path | None = None,
    ) -> dict[Path, str | None]:
        """Saves model and tokenizer as a folder that transformers or peft loads; reads it again and compares.

        A model card, ``README.md``, is written too: base, tasks, matrix with definitions, fingerprints of the data.

        Args:
            folder: made if it is not there.
            task: with one adapter for each task: a task's name saves its adapter; ``all`` saves each in a folder of its
                own, named after the task; ``mean`` saves one adapter, the mean of all that were trained; ``sum`` their
                sum, for methods that add them up. None: the only adapter there is, or ``all``.
            merge: under LoRA: merge the adapter into its base, loaded for it in 16 or 32 bits and never into quantised
                weights; else the adapter alone is saved.
            card: the report of the run that the model card shows, or the path of its ``report.json``. None: that of
                ``fit_tasks``, if these are the weights that it left.

        Returns:
            The folders that were written, each with the task whose adapter it has; None: it is the only one.

        Raises:
            ValueError: if there is nothing to merge, no such adapter, several to merge and no `task`, or `card` is no
                report.
            RuntimeError: if there is no model yet, or what was written is not what is in memory.
        """
        if self.lm is None:
            raise RuntimeError("CausalLM.save_pretrained: there is no model yet; train or validate first")
        trained = sorted(self._base - frozen_names(self))
        if trained and self.lora is not None:
            raise ValueError(
                f"save_pretrained: {trained[:3]} of the frozen base were trained beside the adapter, and would be lost;"
                " freeze them, or save the whole model with module.lm.merge_and_unload().save_pretrained(folder)"
            )
        check_card(card)
        folders: dict[Path, str | None] = {Path(folder): None}
        if self.lora is None:
            if merge or task is not None:
                given, wanted = ("merge=True", "merge") if merge else (f"task={task!r}", "save")
                raise ValueError(f"save_pretrained({given}): there is no adapter to {wanted} (lora=None)")
            save_whole(self.lm, folder)
        elif isinstance(self.source, dict):
            raise ValueError(
                "save_pretrained: the adapter's base was made from a configuration and is saved nowhere; save the base"
                " first and give its folder as `model`"
            )
        else:
            settings = (self.precision, self.model_kwargs)
            folders = save_adapters(self.lm, folder, str(self.source), task, merge, *settings)
        if self.tokenizer is not None:
            for place in folders:
                self.tokenizer.save_pretrained(place)
        kind: Kind = "model" if self.lora is None else "merged" if merge else "adapter"
        report = card if card is not None else self.run_report
        write_cards(folders, self.described_base(), kind, report, self.settings_in_card())
        return folders

    def described_base(self) -> Base:
        """Returns the model before its first task, as cards name it: without a path of this machine."""
        return describe_base(self.source, self._base_checksum)

    def settings_in_card(self) -> dict[str, str | None]:
        """Returns further settings that a model card shows."""
        return {"LoRA": self._scale or None}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self._base:
            return
        # What became trainable since, a method's doing, is no longer the base.
        out = self._base_now() & frozen_names(self)
        if not out and self.lora is None:
            return  # all of it is trained, and in the checkpoint
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in out}
        checkpoint[BASE_KEY] = {
            "model": str(self.source),
            **self._describe_base(),
            "left_out": sorted(out),
            "checksum": self._base_checksum,
            "config": self._base_config,
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        base = checkpoint.get(BASE_KEY)
        if base is None:
            return
        self.leave_base_out()
        ours = self._describe_base()
        theirs = {name: base[name] for name in ours}
        if base["checksum"] != self._base_checksum or theirs != ours:
            same = theirs == ours and base["model"] == str(self.source)
            difference = "its weights have changed" if same else f"this run has {str(self.source)!r} ({ours})"
            raise MisconfigurationException(
                f"checkpoint: it was trained on the frozen base {base['model']!r} ({theirs}) and does not contain it;"
                f" {difference}. Give the same base, in the same precision, and the same lora"
            )
        changed = changed_settings(base["config"], self._base_config) if "config" in base else []
        if changed:
            raise MisconfigurationException(
                f"checkpoint: the configuration of its frozen base {base['model']!r} is another one now"
                f" ({'; '.join(changed)}): the same weights would be another model. Give the same base"
            )

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self._as_loaded, self.run_report = False, None
        if not self._base:
            return super().load_state_dict(state_dict, strict, assign)
        return load_without_base(self, state_dict, self._base_now(), strict, assign)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # bitsandbytes keeps 8-bit weights once more where only its own `to` would move them.
        for module in self.modules():
            if type(module).__name__ == "Linear8bitLt" and type(module).__module__.startswith("bitsandbytes"):
                state: Any = module.state
                state.CB, state.SCB = (None if kept is None else fn(kept) for kept in (state.CB, state.SCB))
        return self

    def _describe_base(self) -> dict[str, Any]:
        return {"quantization": self.quantization, "dtype": self._weights_dtype(), "lora": self._scale}


def _check_model(model: Any) -> None:
    if isinstance(model, dict):
        if "model_type" not in model:
            raise ValueError(
                f"model={model!r}: a configuration needs `model_type`, such as 'llama'; without one, give the name"
                " of a model on the hub or a folder"
            )
    elif not isinstance(model, (str, Path)):
        raise TypeError(f"model={model!r}: expected a name, a folder or a configuration")


def _parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Matrices with the optimizer's weight decay; norms and biases (vectors) without."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim >= 2]},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
