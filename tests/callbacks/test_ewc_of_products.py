"""EWC(space="product"): the Fisher of whole weights from what two factors see, and the penalty on their product."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from adapting import peft_model
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regularized import Steps, assert_each, assert_same, fit, plain_fit, weights
from toys import Classifier

from lightning_cl import EWC, TaskDataModule, TaskMatrix, fit_tasks

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["q_proj", "v_proj", "down_proj"]


class Sequences(torch.utils.data.Dataset):
    """Rows of nine tokens; the first ones bear no loss, another number in each row."""

    def __init__(self, seed, rows=6):
        self.ids = torch.randint(1, 300, (rows, 9), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        labels = self.ids[index].masked_fill(torch.arange(9) < index % 4, -100)
        return {"input_ids": self.ids[index], "attention_mask": torch.ones(9, dtype=torch.int64), "labels": labels}


class Adapted(L.LightningModule):
    """A small Llama with LoRA, whose factors are not zero; `extra`: one norm is trained, too."""

    def __init__(self, extra=False, lr=0.05, **lora):
        super().__init__()
        self.lm, self.lr = peft_model(target_modules=TARGETS, lora_dropout=0.1, **lora), lr
        generator = torch.Generator().manual_seed(1)
        for name, parameter in self.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05, generator=generator)
        if extra:
            self.lm.base_model.model.model.norm.weight.requires_grad_(True)

    def training_step(self, batch, batch_idx):
        return self.lm(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.lm(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Trained(Steps):
    """Of the parameters that train."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        trained = {n: p for n, p in pl_module.named_parameters() if p.requires_grad}
        self.before[-1].append({n: (p.detach().clone(), p.grad.clone()) for n, p in trained.items()})


def layers(module):
    return {f"{name}.weight": part for name, part in module.named_modules() if hasattr(part, "lora_A")}


def product_of(part):
    a, b = part.lora_A["default"].weight, part.lora_B["default"].weight
    return part.scaling["default"] * (b @ a)


def fisher_by_hand(module, data):
    """``Σ_seq (∂ Σ_t −log p / ∂W)²`` per position that bears loss, with gradients of the base's own weights."""
    module.eval()
    found = layers(module)
    whole = {name: part.get_base_layer().weight.requires_grad_(True) for name, part in found.items()}
    total, positions = {name: torch.zeros_like(w) for name, w in whole.items()}, 0
    for index in range(len(data)):
        row = data[index]
        logits, labels = module.lm(input_ids=row["input_ids"][None]).logits[0, :-1], row["labels"][1:]
        loss = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="sum")
        positions += int((labels != -100).sum())
        for name, gradient in zip(whole, torch.autograd.grad(loss, list(whole.values())), strict=True):
            total[name] += gradient**2
    for weight in whole.values():
        weight.requires_grad_(False)
    return {name: value / positions for name, value in total.items()}


@pytest.mark.parametrize("rslora", [False, True])
def test_the_fisher_is_that_of_whole_weights_of_single_sequences(tmp_path, rslora):
    data = Sequences(0)
    method = EWC(1.0, estimator="empirical", normalize=False, space="product")
    module = fit(tmp_path, [method], module=Adapted(extra=True, use_rslora=rslora), tasks={"a": data}, batch_size=3)
    assert_each(method.products, fisher_by_hand(module, data), 1e-3)
    (norm,) = method.importance  # the factors have no importance of their own, what else is trained has
    assert norm.endswith("norm.weight")
    apart = EWC(1.0, estimator="empirical", normalize=False)
    fit(tmp_path / "apart", [apart], module=Adapted(extra=True, use_rslora=rslora), tasks={"a": data}, batch_size=3)
    assert torch.equal(apart.importance[norm], method.importance[norm])


def test_steps_of_the_second_task_carry_the_gradient_of_the_penalty(tmp_path):
    """Against autograd of ``λ/2 Σ F (s B A − s B* A*)²``, through a real run."""
    steps, strength = Trained(), 30.0
    method = EWC(strength, estimator="empirical", space="product")

    class Kept(L.Callback):
        def on_train_end(self, trainer, pl_module):
            if not hasattr(self, "anchor"):
                self.anchor = {name: product_of(part).detach() for name, part in layers(pl_module).items()}

        def on_train_start(self, trainer, pl_module):
            self.products = {name: value.clone() for name, value in method.products.items()}

    kept = Kept()
    tasks = {"a": Sequences(0), "b": Sequences(1)}
    module = fit(tmp_path, [method, steps, kept], module=Adapted(), tasks=tasks, batch_size=3, max_epochs=1)
    assert len(steps.before[1]) == 2
    before, gradients = ({n: pair[i] for n, pair in steps.before[1][1].items()} for i in (0, 1))
    ended = weights(module)
    module.load_state_dict(before, strict=False)
    penalty = sum(
        (kept.products[name] * (product_of(part) - kept.anchor[name]).square()).sum()
        for name, part in layers(module).items()
    )
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    pulls = torch.autograd.grad(strength / 2 * penalty, list(trained.values()))
    assert all(pull.any() for pull in pulls)
    expected = {n: before[n] - 0.05 * (gradients[n] + pull) for n, pull in zip(trained, pulls, strict=True)}
    assert_same({n: ended[n] for n in expected}, expected, rtol=1e-4, atol=1e-6)


def test_factors_of_the_same_product_cost_nothing(tmp_path):
    method = EWC(7.0, estimator="empirical", normalize=False, space="product")
    module = fit(tmp_path, [method], module=Adapted(), tasks={"a": Sequences(0)}, batch_size=3)
    assert method.penalty(module) == 0.0
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in layers(module).values():
            turn = torch.randn(4, 4, generator=generator) + 2 * torch.eye(4)
            part.lora_A["default"].weight.copy_(turn @ part.lora_A["default"].weight)
            part.lora_B["default"].weight.copy_(part.lora_B["default"].weight @ turn.inverse())
        assert method.penalty(module) < 1e-8
        anchor = {name: product_of(part).detach() for name, part in layers(module).items()}
        for part in layers(module).values():
            part.lora_A["default"].weight.mul_(1.1)
    moved = sum(float((f * (0.1 * anchor[name]).square()).sum()) for name, f in method.products.items())
    assert method.penalty(module) == pytest.approx(7.0 / 2 * moved, rel=1e-3)


def test_auto_strength_and_what_is_kept(tmp_path):
    method = EWC(decay=0.5, samples=4, space="product", state_dtype="bfloat16", state_device="cpu")
    tasks = {"a": Sequences(0), "b": Sequences(1), "c": Sequences(2)}
    module = fit(tmp_path, [method], module=Adapted(lr=0.3), tasks=tasks, batch_size=3, max_epochs=3)
    entries = sum(product_of(part).numel() for part in layers(module).values())
    assert method.state_bytes() == 2 * entries + 4 * sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert method.report()["space"] == "product"
    assert method.factor > 0
    # Each task's has the mean 1: ((1 · ½ + 1) · ½ + 1) · ½.
    mean = sum(float(f.float().sum()) for f in method.products.values()) / entries
    assert mean == pytest.approx(0.875, rel=0.02)


def test_resumed_anywhere_equals_never_stopped(tmp_path):
    def run(root, ckpt_path=None):
        L.seed_everything(3, verbose=False)
        saver = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, filename="{step}")
        method = EWC(20.0, space="product")
        data = TaskDataModule({"a": Sequences(0), "b": Sequences(1)}, batch_size=2)
        module = Adapted()
        run = L.Trainer(
            callbacks=[method, TaskMatrix(), saver],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=root,
            max_epochs=1,
        )
        fit_tasks(run, module, data, ckpt_path)
        return weights(module), method.products

    whole, products = run(tmp_path / "whole")
    for number, path in enumerate(sorted((tmp_path / "whole").rglob("*.ckpt"))):
        again, others = run(tmp_path / f"again-{number}", path)
        assert all(torch.equal(whole[n], again[n]) for n in whole), path
        assert all(torch.equal(products[n], others[n]) for n in products), path


def test_what_it_cannot_do_is_said_before_training(tmp_path):
    for settings in ({"mode": "separate"}, {"apply": "proximal"}, {"estimator": "batched"}):
        (argument,) = settings
        with pytest.raises(ValueError, match=f"{argument}='{settings[argument]}': expected .*space='product'"):
            EWC(1.0, space="product", **settings)
    with pytest.raises(ValueError, match="space='factors'"):
        EWC(1.0, space="factors")
    with pytest.raises(MisconfigurationException, match="DoRA"):
        fit(tmp_path, [EWC(1.0, space="product")], module=Adapted(use_dora=True), tasks={"a": Sequences(0)})
    with pytest.raises(MisconfigurationException, match="no LoRA adapter"):
        plain_fit(tmp_path, [EWC(1.0, space="product")], Classifier(), 1)
