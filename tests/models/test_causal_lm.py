"""CausalLM: what it takes from the data, its loss, its optimizer per task, and what it leaves on disk."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F
from toys import TINY_LLAMA, trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_cl import CausalLM, Replay, Task, TaskDataModule, TrainedBPE, WarmupDecay, fit_tasks

ANIMALS = ("cat", "dog", "owl", "hen", "fox")
# Of different lengths, so that batches are padded and weigh differently.
TEXTS = [f"the {animal} sleeps{' in the barn' * i}" for i, animal in enumerate(ANIMALS)] * 2
OTHERS = [f"def {animal}(x): return x + {i}" for i, animal in enumerate(ANIMALS)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TrainedBPE(280, str(tmp_path_factory.mktemp("vocabulary"))).train(TEXTS)


def texts(tokenizer, tasks=None, **settings):
    return TaskDataModule(tasks or {"a": TEXTS}, tokenizer=tokenizer, **{"max_length": 48, "batch_size": 2} | settings)


def lm(**config):
    torch.manual_seed(0)
    return CausalLM(TINY_LLAMA | config, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1))


def trained(root, tokenizer, module=None, **settings):
    module, data = module or lm(), texts(tokenizer)
    fit_tasks(trainer(root, max_steps=3, num_sanity_val_steps=0, **settings), module, data)
    return module, data


# ---------------------------------------------------------------------- the model


def test_a_configuration_takes_vocabulary_and_special_tokens_from_the_tokenizer(tmp_path, tokenizer):
    module, _ = trained(tmp_path, tokenizer)
    assert module.lm.config.vocab_size == module.lm.get_input_embeddings().num_embeddings == len(tokenizer)
    assert module.lm.config.eos_token_id == tokenizer.eos_token_id
    assert module.lm.config.hidden_size == TINY_LLAMA["hidden_size"]


def test_a_vocabulary_in_the_configuration_wins(tmp_path, tokenizer):
    module, _ = trained(tmp_path, tokenizer, lm(vocab_size=320))
    assert module.lm.get_input_embeddings().num_embeddings == 320


def test_saved_folder_gives_the_same_logits_and_tokenizer(tmp_path, tokenizer):
    module, _ = trained(tmp_path, tokenizer)
    module.save_pretrained(tmp_path / "model")
    ids = torch.tensor([tokenizer("the owl sleeps")["input_ids"]])
    again = CausalLM(str(tmp_path / "model"))
    again.configure_model()
    assert torch.equal(again.lm.eval()(ids).logits, module.lm.eval()(ids).logits)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()(ids).logits, again.lm(ids).logits
    )
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert saved("a fox in the barn")["input_ids"] == tokenizer("a fox in the barn")["input_ids"]
    assert saved.eos_token_id == tokenizer.eos_token_id


def test_a_folder_is_trained_from_where_it_was(tmp_path, tokenizer):
    """A pretrained model must not be initialised anew by the fit."""
    module, _ = trained(tmp_path, tokenizer)
    module.save_pretrained(tmp_path / "model")
    frozen = CausalLM(tmp_path / "model", optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trained(tmp_path / "2", tokenizer, frozen)
    for one, other in zip(module.lm.parameters(), frozen.lm.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_folder_is_trained_with_its_dropout(tmp_path, tokenizer):
    """`from_pretrained` gives a model in evaluation mode, and Lightning keeps the modes that it finds."""
    module, _ = trained(tmp_path, tokenizer)
    module.save_pretrained(tmp_path / "model")
    modes = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes.append({m.training for m in pl_module.modules()})

    trained(tmp_path / "2", tokenizer, CausalLM(tmp_path / "model"), callbacks=[Look()])
    assert modes == [{True}] * 3


def test_tokenizer_larger_than_the_embeddings_is_refused(tokenizer):
    module = lm(vocab_size=100)
    module.tokenizer = tokenizer
    with pytest.raises(MisconfigurationException, match=rf"tokenizer.*{len(tokenizer)} tokens.*100 embeddings"):
        module.configure_model()


def test_configuration_without_any_vocabulary_is_refused():
    with pytest.raises(MisconfigurationException, match=r"`vocab_size`.*tokenizer"):
        lm().configure_model()


@pytest.mark.parametrize("there", [True, False], ids=["an empty folder", "no folder"])
def test_unknown_model_is_named(tmp_path, there):
    folder = tmp_path / "nowhere"
    if there:
        folder.mkdir()
    with pytest.raises(ValueError, match=rf"model='{folder}'.*folder.*hub"):
        CausalLM(str(folder)).configure_model()


@pytest.mark.parametrize("model", [5, None, ["llama"]])
def test_model_of_a_wrong_type_is_named(model):
    with pytest.raises(TypeError, match=r"model=.*expected a name, a folder or a configuration"):
        CausalLM(model)


def test_configuration_without_a_model_type_is_named():
    with pytest.raises(ValueError, match=r"hidden_size.*`model_type`"):
        CausalLM({"hidden_size": 8})


# ---------------------------------------------------------------------- the loss


def batch_of(data, indices):
    loader = data.train_loader(data.tasks[0])
    return loader.collate_fn([loader.dataset[index] for index in indices])


def nll(model, ids):
    """The summed loss of one sequence and the number of tokens it predicts right, from the definition."""
    logits = model(ids[None]).logits[0, :-1]
    return F.cross_entropy(logits, ids[1:], reduction="sum").item(), int((logits.argmax(-1) == ids[1:]).sum())


def test_loss_is_of_the_next_token(tmp_path, tokenizer):
    module, data = trained(tmp_path, tokenizer)
    module.lm.eval()
    batch = batch_of(data, [3])
    expected, _ = nll(module.lm, batch["input_ids"][0])
    assert module(**batch).loss.item() == pytest.approx(expected / (batch["input_ids"].shape[1] - 1), rel=1e-5)


def test_no_token_sees_a_later_one(tmp_path, tokenizer):
    module, data = trained(tmp_path, tokenizer)
    batch = batch_of(data, [4])
    changed = {key: value.clone() for key, value in batch.items()}
    changed["input_ids"][0, -1] = 7
    module.lm.eval()
    one, other = module(**batch).logits, module(**changed).logits
    torch.testing.assert_close(one[:, :-1], other[:, :-1])
    assert not torch.allclose(one[:, -1], other[:, -1])


def test_padding_changes_nothing(tmp_path, tokenizer):
    module, data = trained(tmp_path, tokenizer)
    batch = batch_of(data, [0, 1])
    pad = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
    padded = {key: F.pad(value, (0, 5), value=pad[key]) for key, value in batch.items()}
    module.lm.eval()
    torch.testing.assert_close(module(**padded).loss, module(**batch).loss)


def test_validation_is_a_mean_over_tokens(tmp_path, tokenizer):
    module, data = lm(), texts(tokenizer, {"a": {"train": OTHERS, "val": TEXTS[:5]}})
    run = trainer(tmp_path)
    (metrics,) = run.validate(module, datamodule=data, verbose=False)
    dataset = data.val_loader(data.tasks[0]).dataset
    loss, hits, tokens, model = 0.0, 0, 0, module.lm.eval()
    for index in range(len(dataset)):
        ids = dataset[index]["input_ids"].long()
        sample_loss, sample_hits = nll(model, ids)
        loss, hits, tokens = loss + sample_loss, hits + sample_hits, tokens + len(ids) - 1
    assert len(dataset) == 5  # batches of 2, 2 and 1 samples, of very different lengths
    assert metrics["val_loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert metrics["val_token_accuracy"] == pytest.approx(hits / tokens, abs=1e-6)
    assert metrics["val_perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)


def test_token_accuracy_by_hand(tokenizer):
    """Logits are made up, so that right and wrong answers can be counted on paper."""

    class Made(torch.nn.Module):
        def forward(self, input_ids, labels, **_):
            logits = F.one_hot(torch.tensor([[5, 6, 7, 0], [1, 1, 1, 1]]), 9).float()
            return type("Output", (), {"loss": torch.tensor(2.0), "logits": logits})

    module, logged = lm(), {}
    module.lm = Made()
    module.log_dict = lambda values, **settings: logged.update(values | {"weight": settings["batch_size"]})
    # Right: 5 and 6 after the first token, then 7 is asked for 8; of the second row only one label bears loss.
    labels = torch.tensor([[4, 5, 6, 8], [-100, 1, -100, -100]])
    module.validation_step({"input_ids": labels, "labels": labels}, 0)
    assert float(logged["val_token_accuracy"]) == pytest.approx(3 / 4)
    assert logged["weight"] == 4


# ---------------------------------------------------------------------- optimizer and schedule


def test_norms_and_biases_have_no_weight_decay(tokenizer):
    made = []

    def optimizer(groups):
        made.append(torch.optim.AdamW(groups, lr=0.1, weight_decay=0.3))
        return made[0]

    module = CausalLM(TINY_LLAMA | {"attention_bias": True, "vocab_size": 300}, optimizer, schedule=None)
    module.configure_model()
    module.configure_optimizers()
    decay = {id(p): group["weight_decay"] for group in made[0].param_groups for p in group["params"]}
    named = dict(module.named_parameters())
    assert any("bias" in name for name in named)
    assert {name for name, p in named.items() if decay[id(p)] == 0} == {
        name for name in named if "norm" in name or "bias" in name
    }
    assert set(decay.values()) == {0.0, 0.3}
    # Each once, the tied embedding too.
    assert sorted(decay) == sorted(id(p) for p in named.values())
    assert sum(len(group["params"]) for group in made[0].param_groups) == len(named)


def test_frozen_parameters_are_not_handed_to_the_optimizer(tokenizer):
    module = CausalLM(TINY_LLAMA | {"vocab_size": 300}, schedule=None)
    module.configure_model()
    module.lm.get_input_embeddings().weight.requires_grad_(False)
    optimizer = module.configure_optimizers()
    members = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert members == {id(p) for p in module.parameters() if p.requires_grad}


class Rates(Callback):
    """Learning rates of all steps of each task, and the steps really taken."""

    def __init__(self):
        self.of_task, self.ends, self.steps = [], [], []

    def on_train_start(self, trainer, pl_module):
        self.of_task.append([])
        self.first = trainer.global_step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.of_task[-1].append(optimizer.param_groups[0]["lr"])

    def on_train_end(self, trainer, pl_module):
        self.ends.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.steps.append(trainer.global_step - self.first)


def fit_counting(root, tokenizer, monkeypatch, tasks=None, replay=None, **settings):
    """What schedules were promised, and what came."""

    def forbidden(self):
        raise AssertionError("estimated_stepping_batches sets the data up: on a resume the loader's place is lost")

    monkeypatch.setattr(L.Trainer, "estimated_stepping_batches", property(forbidden))
    promised, rates = [], Rates()

    def schedule(optimizer, steps):
        promised.append(steps)
        return WarmupDecay(optimizer, steps, warmup=0, final=0.1)

    module = CausalLM(TINY_LLAMA, lambda p: torch.optim.AdamW(p, lr=0.01), schedule)
    data = texts(tokenizer, tasks or {"a": TEXTS, "b": OTHERS})
    callbacks = [rates, *([replay] if replay else [])]
    fit_tasks(trainer(root, callbacks, num_sanity_val_steps=0, limit_val_batches=0, **settings), module, data)
    return promised, rates


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 3},
        {"max_epochs": 2},
        {"max_epochs": 2, "max_steps": 3},
        {"max_epochs": 3, "max_steps": 4},
        {"max_epochs": 2, "accumulate_grad_batches": 3},
        {"max_steps": 2, "accumulate_grad_batches": 2},
        {"max_epochs": 2, "limit_train_batches": 2},
        {"max_epochs": 2, "limit_train_batches": 0.5},
        {"max_epochs": 1, "limit_train_batches": 1.0, "accumulate_grad_batches": 2},
        {"max_epochs": 2, "replay": 0.4},
        {"max_epochs": 2, "replay": 0.4, "limit_train_batches": 0.5, "accumulate_grad_batches": 2},
        {"max_epochs": 5, "tasks": [Task("a", TEXTS, max_steps=2), Task("b", OTHERS, max_epochs=2, batch_size=1)]},
    ],
    ids=str,
)
def test_the_schedule_is_told_the_steps_of_its_own_task(tmp_path, tokenizer, monkeypatch, settings):
    settings = dict(settings)
    replay = Replay(20, settings.pop("replay")) if "replay" in settings else None
    promised, rates = fit_counting(tmp_path, tokenizer, monkeypatch, replay=replay, **settings)
    assert len(promised) == 2
    assert promised == rates.steps


def test_replay_makes_the_second_task_longer(tmp_path, tokenizer, monkeypatch):
    """Else the case above would not see whether the mix counts."""
    plain, _ = fit_counting(tmp_path / "1", tokenizer, monkeypatch, max_epochs=2)
    mixed, _ = fit_counting(tmp_path / "2", tokenizer, monkeypatch, max_epochs=2, replay=Replay(20, 0.4))
    assert mixed[0] == plain[0]
    assert mixed[1] > plain[1]


def test_the_learning_rate_is_back_at_its_peak_in_each_task_and_ends_at_final(tmp_path, tokenizer, monkeypatch):
    _, rates = fit_counting(tmp_path, tokenizer, monkeypatch, max_steps=4)
    assert [task[0] for task in rates.of_task] == pytest.approx([0.01, 0.01])
    assert all(task == sorted(task, reverse=True) for task in rates.of_task)
    assert rates.ends == pytest.approx([0.001, 0.001])


def test_optimizer_and_schedule_are_made_anew_for_each_task(tmp_path, tokenizer):
    optimizers, schedules = [], []

    def optimizer(groups):
        optimizers.append(torch.optim.AdamW(groups, lr=0.01))
        return optimizers[-1]

    def schedule(made, steps):
        schedules.append(made)
        return WarmupDecay(made, steps)

    data = texts(tokenizer, {"a": TEXTS, "b": OTHERS})
    run = trainer(tmp_path, max_steps=3, num_sanity_val_steps=0, limit_val_batches=0)
    fit_tasks(run, CausalLM(TINY_LLAMA, optimizer, schedule), data)
    assert [id(o) for o in schedules] == [id(o) for o in optimizers]
    # Steps of Adam, kept per parameter: momentum of task a would show as six.
    steps = [{int(state["step"]) for state in o.state.values()} for o in optimizers]
    assert steps == [{3}, {3}]


def test_without_a_schedule_the_learning_rate_is_constant(tmp_path, tokenizer):
    rates = Rates()
    module = CausalLM(TINY_LLAMA, lambda p: torch.optim.SGD(p, lr=0.3), schedule=None)
    run = trainer(tmp_path, [rates], max_steps=3, num_sanity_val_steps=0, limit_val_batches=0)
    fit_tasks(run, module, texts(tokenizer))
    assert rates.of_task == [[0.3] * 3]


def test_a_number_of_steps_that_nobody_knows_is_an_error_that_says_what_to_do(tmp_path, tokenizer):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 4

    module = lm(vocab_size=300)
    with pytest.raises(MisconfigurationException, match="max_steps, or schedule=None"):
        fit_tasks(trainer(tmp_path, max_epochs=1, limit_val_batches=0), module, {"a": Stream()})


# ---------------------------------------------------------------------- text


def test_generate_is_the_greedy_continuation(tmp_path, tokenizer):
    module, _ = trained(tmp_path, tokenizer)
    ids = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    prompt, model = len(ids), module.lm.eval()
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert module.generate("the cat", 6) == tokenizer.decode(ids[prompt:], skip_special_tokens=True)


def test_generate_is_deterministic_and_leaves_the_mode_alone(tmp_path, tokenizer):
    module, _ = trained(tmp_path, tokenizer, lm(attention_dropout=0.5))
    module.lm.train()
    answers = {module.generate("the dog", 8) for _ in range(3)}
    assert len(answers) == 1
    assert module.lm.training


def test_a_memorised_text_is_continued(tmp_path, tokenizer):
    """The way from text to tokens to text and the shift by one are right, all together."""
    torch.manual_seed(0)
    module = CausalLM(TINY_LLAMA, lambda p: torch.optim.AdamW(p, lr=0.02), schedule=None)
    data = texts(tokenizer, {"a": {"train": ["the fox sleeps in the barn"] * 2, "val": TEXTS[:1]}})
    fit_tasks(trainer(tmp_path, max_steps=60, num_sanity_val_steps=0, limit_val_batches=0), module, data)
    assert module.generate("the fox", 30) == " sleeps in the barn"


@pytest.mark.parametrize("use", [lambda m, path: m.generate("a"), lambda m, path: m.save_pretrained(path)])
def test_before_there_is_a_model_the_error_says_so(tmp_path, use):
    with pytest.raises(RuntimeError, match="no model"):
        use(lm(), tmp_path)
