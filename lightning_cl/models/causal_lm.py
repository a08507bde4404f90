"""A causal language model as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_cl.models.schedule import WarmupDecay
from lightning_cl.random_state import untouched_random_state

ScheduleCallable = Callable[[torch.optim.Optimizer, int], LRScheduler]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW as language models are fine-tuned: learning rate 5e-5, betas 0.9 and 0.95, weight decay 0.1."""
    return torch.optim.AdamW(parameters, lr=5e-5, betas=(0.9, 0.95), weight_decay=0.1)


class CausalLM(L.LightningModule):
    """A Hugging Face causal language model: loss, optimizer and schedule per task, text generation, saving.

    Nothing in this library needs it: any LightningModule that returns a loss works. Batches are Hugging Face's
    (``input_ids``, ``attention_mask``, ``labels``), as :class:`~lightning_cl.TaskDataModule` makes them from text.
    Logged are ``loss``, ``perplexity`` and ``token_accuracy``, with ``train_`` and ``val_`` in front; validation is a
    mean over tokens.

    Args:
        model: the name of a model on the hub, a folder, or a configuration to train from scratch:
            ``{"model_type": "llama", "hidden_size": 160, …}``, whose vocabulary is the DataModule's tokenizer's.
        optimizer: makes the optimizer from parameter groups, anew for each task. Norms and biases get no weight decay.
        schedule: makes the schedule from the optimizer and the task's number of steps, anew for each task, stepped
            after each optimizer step; None keeps the learning rate constant.

    Attributes:
        lm: the ``transformers`` model, once Lightning has called ``configure_model``.
        tokenizer: the DataModule's.

    Raises:
        TypeError: if `model` is neither a name nor a configuration.
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        optimizer: OptimizerCallable = adamw,
        schedule: ScheduleCallable | None = WarmupDecay,
    ) -> None:
        super().__init__()
        if isinstance(model, dict):
            if "model_type" not in model:
                raise ValueError(
                    f"model={model!r}: a configuration needs `model_type`, such as 'llama'; without one, give the name"
                    " of a model on the hub or a folder"
                )
        elif not isinstance(model, (str, Path)):
            raise TypeError(f"model={model!r}: expected a name, a folder or a configuration")
        self.source = dict(model) if isinstance(model, dict) else str(model)
        self.optimizer, self.schedule = optimizer, schedule
        self.lm: Any = None
        self.tokenizer: Any = None

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
                built = (
                    self._from_config(self.source) if isinstance(self.source, dict) else self._from_name(self.source)
                )
            self.lm = built.train()  # from_pretrained gives a model in evaluation mode: without dropout
        if self.tokenizer is not None:
            rows = self.lm.get_input_embeddings().num_embeddings
            if len(self.tokenizer) > rows:
                raise MisconfigurationException(
                    f"tokenizer: it has {len(self.tokenizer)} tokens, the model only {rows} embeddings; give the"
                    " tokenizer that belongs to the model"
                )

    def _from_config(self, source: dict[str, Any]) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        settings = dict(source)
        if self.tokenizer is not None:
            settings.setdefault("vocab_size", len(self.tokenizer))
            for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
                settings.setdefault(token, getattr(self.tokenizer, token))
        elif "vocab_size" not in settings:
            raise MisconfigurationException(
                "CausalLM(model={…}): a configuration without `vocab_size` takes it from the DataModule's tokenizer,"
                " and there is none"
            )
        from huggingface_hub.errors import StrictDataclassError

        if source["model_type"] not in CONFIG_MAPPING_NAMES:
            near = get_close_matches(str(source["model_type"]), CONFIG_MAPPING_NAMES, n=3) or ["llama", "qwen3", "gpt2"]
            raise ValueError(
                f"model.model_type={source['model_type']!r}: transformers knows no such architecture; did you mean"
                f" {' or '.join(map(repr, near))}?"
            )
        try:
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
        except (ValueError, TypeError, StrictDataclassError) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[-1].strip()
            raise ValueError(f"model={source!r}: {reason}") from error

    def _from_name(self, source: str) -> nn.Module:
        from transformers import AutoModelForCausalLM

        try:
            return AutoModelForCausalLM.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model={source!r}: no model folder of that name and none on the hub ({str(error).splitlines()[0]})"
            ) from error

    @override
    def forward(self, **batch: Tensor) -> Any:
        """The ``transformers`` model's output, with ``loss`` and ``logits``."""
        return self.lm(**batch, use_cache=False)

    # ------------------------------------------------------------------ steps

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "val")

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "test")

    def _step(self, batch: dict[str, Tensor], stage: str) -> Tensor:
        output = self(**batch)
        labels = batch["labels"][:, 1:]
        known = labels != -100
        tokens = int(known.sum())
        with torch.no_grad():
            hits = (output.logits[:, :-1].argmax(-1) == labels)[known]
            accuracy = hits.float().sum() / max(tokens, 1)
        loss = output.loss
        self.log_dict(
            {f"{stage}_loss": loss.detach(), f"{stage}_token_accuracy": accuracy},
            batch_size=max(tokens, 1),  # weighs a mean over batches by their tokens
            prog_bar=stage == "train",
            sync_dist=stage != "train",
        )
        if stage == "train":
            self.log("train_perplexity", loss.detach().exp(), batch_size=max(tokens, 1))
        return loss

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_perplexity("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_perplexity("test")

    def _log_perplexity(self, stage: str) -> None:
        # Of the mean loss, not the mean of the batches' perplexities.
        loss = self.trainer.callback_metrics.get(f"{stage}_loss")
        if loss is not None:
            self.log(f"{stage}_perplexity", loss.exp())

    # ------------------------------------------------------------------ optimisation

    @override
    def configure_optimizers(self) -> Any:
        from lightning_cl.loops import steps_of_task

        optimizer = self.optimizer(_parameter_groups(self))
        if self.schedule is None:
            return optimizer
        steps = steps_of_task(self.trainer)
        if steps is None:
            raise MisconfigurationException(
                "CausalLM(schedule=…): the number of steps of this task is not known; set max_steps, or schedule=None"
            )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule(optimizer, steps), "interval": "step"},
        }

    # ------------------------------------------------------------------ text and files

    @torch.no_grad()
    def generate(self, prompt: str, max_new_tokens: int = 64) -> str:
        """Continues a text, greedily.

        Args:
            prompt: the text.
            max_new_tokens: how many tokens at most.
        """
        if self.lm is None or self.tokenizer is None:
            raise RuntimeError("CausalLM.generate: there is no model or no tokenizer yet; train or validate first")
        modes = {module: module.training for module in self.lm.modules()}
        self.lm.eval()
        inputs = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(self.lm.device)
        ids = self.lm.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        for module, training in modes.items():
            module.training = training
        return self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves model and tokenizer as a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

        Args:
            folder: made if it is not there.
        """
        if self.lm is None:
            raise RuntimeError("CausalLM.save_pretrained: there is no model yet; train or validate first")
        self.lm.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def _parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Matrices with the optimizer's weight decay; norms and biases (vectors) without."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim >= 2]},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
