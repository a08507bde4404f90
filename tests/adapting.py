"""Small Llamas with LoRA that the tests of adapters share."""

from __future__ import annotations

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from toys import TINY_LLAMA
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 300
SIZES = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": VOCABULARY}
IDS = torch.arange(3 * 9).view(3, 9) * 7 % VOCABULARY


def base_model(dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_LLAMA | SIZES | sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model.to(dtype)


def peft_model(dtype=torch.float32, sizes=None, **lora):
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    return get_peft_model(base_model(dtype, **(sizes or {})), LoraConfig(**config))


def move(module, tasks, size=0.2):
    """Adapters as training leaves them: no factor is zero."""
    from lightning_cl.models.adapters import adapter_parameters

    for i, task in enumerate(tasks):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for parameter in adapter_parameters(module, task).values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


@torch.no_grad()
def logits(model, ids=IDS):
    return model.eval()(input_ids=ids).logits


class SomebodysAdapter(L.LightningModule):
    """A third-party module with a PeftModel in it; it knows nothing of this library."""

    def __init__(self, dropout=0.1, lr=1e-2, **lora):
        super().__init__()
        self.inner = torch.nn.ModuleDict({"model": peft_model(lora_dropout=dropout, **lora)})
        self.lr = lr

    def training_step(self, batch, batch_idx):
        return self.inner["model"](**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.inner["model"](**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Sentences(torch.utils.data.Dataset):
    """Rows whose next token follows a rule of the task."""

    def __init__(self, seed, count=12, length=8):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(VOCABULARY, (count, 1), generator=generator)
        self.rows = (start + torch.arange(length) * (2 * seed + 1)) % VOCABULARY

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}

    def batch(self):
        return {key: torch.stack([self[i][key] for i in range(len(self))]) for key in self[0]}
