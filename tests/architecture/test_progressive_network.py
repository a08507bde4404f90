"""Columns of decoder blocks: the forward pass by hand, what stays to the bit, the number of parameters, resuming."""

from __future__ import annotations

import logging

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toys import TINY_LLAMA, trainer
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_cl import EWC, CausalLM, LwF, ProgressiveNetwork, Replay, Task, TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.models.decoder_columns import add_column, column_parameters, columns_of, use_column
from lightning_cl.sequence.evaluate import evaluate_tasks

pytestmark = pytest.mark.filterwarnings("ignore")
VOCABULARY, WIDTH = 23, 4
SIZES = TINY_LLAMA | {"vocab_size": VOCABULARY, "initializer_range": 0.2, "attention_dropout": 0.1}
IDS = torch.arange(14).view(2, 7) * 5 % VOCABULARY
NAMES = ["a", "b.c", "d"]


def model(seed=0, kind="llama", **settings):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES | {"model_type": kind} | settings)).eval()


def shaken(made):
    """No part of the columns is zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "task_" in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return made


@torch.no_grad()
def logits(made, task=None):
    use_column(made, task)
    return made.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model().save_pretrained(path)
    return path


def rows(seed, count=8):
    start = torch.randint(VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(seed))
    ids = (start + torch.arange(8) * (2 * seed + 1)) % VOCABULARY
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def data(names=NAMES):
    return TaskDataModule([Task(n, rows(i), val=rows(i, 4)) for i, n in enumerate(names)], batch_size=2, seed=0)


def lm(source, **settings):
    return CausalLM(source, lambda p: torch.optim.AdamW(p, lr=1e-2), schedule=None, **settings)


def run(root, module, names=NAMES, more=(), ckpt_path=None, **settings):
    L.seed_everything(5, verbose=False)
    saver = ModelCheckpoint(every_n_train_steps=3, save_top_k=-1, filename="{step}")
    callbacks = [ProgressiveNetwork(WIDTH, **settings), TaskMatrix(), *more, saver]
    fit_tasks(trainer(root, callbacks, max_epochs=1), module, data(names), ckpt_path)
    return module, callbacks


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder):
    root = tmp_path_factory.mktemp("run")
    module, callbacks = run(root, lm(folder))
    return root, module, callbacks


# ---------------------------------------------------------------------- the model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_zero_laterals_are_the_initialisation_and_names_stay(kind):
    settings = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64} if kind == "gpt2" else {}
    made = model(kind=kind, **settings)
    base, names = logits_of_plain(made), set(made.state_dict())
    for task in NAMES:
        add_column(made, task, WIDTH)
        add_column(made, task, WIDTH)  # once
    assert all(torch.equal(logits(made, task), base) for task in [None, *NAMES])
    assert columns_of(made) == NAMES
    assert names == {name for name in made.state_dict() if "task_" not in name}
    old = {task: logits(shaken(made), task) for task in NAMES[:2]}
    assert not torch.allclose(old["a"], base, atol=1e-2)
    assert torch.equal(logits(made), base)


@torch.no_grad()
def logits_of_plain(made):
    return made(input_ids=IDS, use_cache=False).logits


def test_the_forward_pass_by_hand():
    """Each column by plain calls of its blocks, with the laterals as equation 2 has them."""
    made = model()
    for task in NAMES[:2]:
        add_column(made, task, WIDTH)
    shaken(made)
    inner, plain = made.model, model().model
    seen = {}
    handle = plain.layers[0].register_forward_pre_hook(lambda b, a, k: seen.update(k), with_kwargs=True)
    with torch.no_grad():
        plain(input_ids=IDS, use_cache=False)
        handle.remove()
        seen.pop("hidden_states", None)
        streams = [inner.embed_tokens(IDS)] * 3
        for depth, layer in enumerate(inner.layers):
            above = [plain.layers[depth](streams[0], **seen)]
            for k in (1, 2):
                h = layer.task_columns[k - 1](streams[k], **seen)
                part = layer.task_laterals[k - 1]
                for j in range(k):
                    h = h + torch.relu(part.scale[j] * (above[j] @ part.down[j].T)) @ part.up[j].T
                above.append(h)
            streams = above
        expected = made.lm_head(inner.norm(streams[2]))
    torch.testing.assert_close(logits(made, "b.c"), expected, rtol=1e-5, atol=1e-5)


def test_a_random_column_is_no_copy_and_takes_no_global_random_number():
    made = model()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    add_column(made, "a", WIDTH, init="random", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    weight = made.model.layers[1].task_columns[0].mlp.up_proj.weight
    assert float(weight.std()) == pytest.approx(0.2, rel=0.2)
    assert not torch.allclose(weight, made.model.layers[1].mlp.up_proj.weight, atol=1e-2)
    again = model()
    add_column(again, "a", WIDTH, init="random", seed=3)
    assert torch.equal(logits(made, "a"), logits(again, "a"))


def test_generation_has_no_cache_and_says_why():
    made = shaken_with_columns()
    use_column(made, "b.c")
    made.eval()
    made.generation_config.eos_token_id = None
    prompt = IDS[:1, :4]
    found = made.generate(prompt, max_new_tokens=4, do_sample=False)
    for _ in range(4):
        prompt = torch.cat([prompt, made(input_ids=prompt).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, prompt)
    with pytest.raises(ValueError, match="use_cache=True: a key-value cache"):
        made.generate(prompt, max_new_tokens=4, use_cache=True)
    with pytest.raises(ValueError, match="key-value cache"):
        made(input_ids=prompt, use_cache=True)


def shaken_with_columns():
    made = model()
    for task in NAMES:
        add_column(made, task, WIDTH)
    return shaken(made)


# ---------------------------------------------------------------------- runs


def test_earlier_tasks_stay_to_the_bit_and_the_formula_counts(trained, folder):
    _, module, (method, matrix, _) = trained
    for column in range(3):
        later = matrix.matrix[column + 1 :, column]
        assert (later == later[0]).all()
        assert later[0] < matrix.matrix[0, column]
        assert (matrix.matrix[: column + 1, column] == matrix.matrix[0, column]).all()  # until then, the base
    assert torch.equal(logits(module.lm), logits_of_plain(AutoModelForCausalLM.from_pretrained(folder).eval()))
    blocks = sum(p.numel() for p in model().model.layers.parameters())
    for k, task in enumerate(NAMES, 1):
        assert method.parameters[task] == blocks + k * 2 * (2 * WIDTH * 16 + 1)
    used = {n for n, p in module.named_parameters() if p.requires_grad}
    assert used == {f"lm.{name}" for name in column_parameters(module.lm, "d")}
    parts = column_parameters(module.lm, "d").items()
    assert all(bool(p.any()) for name, p in parts if ".up." in name)  # the laterals have learnt


def test_the_cost_is_said_before_the_run(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run(tmp_path, lm(SIZES), NAMES[:2])
    blocks = sum(p.numel() for p in model().model.layers.parameters())
    total = 2 * blocks + 3 * 2 * (2 * WIDTH * 16 + 1)
    (said,) = [r.message for r in caplog.records if "ProgressiveNetwork: 2 tasks" in r.message]
    assert f"add {total:,} parameters" in said
    assert "runs 3 columns" in said


def test_resumed_anywhere_equals_never_stopped(tmp_path, folder, trained):
    root, module, callbacks = trained
    whole = module.state_dict()
    paths = sorted(root.rglob("*.ckpt"))
    assert len(paths) >= 7
    for number, path in enumerate(paths):
        content = torch.load(path, weights_only=True)
        assert all("task_" in name for name in content["state_dict"]), path  # the frozen base is left out
        again, others = run(tmp_path / str(number), lm(folder), ckpt_path=path)
        state = again.state_dict()
        assert state.keys() == whole.keys()
        assert [n for n in whole if not torch.equal(whole[n], state[n])] == [], path
        assert torch.equal(callbacks[1].matrix, others[1].matrix), path


def test_every_boundary_can_be_evaluated_and_a_task_added(tmp_path, folder, trained):
    root, module, (_, matrix, _) = trained
    for row in (1, 2, 3):
        (path,) = root.rglob(f"tasks/{row - 1}-*.ckpt")
        found = evaluate_tasks(trainer(tmp_path, [ProgressiveNetwork(WIDTH)]), lm(folder), data(), ckpt_path=path)
        assert [found[task]["val_loss"] for task in NAMES] == matrix.matrix[row].tolist()
    run(tmp_path / "two", lm(folder), NAMES[:2])
    (last,) = (tmp_path / "two").rglob("tasks/1-*.ckpt")
    added, _ = run(tmp_path / "three", lm(folder), ckpt_path=last)
    assert all(torch.equal(value, added.state_dict()[n]) for n, value in module.state_dict().items())


# ---------------------------------------------------------------------- refusals


def test_what_does_not_go_together(tmp_path, folder, trained):
    for other, words in ((EWC(1.0), "EWC"), (LwF(), "LwF"), (Replay(6), "Replay")):
        with pytest.raises(MisconfigurationException, match=f"{words} with ProgressiveNetwork"):
            run(tmp_path, lm(folder), more=[other])
    with pytest.raises(ValueError, match="adapters"):
        run(tmp_path, lm(folder, lora={"r": 2}))
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        run(tmp_path, lm(folder, gradient_checkpointing=True))
    with pytest.raises(ValueError, match="width=0"):
        ProgressiveNetwork(0)
    _, module, _ = trained
    with pytest.raises(ValueError, match="save_pretrained: the model has a column"):
        module.save_pretrained(tmp_path / "saved")
    with pytest.raises(MisconfigurationException, match="has columns of"):
        run(tmp_path / "again", module, ["x", "y"])
