"""Block expansion in runs: the base keeps its bits, tasks keep theirs, and checkpoints are enough to resume."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regularized import SomebodysLM
from toys import TINY_LLAMA, trainer
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_cl import EWC, L2SP, BlockExpansion, CausalLM, LwF, Replay, TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.models.expansion import inserted_blocks, new_parameters
from lightning_cl.sequence.evaluate import evaluate_tasks

pytestmark = pytest.mark.filterwarnings("ignore")
VOCABULARY = 11
SIZES = TINY_LLAMA | {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "initializer_range": 0.2}
IDS = torch.arange(14).view(2, 7) % VOCABULARY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES | {"attention_dropout": 0.1})).save_pretrained(path)
    return path


def rows(seed, count=8):
    ids = torch.randint(VOCABULARY, (count, 10), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def data(tasks="ab"):
    loaders = {name: torch.utils.data.DataLoader(rows(i), 2, shuffle=True) for i, name in enumerate(tasks)}
    return TaskDataModule(loaders)


def lm(source, **settings):
    return CausalLM(source, lambda p: torch.optim.AdamW(p, lr=0.02), schedule=None, **settings)


def fit(root, module, callbacks, ckpt_path=None, tasks="ab", every=3, **settings):
    L.seed_everything(7, verbose=False)
    saver = ModelCheckpoint(every_n_train_steps=every, save_top_k=-1, filename="{step}")
    fit_tasks(trainer(root, [*callbacks, saver], max_epochs=1, **settings), module, data(tasks), ckpt_path)
    return module


def base_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def entries(module):
    return {n: v.clone() for n, v in module.state_dict().items()}


def loss(model, seed):
    """The mean loss of a task's rows, by the model's own forward pass."""
    ids = torch.stack([row["input_ids"] for row in rows(seed)])
    with torch.no_grad():
        return float(model.eval()(input_ids=ids, labels=ids).loss)


# ---------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("per_task", [False, True])
def test_the_base_keeps_every_bit_and_only_new_blocks_learn(tmp_path, folder, per_task):
    base, method, matrix = base_of(folder), BlockExpansion(2, per_task), TaskMatrix()
    module = fit(tmp_path, lm(folder), [method, matrix])
    assert inserted_blocks(module.lm) == [2, 4]  # after the base blocks 1 and 2
    new = new_parameters(module.lm)
    places = {0: 0, 1: 1, 3: 2}
    for name, value in module.lm.state_dict().items():
        if name not in new:
            parts = name.split(".")
            if parts[1] == "layers":
                parts[2] = str(places[int(parts[2])])
            assert torch.equal(value, base.state_dict()[".".join(parts)]), name
    assert all(bool(p.any()) and p.requires_grad for n, p in new.items() if "o_proj" in n or "down_proj" in n)
    a_block = sum(p.numel() for p in base.model.layers[0].parameters())
    assert method.report()["new_parameters"] == 2 * a_block == sum(p.numel() for p in new.values())
    # The row before training is the base's; a task that was not trained has the base's loss for ever.
    assert matrix.matrix[0].tolist() == pytest.approx([loss(base, 0), loss(base, 1)], rel=1e-6)
    if per_task:
        assert matrix.matrix[2, 0] == matrix.matrix[1, 0] < matrix.matrix[0, 0]
        assert matrix.matrix[1, 1] == matrix.matrix[0, 1] > matrix.matrix[2, 1]
    else:
        assert matrix.matrix[2, 0] != matrix.matrix[1, 0]
        assert matrix.matrix[1, 1] != matrix.matrix[0, 1]


def test_a_task_with_its_own_blocks_is_the_run_of_that_task_alone(tmp_path, folder):
    """The blocks start from the base again: nothing of the first task is in the second one's."""
    both = BlockExpansion(1, per_task=True)
    fit(tmp_path / "both", lm(folder), [both])

    class SecondOnly(BlockExpansion):
        def choose_trainable(self, pl_module, task):
            super().choose_trainable(pl_module, task)
            if task.index == 0:
                for p in pl_module.parameters():
                    p.requires_grad_(False)
                pl_module.lm.model.norm.weight.requires_grad_(True)  # something else, of no effect below

        def on_task_end(self, trainer, pl_module):
            super().on_task_end(trainer, pl_module)
            with torch.no_grad():
                pl_module.lm.model.norm.weight.fill_(1.0)

    alone = SecondOnly(1, per_task=True)
    fit(tmp_path / "alone", lm(folder), [alone])
    for name, value in both.blocks_of["b"].items():
        assert torch.equal(value, alone.blocks_of["b"][name]), name
        assert not name.endswith("down_proj.weight") or not torch.equal(value, both.blocks_of["a"][name])


def test_the_result_is_a_plain_model_for_each_task(tmp_path, folder):
    method = BlockExpansion([0, 2], per_task=True)
    module = fit(tmp_path, lm(folder), [method])
    last = logits(module.lm)
    for task in ("a", "b"):
        method.use_task(module, task)
        module.save_pretrained(tmp_path / task)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / task)
        assert type(again).__module__.startswith("transformers.")
        assert len(again.model.layers) == 5
        assert torch.equal(logits(again), logits(module.lm))
        assert torch.equal(logits(again), last) == (task == "b")
        prompt = IDS[:1, :4]
        cached, plain = (again.generate(prompt, max_new_tokens=5, do_sample=False, use_cache=c) for c in (True, False))
        assert torch.equal(cached, plain)
    with pytest.raises(ValueError, match=r"task='c'.*'a', 'b'"):
        method.use_task(module, "c")


# ---------------------------------------------------------------------- checkpoints


def test_checkpoints_leave_the_base_out_and_hold_the_blocks(tmp_path, folder):
    module = fit(tmp_path, lm(folder), [BlockExpansion(1)])
    for path in sorted(tmp_path.rglob("*.ckpt")):
        content = torch.load(path, weights_only=True)
        assert set(content["state_dict"]) == {f"lm.{name}" for name in new_parameters(module.lm)}, path
    other = tmp_path / "other"
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES | {"attention_dropout": 0.1})).save_pretrained(other)
    with pytest.raises(MisconfigurationException, match="frozen base"):
        fit(tmp_path / "again", lm(other), [BlockExpansion(1)], tmp_path / "tasks" / "0-a.ckpt")


@pytest.mark.parametrize(("kind", "per_task"), [("folder", False), ("folder", True), ("somebody", False)])
def test_resumed_anywhere_equals_never_stopped(tmp_path, folder, kind, per_task):
    def run(root, ckpt_path=None):
        methods = [BlockExpansion(2, per_task)] + [TaskMatrix()] * (kind != "somebody")
        if not per_task:
            methods += [EWC(1.0, samples=2), Replay(6, 0.3)]
        torch.manual_seed(0)
        module = {"folder": lambda: lm(folder), "somebody": somebody}[kind]()
        return entries(fit(root, module, methods, ckpt_path)), methods

    whole, methods = run(tmp_path / "whole")
    paths = sorted((tmp_path / "whole").rglob("*.ckpt"))
    assert len(paths) >= 4
    for number, path in enumerate(paths[:: 2 if kind == "folder" and not per_task else 1]):
        again, others = run(tmp_path / str(number), path)
        assert again.keys() == whole.keys()
        assert [n for n in whole if not torch.equal(whole[n], again[n])] == [], path
        if kind != "somebody":
            assert torch.equal(methods[1].matrix, others[1].matrix), path
        for task, blocks in methods[0].blocks_of.items():
            assert all(torch.equal(value, others[0].blocks_of[task][n]) for n, value in blocks.items()), path


def test_resumed_in_16_bits_with_the_base_left_out(tmp_path, folder):
    """The Trainer's precision changes the weights in the evaluation before training; the checksum is of the file's."""

    def run(root, ckpt_path=None):
        module = fit(root, lm(folder), [BlockExpansion(1), TaskMatrix()], ckpt_path, precision="bf16-true")
        return entries(module)

    whole = run(tmp_path / "whole")
    for name in ("tasks/0-a.ckpt", "checkpoints/1-b/step=6.ckpt"):
        again = run(tmp_path / name[-6], tmp_path / "whole" / name)
        assert [n for n in whole if not torch.equal(whole[n], again[n])] == [], name


def somebody():
    return SomebodysLM(num_hidden_layers=3)


@pytest.mark.parametrize("per_task", [False, True])
def test_every_boundary_can_be_evaluated_and_a_task_added(tmp_path, folder, per_task):
    matrix = TaskMatrix()
    whole = fit(tmp_path / "run", lm(folder), [BlockExpansion(1, per_task), matrix], tasks="abc")
    for row, name in enumerate(["0-a", "1-b", "2-c"], 1):
        path = tmp_path / "run" / "tasks" / f"{name}.ckpt"
        run = trainer(tmp_path, [BlockExpansion(1, per_task)])
        found = evaluate_tasks(run, lm(folder), data("abc"), ckpt_path=path)
        assert [found[task]["val_loss"] for task in "abc"] == pytest.approx(matrix.matrix[row].tolist(), abs=0), name
    fit(tmp_path / "two", lm(folder), [BlockExpansion(1, per_task), TaskMatrix()], tasks="ab")
    more = TaskMatrix()
    last = tmp_path / "two" / "tasks" / "1-b.ckpt"
    added = fit(tmp_path / "three", lm(folder), [BlockExpansion(1, per_task), more], last, "abc")
    assert all(torch.equal(value, entries(added)[n]) for n, value in entries(whole).items())
    assert torch.equal(more.matrix[2:], matrix.matrix[2:])


def test_the_order_of_the_callbacks_changes_no_bit(tmp_path, folder):
    found = []
    for order in (1, -1):
        callbacks = [L2SP(0.1), BlockExpansion(1), Replay(6, 0.3)][::order]
        found.append(entries(fit(tmp_path / str(order), lm(folder), callbacks)))
    assert all(torch.equal(value, found[1][n]) for n, value in found[0].items())


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        ([BlockExpansion(1, True), EWC(1.0)], "EWC with BlockExpansion: .*per_task"),
        ([BlockExpansion(1, True), LwF()], "LwF with BlockExpansion: .*per_task"),
        ([Replay(6), BlockExpansion(1, True)], "Replay with BlockExpansion: .*per_task"),
        ([BlockExpansion(1), BlockExpansion(1)], "BlockExpansion and BlockExpansion-2 both want"),
    ],
)
def test_methods_that_do_not_go_together(tmp_path, folder, callbacks, words):
    with pytest.raises(MisconfigurationException, match=words):
        fit(tmp_path, lm(folder), callbacks)


def test_models_that_cannot_be_expanded(tmp_path, folder):
    with pytest.raises(ValueError, match="adapters"):
        fit(tmp_path, lm(folder, lora={"r": 2}), [BlockExpansion(1)])
    with pytest.raises(ValueError, match="blocks=8: expected a number of blocks to insert from 1 to 3"):
        fit(tmp_path, lm(folder), [BlockExpansion()])
    with pytest.raises(ValueError, match="blocks=0: expected"):
        BlockExpansion(0)
    compiled = somebody()
    compiled.model.compile()
    with pytest.raises(MisconfigurationException, match=r"torch\.compile"):
        fit(tmp_path, compiled, [BlockExpansion(1)])


def test_trained_blocks_are_not_started_anew_in_silence(tmp_path, folder):
    module = fit(tmp_path / "first", lm(folder), [BlockExpansion(1)])
    before = entries(module)
    with pytest.raises(MisconfigurationException, match="trained blocks already"):
        fit(tmp_path / "second", module, [BlockExpansion(1, per_task=True)])
    assert all(torch.equal(value, before[n]) for n, value in entries(module).items())
