"""MIGU: a loop by hand, adapters and padding, what is not touched, resume."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from adapting import peft_model
from lightning.pytorch.callbacks import ModelCheckpoint
from regularized import adamw, assert_same, fit, momentum, seeded, weights
from toys import Classifier, classification, trainer

from lightning_cl import MIGU, Replay, TaskDataModule, TaskMatrix, fit_tasks

pytestmark = pytest.mark.filterwarnings("ignore")
TASKS = {"a": classification(1), "b": classification(2)}


def smallest(outputs, share):
    """Rows to mask, position by position and row by row."""
    sizes = torch.zeros(outputs.shape[-1], dtype=torch.float64)
    for position in outputs.detach().double().reshape(-1, outputs.shape[-1]).abs():
        sizes += position / position.sum()
    return sorted(range(len(sizes)), key=lambda i: float(sizes[i]))[: int(share * len(sizes) + 0.5)]


def test_two_tasks_follow_a_loop_by_hand_with_accumulation(tmp_path):
    """Nothing is masked in the first task; in the second, the outputs of all micro-batches of a step count."""
    module = fit(tmp_path, [MIGU(0.5)], module=seeded(optimizer=momentum), accumulate_grad_batches=2)
    hand = seeded(optimizer=momentum)
    data = TaskDataModule(TASKS, batch_size=8, seed=0)
    data.setup()
    for number, task in enumerate(data.tasks):
        optimizer = hand.configure_optimizers()
        loader = data.train_loader(task)
        for epoch in range(2):
            loader.set_epoch(epoch)
            batches = list(loader)
            for start in range(0, len(batches), 2):
                window, first, last = batches[start : start + 2], [], []
                optimizer.zero_grad()
                for x, y in window:
                    first.append(hand.net[0](x))
                    last.append(hand.net[4](torch.tanh(first[-1])))
                    (torch.nn.functional.cross_entropy(last[-1], y) / 2).backward()
                for layer, outputs in ((hand.net[0], first), (hand.net[4], last)):
                    for row in smallest(torch.cat(outputs), 0.5) if number else []:
                        layer.weight.grad[row] = layer.bias.grad[row] = 0.0
                optimizer.step()
    assert_same(weights(module), weights(hand), rtol=1e-4, atol=1e-6)


def test_nothing_masked_is_plain_training_and_so_is_the_first_task_bit_for_bit(tmp_path):
    plain = fit(tmp_path / "plain", [], module=seeded(optimizer=adamw))
    none = fit(tmp_path / "none", [MIGU(0.0)], module=seeded(optimizer=adamw))
    assert all(torch.equal(p, weights(none)[n]) for n, p in weights(plain).items())
    one = {"a": TASKS["a"]}
    plain, first = fit(tmp_path / "p", [], tasks=one), fit(tmp_path / "f", [MIGU(0.9)], tasks=one)
    assert all(torch.equal(p, weights(first)[n]) for n, p in weights(plain).items())


class Adapted(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.lm = peft_model()

    def training_step(self, batch, batch_idx):
        return self.lm(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Padded(torch.utils.data.Dataset):
    """Rows of nine tokens, of which the last four are padding."""

    def __init__(self, seed):
        self.ids = torch.randint(1, 300, (6, 9), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        mask = torch.arange(9) < 5
        labels = self.ids[index].masked_fill(~mask, -100)
        return {"input_ids": self.ids[index], "attention_mask": mask.long(), "labels": labels}


def test_rows_of_b_are_masked_by_the_adapted_output_without_padding(tmp_path):
    checked = []

    class Check(L.Callback):
        task = -1

        def on_train_start(self, trainer, pl_module):
            self.task += 1
            self.layer = pl_module.lm.base_model.model.model.layers[0].self_attn.q_proj
            self.hook = self.layer.register_forward_hook(lambda part, inputs, output: setattr(self, "seen", output))

        def on_train_end(self, trainer, pl_module):
            self.hook.remove()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            up, down = self.layer.lora_B["default"].weight.grad, self.layer.lora_A["default"].weight.grad
            if self.task == 1 and up is not None:
                rows = [row for row in range(len(up)) if not up[row].any()]
                checked.append(rows == sorted(smallest(self.seen[:, :5], 0.7)))
                assert down.abs().sum(1).min() > 0 or not self.layer.lora_B["default"].weight.any()

    fit(tmp_path, [MIGU(0.7), Check()], module=Adapted(), tasks={"a": Padded(0), "b": Padded(1)}, batch_size=3)
    assert checked
    assert all(checked)


def test_extra_passes_and_validation_do_not_count_and_hooks_go(tmp_path):
    """The module runs in evaluation mode and without a graph between forward pass and step; nothing changes."""

    class Looks(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            x = torch.full((64, 8), 9.0)
            with torch.no_grad():
                pl_module(x)
            pl_module.eval()
            pl_module(x)
            pl_module.train()

    one = fit(tmp_path / "one", [MIGU(0.5)])
    other = fit(tmp_path / "other", [Looks(), MIGU(0.5)])
    assert all(torch.equal(p, weights(other)[n]) for n, p in weights(one).items())
    assert not any(part._forward_hooks for part in one.modules())


def test_resumed_anywhere_equals_never_stopped(tmp_path):
    def run(root, ckpt_path=None):
        L.seed_everything(3, verbose=False)
        module = Classifier(dropout=0.2, optimizer=adamw)
        saver = ModelCheckpoint(every_n_train_steps=3, save_top_k=-1, filename="{step}")
        callbacks = [MIGU(0.5), Replay(20, 0.3), TaskMatrix(), saver]
        data = TaskDataModule({name: classification(i, 40) for i, name in enumerate("ab")}, batch_size=8)
        fit_tasks(trainer(root, callbacks, max_epochs=1, log_every_n_steps=1), module, data, ckpt_path)
        return weights(module), callbacks[0].report()["masked_share"]

    whole, shares = run(tmp_path / "whole")
    assert set(shares) == {"b"}
    assert 0.0 < shares["b"] < 1.0
    for number, path in enumerate(sorted((tmp_path / "whole").rglob("*.ckpt"))):
        again, others = run(tmp_path / f"again-{number}", path)
        assert all(torch.equal(whole[n], again[n]) for n in whole), path
        assert others == shares, path


@pytest.mark.parametrize("masked", [1.0, -0.1, None])
def test_arguments_out_of_their_range(masked):
    with pytest.raises(ValueError, match="masked="):
        MIGU(masked)
