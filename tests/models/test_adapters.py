"""One adapter for each task: allocation, initialisation, what trains and what works."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from adapting import IDS, base_model, logits, move, peft_model
from toys import Classifier

from lightning_cl import CausalLM
from lightning_cl.models.adapter_factors import adapter_factors
from lightning_cl.models.adapter_names import adapter_name, task_name
from lightning_cl.models.adapters import (
    adapter_bytes,
    adapter_parameters,
    allocate_adapter,
    find_peft_model,
    is_untrained,
    list_adapters,
    remove_adapter,
    train_adapter,
    use_adapter,
    using_adapter,
)


class Holder(torch.nn.Module):
    """Somebody's module with a PeftModel somewhere in it, and something else."""

    def __init__(self, model):
        super().__init__()
        self.inner = torch.nn.ModuleDict({"model": model})
        self.other = torch.nn.Linear(2, 2)


def with_tasks(*tasks, **lora):
    model = peft_model(**lora)
    for task in tasks:
        allocate_adapter(model, task)
    move(model, tasks)
    return model


def products(model, task):
    return {f.path: f.scale * f.second @ f.first for f in adapter_factors(find_peft_model(model), adapter_name(task))}


def trainable(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "task", ["python", "my.task", "a-b", "lora_A", "weight", "default", "", "Ä ö/ü", "task-a", "-", "\U0001f600", "0"]
)
def test_a_name_goes_to_peft_and_back(task):
    name = adapter_name(task)
    assert task_name(name) == task
    assert "." not in name
    assert "lora_" not in name
    assert name.isascii()


@pytest.mark.parametrize("name", ["default", "task-a-b", "task-a-2e", "task-a-ffffff-b", "task-a-41-"])
def test_names_of_other_adapters_are_no_tasks(name):
    assert task_name(name) is None


def test_awkward_names_work_in_peft():
    model = with_tasks("lora_A.default", "default", "weight", "base layer")
    assert list_adapters(model) == ["lora_A.default", "default", "weight", "base layer"]
    found = [products(model, task) for task in list_adapters(model)]
    assert all(not torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))
    assert {p.data_ptr() for p in adapter_parameters(model, "weight").values()}.isdisjoint(
        p.data_ptr() for p in adapter_parameters(model, "default").values()
    )


# ---------------------------------------------------------------------- allocation


def test_the_template_gives_way_to_the_first_task():
    model = peft_model()
    expected = logits(model.get_base_model())
    allocate_adapter(model, "a")
    assert list(model.peft_config) == ["task-a"]
    assert not any("default" in name for name in model.state_dict())
    assert torch.equal(logits(model), expected)
    assert trainable(model) == set()
    allocate_adapter(model, "b")
    assert list_adapters(model) == ["a", "b"]
    assert model.active_adapters == ["task-a"]
    assert model.peft_config["task-b"].r == 4
    assert model.peft_config["task-b"] is not model.peft_config["task-a"]


def test_allocating_twice_changes_nothing():
    model = with_tasks("a", "b")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    allocate_adapter(model, "a", init="previous", seed=5)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_fresh_adapter_is_drawn_as_peft_draws_it_from_the_seed_alone():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    model = peft_model()
    draws = {}
    for seed in (0, 1):
        for task in ("a", "b"):
            torch.manual_seed(random.randrange(100))
            fresh = peft_model()
            state, other, numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
            allocate_adapter(fresh, task, seed=seed)
            assert torch.equal(torch.get_rng_state(), state)
            assert random.getstate() == other
            assert (np.random.get_state()[1] == numbers).all()
            draws[task, seed] = torch.cat([f.first.flatten() for f in adapter_factors(fresh, adapter_name(task))])
    for task in ("b", "a"):
        allocate_adapter(model, task)
    again = torch.cat([f.first.flatten() for f in adapter_factors(model, adapter_name("a"))])
    assert torch.equal(again, draws["a", 0])  # also as the second task
    assert len({float(draw.sum()) for draw in draws.values()}) == 4
    for factors in adapter_factors(model, adapter_name("a")):
        bound = 1 / math.sqrt(factors.first.shape[1])
        assert factors.first.abs().max() <= bound
        assert factors.first.abs().max() > 0.9 * bound
        assert not factors.second.any()
    assert is_untrained(model, "a")
    random.setstate(before[1])


def test_init_previous_copies_the_last_task():
    model = with_tasks("a", "b")
    allocate_adapter(model, "c", init="previous")
    for old, new in zip(adapter_parameters(model, "b").values(), adapter_parameters(model, "c").values(), strict=True):
        assert torch.equal(old, new)
        assert old.data_ptr() != new.data_ptr()
    use_adapter(model, "b")
    expected = logits(model)
    use_adapter(model, "c")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_init_mean_is_the_best_approximation_of_the_mean_product(settings):
    """Eckart and Young: what is left over has the norm of the singular values that were dropped."""
    model = with_tasks("a", "b", "c", **settings)
    allocate_adapter(model, "d", init="mean")
    found = [products(model, task) for task in "abcd"]
    assert len(found[3]) == len(found[0]) > 0
    for path, product in found[3].items():
        mean = (found[0][path] + found[1][path] + found[2][path]) / 3
        dropped = torch.linalg.svdvals(mean)[4:].norm()
        torch.testing.assert_close((product - mean).norm(), dropped, rtol=1e-3, atol=1e-4)
        assert torch.linalg.matrix_rank(product) == 4


def test_init_mean_of_one_task_is_that_task_and_of_untrained_ones_can_learn():
    model = with_tasks("a")
    allocate_adapter(model, "b", init="mean")
    for path, product in products(model, "b").items():
        torch.testing.assert_close(product, products(model, "a")[path], rtol=1e-4, atol=1e-5)
    model = peft_model()
    allocate_adapter(model, "a")
    allocate_adapter(model, "b", init="mean")
    assert is_untrained(model, "b")
    assert all(f.first.norm(dim=1).min() > 0.1 for f in adapter_factors(model, adapter_name("b")))


def test_the_rank_can_be_another_one_and_the_scale_stays():
    model = peft_model()
    allocate_adapter(model, "a", rank=2)
    assert {(f.first.shape[0], f.scale) for f in adapter_factors(model, "task-a")} == {(2, 2.0)}
    assert isinstance(model.peft_config["task-a"].lora_alpha, int)


def test_bytes():
    model = with_tasks("a", "b")
    layers = 2 * (4 * (32 + 32) + 3 * (32 + 64))
    assert adapter_bytes(model, "a") == adapter_bytes(model, "b") == 4 * 4 * layers


def test_remove():
    model = with_tasks("a", "b", "c")
    train_adapter(model, "b")
    use_adapter(model, "c")
    expected = logits(model)
    use_adapter(model, "a")
    remove_adapter(model, "a")
    assert list_adapters(model) == ["b", "c"]
    assert torch.equal(logits(model), expected)  # the last of the others
    assert trainable(model) == set(adapter_parameters(model, "b"))
    remove_adapter(model, "b")
    with pytest.raises(ValueError, match="task='c': it has the only adapter"):
        remove_adapter(model, "c")


# ---------------------------------------------------------------------- training and using


@pytest.mark.parametrize("train", ["AB", "B"])
def test_one_adapter_alone_trains(train):
    holder = Holder(with_tasks("a", "b"))
    train_adapter(holder, "b", train)
    wanted = {name for name in adapter_parameters(holder, "b") if train == "AB" or "lora_B" in name}
    assert trainable(holder) == wanted
    train_adapter(holder, "a", train)
    assert {name.replace("task-a", "task-b") for name in trainable(holder)} == wanted


def test_with_an_embedding_the_random_factor_is_the_one_that_stays():
    model = peft_model(target_modules=["embed_tokens"])
    allocate_adapter(model, "a")
    train_adapter(model, "a", "B")
    (name,) = trainable(model)
    assert "lora_embedding_A" in name
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert model.get_parameter(name).grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_earlier_tasks_stay_the_same_to_the_last_bit(dtype):
    """Also with weight decay and momentum, and after evaluation in between."""
    model = peft_model(dtype=dtype, sizes={"num_hidden_layers": 1})
    kept, before = {}, {}
    frozen = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    for i, task in enumerate("abc"):
        allocate_adapter(model, task, init="previous" if task == "b" else "fresh")
        train_adapter(model, task)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.5)
        model.train()
        losses = []
        for _ in range(6):
            loss = model(input_ids=IDS.roll(i, 1), labels=IDS.roll(i, 1)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
            for old in kept:
                with using_adapter(model, old):
                    assert torch.equal(logits(model), kept[old])
            model.train()
        assert losses[-1] < losses[0]
        with using_adapter(model, task):
            kept[task] = logits(model)
        for old, parameters in before.items():
            assert all(torch.equal(p, parameters[n]) for n, p in adapter_parameters(model, old).items())
        before[task] = {n: p.clone() for n, p in adapter_parameters(model, task).items()}
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert not torch.equal(kept["a"], kept["b"])


def test_using_changes_neither_what_trains_nor_what_was_in_use():
    model = with_tasks("a", "b")
    base = logits(base_model())
    train_adapter(model, "b", "B")
    before, expected = trainable(model), logits(model)
    with using_adapter(model, None):
        assert torch.equal(logits(model), base)
        assert trainable(model) == before
        with using_adapter(model, "a"):
            other = logits(model)
            assert trainable(model) == before
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(other, expected)
    assert trainable(model) == before
    with pytest.raises(KeyError), using_adapter(model, None):
        raise KeyError
    assert torch.equal(logits(model), expected)


def test_training_turns_the_adapters_on_again():
    model = with_tasks("a")
    expected = logits(model)
    use_adapter(model, None)
    allocate_adapter(model, "b")
    assert torch.equal(logits(model), logits(base_model()))
    train_adapter(model, "a")
    assert torch.equal(logits(model), expected)


def test_copies_of_whole_layers_belong_to_their_task():
    model = peft_model(modules_to_save=["lm_head"], sizes={"tie_word_embeddings": False})
    for task in "ab":
        allocate_adapter(model, task)
    train_adapter(model, "b")
    assert sum("lm_head" in name for name in trainable(model)) == 1
    move(model, "ab")
    with using_adapter(model, "a"):
        first = logits(model)
    assert not torch.equal(logits(model), first)
    with using_adapter(model, None):
        assert torch.equal(logits(model), logits(base_model(tie_word_embeddings=False)))


def test_use_task_of_causal_lm():
    module = CausalLM(base_model().config.to_dict() | {"model_type": "llama"}, lora={"r": 4})
    with pytest.raises(RuntimeError, match="use_task: there is no model yet"):
        module.use_task("a")
    module.configure_model()
    base = logits(module.lm.get_base_model())
    module.use_task("default")  # the one adapter for all tasks
    for task in ("chat", "code"):
        allocate_adapter(module, task)
    move(module, ["chat", "code"])
    found = {}
    for task in ("chat", "code", None):
        module.use_task(task)
        found[task] = logits(module.lm)
    assert torch.equal(found[None], base)
    assert not torch.equal(found["chat"], found["code"])
    with pytest.raises(ValueError, match=r"task='cod': it has no adapter; there are adapters of \['chat', 'code'\]"):
        module.use_task("cod")


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("make", [Classifier, lambda: CausalLM("sample:SmolLM2-135M-Instruct", lora={"r": 4})])
def test_a_module_without_adapters_is_told_what_to_give(make):
    with pytest.raises(ValueError, match=r"no model with peft adapters.*CausalLM\(lora=\{'r': 8\}\).*PeftModel"):
        allocate_adapter(make(), "a")


def test_two_models_and_other_kinds_are_refused():
    from peft import IA3Config, get_peft_model

    pair = torch.nn.ModuleList([peft_model(), peft_model()])
    with pytest.raises(ValueError, match="2 PeftModels"):
        find_peft_model(pair)
    other = get_peft_model(base_model(), IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"IA3.*expected LoRA"):
        find_peft_model(other)


def test_a_trained_template_is_not_thrown_away():
    model = peft_model()
    move(model, ["default"])
    with pytest.raises(ValueError, match=r"'default' has been trained and would be deleted.*merge_and_unload"):
        allocate_adapter(model, "a")
    assert list(model.peft_config) == ["default"]


def test_other_adapters_besides_are_refused():
    model = with_tasks("a")
    model.add_adapter("mine", model.peft_config["task-a"])
    with pytest.raises(ValueError, match=r"besides the tasks' adapters it has \['mine'\]"):
        allocate_adapter(model, "b")


@pytest.mark.parametrize(
    ("lora", "call", "message"),
    [
        ({}, lambda m: allocate_adapter(m, "a", init="zero"), "init='zero'"),
        ({}, lambda m: allocate_adapter(m, "a", rank=0), "rank=0"),
        ({}, lambda m: allocate_adapter(m, "mean"), "task='mean': this name has a meaning"),
        ({}, lambda m: train_adapter(m, "default", "A"), "train='A'"),
        ({"bias": "all"}, lambda m: allocate_adapter(m, "a"), "bias='all'"),
        ({"init_lora_weights": "olora"}, lambda m: allocate_adapter(m, "a"), "init_lora_weights='olora'"),
        ({"rank_pattern": {"q_proj": 2}}, lambda m: allocate_adapter(m, "a", rank=2), "rank=2: the template has ranks"),
        (
            {"use_dora": True},
            lambda m: [allocate_adapter(m, "a"), allocate_adapter(m, "b", init="mean")],
            "adapter of 'a' has use_dora",
        ),
        (
            {},
            lambda m: [allocate_adapter(m, "a"), allocate_adapter(m, "b", init="previous", rank=2)],
            r"init='previous'.*\[4, 32\].*\[2, 32\]",
        ),
    ],
)
def test_mistakes_are_named(lora, call, message):
    with pytest.raises(ValueError, match=message):
        call(peft_model(**lora))
