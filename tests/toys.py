"""Small modules and data that the tests share; none of them knows of this library."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Classifier(L.LightningModule):
    """Somebody's classifier: no language model, no base class of ours."""

    def __init__(self, dropout: float = 0.0, batch_norm: bool = False, lr: float = 0.05, optimizer=torch.optim.SGD):
        super().__init__()
        layers = [nn.Linear(8, 16), nn.BatchNorm1d(16) if batch_norm else nn.Identity(), nn.Dropout(dropout), nn.Tanh()]
        self.net = nn.Sequential(*layers, nn.Linear(16, 3))
        self.lr, self.make_optimizer = lr, optimizer

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.log("val_loss", nn.functional.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(-1) == y).float().mean())

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters(), lr=self.lr)


def classification(seed: int, samples: int = 48) -> TensorDataset:
    """Eight numbers, three classes by a random linear rule: another task for every seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 8, generator=generator)
    rule = torch.randn(8, 3, generator=generator)
    return TensorDataset(x, (x @ rule).argmax(1))


def trainer(root, callbacks=(), **settings):
    """A quiet Trainer on the CPU that writes below `root`."""
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
    }
    if any(isinstance(callback, L.pytorch.callbacks.Checkpoint) for callback in callbacks):
        defaults.pop("enable_checkpointing")
    return L.Trainer(callbacks=list(callbacks), **defaults | settings)


TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
