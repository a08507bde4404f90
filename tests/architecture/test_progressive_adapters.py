"""Adapters with gates to earlier ones: the formula, what stays to the bit, folding, and resuming."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from adapting import IDS, VOCABULARY, base_model, logits, peft_model
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import AutoPeftModelForCausalLM
from toys import trainer
from transformers import AutoModelForCausalLM

from lightning_cl import CausalLM, ProgressiveAdapters, Task, TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.models.adapter_factors import whole_factors
from lightning_cl.models.adapter_gates import add_gates, gates_of
from lightning_cl.models.adapter_rows import adapters_per_row
from lightning_cl.models.adapters import (
    adapter_of,
    adapter_parameters,
    allocate_adapter,
    train_adapter,
    use_adapter,
)
from lightning_cl.sequence.evaluate import evaluate_tasks

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["first", "second task", "third"]


class SomebodysAdapter(L.LightningModule):
    """A third-party module with a PeftModel in it."""

    def __init__(self, dropout=0.0, **lora):
        super().__init__()
        self.inner = peft_model(lora_dropout=dropout, **lora)

    def training_step(self, batch, batch_idx):
        return self.inner(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.inner(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def rows(seed, count=8):
    start = torch.randint(VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(seed))
    ids = (start + torch.arange(8) * (2 * seed + 1)) % VOCABULARY
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def data(names=NAMES):
    return TaskDataModule([Task(n, rows(i), val=rows(i, 4)) for i, n in enumerate(names)], batch_size=2, seed=0)


class AtStart(L.Callback):
    """The logits at the start of each task, in evaluation mode."""

    def __init__(self):
        self.logits = []

    def on_train_start(self, trainer, pl_module):
        self.logits.append(logits(pl_module.inner))
        pl_module.train()


def run(root, module=None, names=NAMES, more=(), ckpt_path=None):
    L.seed_everything(5, verbose=False)
    module = SomebodysAdapter() if module is None else module
    callbacks = [ProgressiveAdapters(), TaskMatrix(), *more]
    fit_tasks(trainer(root, callbacks, max_epochs=1), module, data(names), ckpt_path)
    return module, callbacks


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    saver = ModelCheckpoint(every_n_train_steps=3, save_top_k=-1, filename="{step}")
    start = AtStart()
    module, callbacks = run(root, SomebodysAdapter(dropout=0.1), more=[start, saver])
    return root, module, callbacks


def test_a_task_starts_from_the_base_and_earlier_ones_stay_to_the_bit(trained):
    _, _, (method, matrix, start, _) = trained
    base = logits(base_model())
    assert all(torch.equal(found, base) for found in start.logits)
    for column in range(3):
        later = matrix.matrix[column + 1 :, column]
        assert (later == later[0]).all()
        assert later[0] < matrix.matrix[0, column]
    assert all(size > 0 for size in method.gate_size.values())
    assert list(method.gate_size) == NAMES[1:]


def test_the_number_of_parameters(trained):
    _, module, (method, *_) = trained
    layers = len(gates_of(module.inner, adapter_of(module, "third")))
    assert layers == 14  # 7 linear layers in each of two blocks
    assert method.parameters["second task"] == method.parameters["first"] + layers
    assert method.parameters["third"] == method.parameters["first"] + 2 * layers
    used = {n for n, p in module.named_parameters() if p.requires_grad}
    assert used == set(adapter_parameters(module, "third"))


def dense(module):
    """The base with ``ΔW_t = s B_t A_t + Σ g_i s B_i A_i`` in its weights, by hand, for the third task."""
    names = [adapter_of(module, task) for task in NAMES]
    model = base_model()
    weights = dict(model.named_modules())
    with torch.no_grad():
        for path, layer in module.inner.named_modules():
            if hasattr(layer, "lora_A") and names[2] in layer.lora_A:
                products = [layer.lora_B[n].weight @ layer.lora_A[n].weight * layer.scaling[n] for n in names]
                g = layer.task_gates[names[2]]
                weight = weights[path.removeprefix("base_model.model.")].weight
                weight += products[2] + g[0] * products[0] + g[1] * products[1]
    return model


def test_the_forward_pass_is_the_formula_and_folds_into_one_adapter(trained):
    _, module, _ = trained
    use_adapter(module, "third")
    expected, found = logits(dense(module)), logits(module.inner)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    moved = {n: g.clone() for n, g in gates_of(module.inner, adapter_of(module, "third")).items()}
    assert all(bool((g != 0).all()) for g in moved.values())
    for factors in whole_factors(module.inner, adapter_of(module, "third")):
        assert factors.first.shape[0] == 12  # three of rank 4
    use_adapter(module, "first")
    assert not torch.allclose(logits(module.inner), found, atol=1e-2)


def test_gradients_of_gates_agree_with_finite_differences():
    model = peft_model(dtype=torch.float64)
    for i, task in enumerate("ab"):
        allocate_adapter(model, task, seed=i)
        add_gates(model, adapter_of(model, task))
    model.double()
    with torch.no_grad():
        for task in "ab":
            for p in adapter_parameters(model, task).values():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).double() * 0.2)
    train_adapter(model, "b")
    gate = next(p for n, p in model.named_parameters() if "task_gates" in n)

    def loss():
        return torch.nn.functional.cross_entropy(
            model(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
        )

    loss().backward()
    with torch.no_grad():
        gate += 1e-3  # norms compute in 32 bits: a smaller step would drown in their rounding
        above = loss()
        gate -= 2e-3
        below = loss()
    assert float(gate.grad) == pytest.approx(float((above - below) / 2e-3), rel=2e-3)


def test_resumed_anywhere_equals_never_stopped(tmp_path, trained):
    root, module, callbacks = trained
    whole = module.state_dict()
    paths = sorted(root.rglob("*.ckpt"))
    assert len(paths) >= 7
    for number, path in enumerate(paths):
        torch.load(path, weights_only=True)
        again, others = run(tmp_path / str(number), SomebodysAdapter(dropout=0.1), more=callbacks[3:], ckpt_path=path)
        state = again.state_dict()
        assert state.keys() == whole.keys()
        assert [n for n in whole if not torch.equal(whole[n], state[n])] == [], path
        assert torch.equal(callbacks[1].matrix, others[1].matrix), path


def test_every_boundary_can_be_evaluated_and_a_task_added(tmp_path, trained):
    root, module, (_, matrix, *_) = trained
    for row, name in enumerate(["0-first", "1-second_task", "2-third"], 1):
        (path,) = root.rglob(f"tasks/{name.split('-')[0]}-*.ckpt")
        found = evaluate_tasks(trainer(tmp_path, [ProgressiveAdapters()]), SomebodysAdapter(), data(), ckpt_path=path)
        assert [found[task]["val_loss"] for task in NAMES] == matrix.matrix[row].tolist(), name
    # An earlier boundary in a module that has more: the later adapters and gates go.
    (path,) = root.rglob("tasks/1-*.ckpt")
    found = evaluate_tasks(trainer(tmp_path, [ProgressiveAdapters()]), module_like(module), data(), ckpt_path=path)
    assert [found[task]["val_loss"] for task in NAMES] == matrix.matrix[2].tolist()
    run(tmp_path / "two", names=NAMES[:2], more=[ModelCheckpoint(save_top_k=0)])
    (last,) = (tmp_path / "two").rglob("tasks/1-*.ckpt")
    added, more = run(tmp_path / "three", ckpt_path=last)
    straight, callbacks = run(tmp_path / "straight")
    assert all(torch.equal(value, added.state_dict()[n]) for n, value in straight.state_dict().items())
    assert torch.equal(more[1].matrix[2:], callbacks[1].matrix[2:])


def module_like(module):
    """A copy: forward hooks and gates go with it."""
    copied = copy.deepcopy(module)
    use_adapter(copied, "third")
    use_adapter(module, "third")
    assert torch.equal(logits(copied.inner), logits(module.inner))
    return copied


def test_saved_and_merged_it_is_one_plain_adapter(tmp_path):
    torch.manual_seed(0)
    base_model().save_pretrained(tmp_path / "base")
    module = CausalLM(
        tmp_path / "base", lambda p: torch.optim.AdamW(p, lr=1e-2), schedule=None, lora={"r": 4}, dtype="float32"
    )
    run(tmp_path / "run", module, NAMES[:2])
    module.use_task("second task")
    expected = logits(module.lm)
    module.save_pretrained(tmp_path / "adapter", task="second task")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert again.peft_config["default"].r == 8
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    module.save_pretrained(tmp_path / "merged", task="second task", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    module.use_task("first")
    assert not torch.allclose(logits(module.lm), expected, atol=1e-3)


def test_what_does_not_fit_is_named(tmp_path, trained):
    with pytest.raises(ValueError, match="use_dora=True"):
        run(tmp_path, SomebodysAdapter(use_dora=True), NAMES[:2])
    with pytest.raises(ValueError, match="rank=0"):
        ProgressiveAdapters(rank=0)
    _, module, _ = trained
    with pytest.raises(ValueError, match="gates to earlier ones"):
        adapters_per_row(module.eval(), ["first", "second task", "third"]).__enter__()
