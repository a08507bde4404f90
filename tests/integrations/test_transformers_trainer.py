"""Continual learning in transformers' Trainer: against closed forms, and against the same run under Lightning."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import forked
import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from toys import trainer as lightning_trainer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import lightning_cl
from lightning_cl import Task
from lightning_cl.buffers import ReplayBuffer
from lightning_cl.evaluation import format_report
from lightning_cl.integrations import transformers as ours

VOCABULARY = 24


def model(seed=0, **settings):
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **small | settings))


def samples(seed, count=16, shortest=4):
    """Token sequences of several lengths; the first ones of each bear no loss."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(shortest, 9, (), generator=generator))
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: int(torch.randint(1, 3, (), generator=generator))] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def collate(batch):
    longest = max(len(sample["input_ids"]) for sample in batch)

    def padded(key, value):
        rows = [torch.nn.functional.pad(s[key], (0, longest - len(s[key])), value=value) for s in batch]
        return torch.stack(rows)

    mask = torch.stack([torch.arange(longest) < len(s["input_ids"]) for s in batch]).long()
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def arguments(folder, **settings):
    defaults = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **defaults | settings)


def trainer(network, folder, data, callbacks=(), **settings):
    return Trainer(
        network, arguments(folder, **settings), train_dataset=data, data_collator=collate, callbacks=list(callbacks)
    )


def weights(network):
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def furthest(left, right):
    return max(float((left[name] - right[name]).abs().max()) for name in right)


class Gradients(TrainerCallback):
    """The gradients that each step is made with; the last callback of its Trainer."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(
            {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
        )


# ---------------------------------------------------------------------- penalties


def primed(method, network):
    """As after an earlier task: an importance, and an anchor away from the weights."""
    generator = torch.Generator().manual_seed(5)
    for name, p in network.named_parameters():
        method.importance[f"model.{name}"] = torch.rand(p.shape, generator=generator)
        method.anchor[f"model.{name}"] = p.detach() + 0.1 * torch.randn(p.shape, generator=generator)
    method.tasks_done = 1
    return method


def test_the_penalty_is_its_closed_form_and_accumulation_changes_nothing(tmp_path):
    data, ends = samples(1), []
    for batch, accumulated in ((8, 1), (2, 4)):
        network, plain, seen = model(), Gradients(), Gradients()
        ewc = primed(ours.EWC(strength=0.7, estimator="empirical", samples=1), network)
        importance, anchor = dict(ewc.importance), dict(ewc.anchor)
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        trainer(network, tmp_path, data, [plain, ewc, seen], **settings).train()
        assert len(seen.steps) == 2
        for before, after in zip(plain.steps, seen.steps, strict=True):
            for name, (theta, gradient) in before.items():
                own = f"model.{name}"
                torch.testing.assert_close(after[name][1], gradient + 0.7 * importance[own] * (theta - anchor[own]))
        ends.append(weights(network))
    assert furthest(*ends) < 1e-6


def test_penalties_observe_before_any_of_them_edits(tmp_path):
    """SI's path integral is of the task's own gradient, wherever it is in the list."""
    omegas = []
    for order in (0, 1):
        network = model()
        si = ours.SI(strength=0.0, normalize=False, damping=1e-3)
        both = [primed(ours.EWC(strength=5.0, estimator="empirical", samples=1), network), si]
        trainer(network, tmp_path, samples(1), both[:: 1 if order == 0 else -1]).train()
        omegas.append(si.importance)
    assert omegas[0].keys() == omegas[1].keys()
    assert all(torch.equal(omegas[0][name], omegas[1][name]) for name in omegas[0])


class Module(L.LightningModule):
    """The same model under Lightning, with the same loss and optimizer."""

    def __init__(self, network):
        super().__init__()
        self.model = network

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


METHODS = {
    "EWC": {"strength": 0.05, "samples": 8, "estimator": "sample"},
    "SI": {"strength": 0.05},
    "MAS": {"strength": 0.05, "samples": 8},
    "L2SP": {"strength": 0.5, "apply": "proximal"},
    "Interpolate": {"share": 0.7, "during": 0.5},
    "RWalk": {"strength": 0.05, "every": 2},
    "auto": {},
    "Replay": {"ratio": 0.25, "seed": 3},
}


@pytest.mark.parametrize("name", METHODS)
def test_lightning_and_trainer_end_with_the_same_weights(tmp_path, name):
    """Two tasks, the same plan: our fit_tasks with our callback, and a Trainer for each task with its namesake."""
    kind = "EWC" if name == "auto" else name
    tasks = {"a": samples(1, 16), "b": samples(2, 24)}
    if name == "Replay":
        # A last batch that is not full is cut in another way by each of the two.
        buffer = ours.Replay(**METHODS[name]).buffer
        for sample in tasks["a"]:
            buffer.add(sample, "a")
        while len(ours.ReplayDataset(tasks["b"], buffer, 0.25, draw_seed=3_000_010, batch_size=4)) % 4:
            tasks["b"].pop()
    under_lightning = getattr(lightning_cl, kind)(**METHODS[name])
    network = model()
    loaders = {name: DataLoader(data, batch_size=4, collate_fn=collate) for name, data in tasks.items()}
    lightning_cl.fit_tasks(
        lightning_trainer(tmp_path / "lightning", [under_lightning], max_epochs=1), Module(network), loaders
    )
    expected, network = weights(network), model()
    untrained = weights(network)
    here = getattr(ours, kind)(**METHODS[name])
    for task, data in tasks.items():
        mixed = here.mix(data, batch_size=4, shuffle=False) if name == "Replay" else data
        trainer(network, tmp_path / task, mixed, [here]).train()
    assert furthest(weights(network), expected) < 2e-6 < furthest(untrained, expected)
    if name == "Replay":
        assert len(mixed) % 4 == 0
        assert [here.buffer.get(n)["input_ids"].tolist() for n in here.buffer.numbers] == [
            under_lightning.buffer.get(n)["input_ids"].tolist() for n in under_lightning.buffer.numbers
        ]
    elif name == "Interpolate":
        assert here.report()["moved"]["task-1"] == pytest.approx(under_lightning.report()["moved"]["b"], rel=1e-4)
    else:
        for parameter, value in under_lightning.importance.items():
            torch.testing.assert_close(here.importance[parameter], value, rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------------- replay


def filled(count=12, seed=9):
    buffer = ReplayBuffer(100)
    for sample in samples(seed, count):
        buffer.add(sample, "earlier")
    return buffer


def test_the_replayed_share_holds_in_every_batch_and_every_epoch(tmp_path):
    new = samples(1, 60, shortest=8)
    mixed = ours.ReplayDataset(new, filled(), ratio=0.25, seed=4, batch_size=8, epochs=2)
    largest = max(len(sample["input_ids"]) - 1 for sample in new)
    seen = []

    def watching(batch):
        seen.append(batch)
        return collate(batch)

    own = {id(sample["input_ids"]) for sample in new}
    run = trainer(model(), tmp_path, mixed, num_train_epochs=2, per_device_train_batch_size=8)
    run.data_collator = watching
    run.train()
    assert len(seen) == 2 * -(-len(mixed) // 8)
    flat = [sample for batch in seen for sample in batch]
    assert [sum(id(s["input_ids"]) in own for s in part) for part in (flat[: len(mixed)], flat[len(mixed) :])] == [
        60,
        60,
    ]
    assert [s["input_ids"].tolist() for s in flat[:8]] != [s["input_ids"].tolist() for s in flat[len(mixed) :][:8]]
    for begin in range(len(flat) - 8 + 1):
        tokens = [(int((s["labels"][1:] != -100).sum()), id(s["input_ids"]) in own) for s in flat[begin : begin + 8]]
        replayed = sum(count for count, is_new in tokens if not is_new)
        assert abs(replayed - 0.25 * sum(count for count, _ in tokens)) <= 1.5 * largest
    share = mixed.replayed_share()
    assert share == pytest.approx(0.25, abs=0.01)
    counts = mixed.counts(len(mixed))
    assert counts["replayed_tokens"] / (counts["new_tokens"] + counts["replayed_tokens"]) == pytest.approx(share)


def test_the_plan_names_its_sources_and_the_table_has_the_same_samples():
    new, buffer = samples(1, 10), filled()
    mixed = ours.ReplayDataset(new, buffer, ratio=0.3, seed=1, epochs=2)
    for (source, index), sample in zip(mixed.plan, mixed, strict=True):
        expected = new[index] if source == "new" else buffer.get(index)
        assert torch.equal(sample["input_ids"], expected["input_ids"])
    assert sorted(index for source, index in mixed.plan if source == "new") == list(range(10))
    table = mixed.to_datasets()
    assert len(table) == 2 * len(mixed)
    assert table[3]["labels"] == mixed[3]["labels"].tolist()
    mixed.set_epoch(1)
    assert table[len(mixed) + 3]["labels"] == mixed[3]["labels"].tolist()


# ---------------------------------------------------------------------- a run that is killed


class Killed(TrainerCallback):
    """Ends a run as a kill does: nothing after it is called."""

    def __init__(self, step, really=False):
        self.step, self.really = step, really

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and control.should_save is False:
            if self.really:
                os.kill(os.getpid(), signal.SIGKILL)
            raise SystemError("killed")


def sequence(folder, kill=None, resume=False, lora=False):
    """Two tasks with dropout, Adam, accumulation, replay, two penalties and a matrix; all objects are fresh."""
    network = model(attention_dropout=0.2) if not lora else adapted(attention_dropout=0.2)
    methods = [ours.EWC(strength="auto", samples=8), ours.Replay(ratio=0.25), ours.SI(strength=0.01, apply="proximal")]
    matrix = ours.TaskMatrix()

    def make_trainer(task):
        settings = {"optim": "adamw_torch", "learning_rate": 0.01, "lr_scheduler_type": "linear", "max_grad_norm": 1.0}
        saving = {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
        also = [Killed(*kill[1:])] if kill is not None and kill[0] == task.name else []
        return trainer(network, folder / task.name, task.train, also, **settings, **saving)

    tasks = [Task("a", samples(1, 24), val=samples(11)), Task("b", samples(2, 24), val=samples(12))]
    summary = ours.fit_tasks(make_trainer, tasks, [*methods, matrix], folder=folder, resume=resume)
    return weights(network), methods, matrix, summary


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return sequence(tmp_path_factory.mktemp("unbroken"))


@pytest.mark.parametrize("kill", [("a", 5), ("b", 3)], ids=str)
def test_a_killed_run_resumes_bit_for_bit(tmp_path, unbroken, kill):
    with pytest.raises(SystemError):
        sequence(tmp_path, kill)
    end, methods, matrix, summary = sequence(tmp_path, resume=True)
    expected, theirs, their_matrix, their_summary = unbroken
    assert all(torch.equal(end[name], expected[name]) for name in expected)
    for method, other in zip(methods[::2], theirs[::2], strict=True):
        assert all(torch.equal(method.importance[name], other.importance[name]) for name in other.importance)
    assert torch.equal(matrix.matrix, their_matrix.matrix)
    assert summary["average"] == their_summary["average"]


def killed_in_its_second_task(folder):
    """Runs in a process of its own, which gets SIGKILL in the middle of the second task."""
    sequence(Path(folder), ("b", 7, True))


def killed_while_it_writes(folder):
    """Resumes in another process, which gets SIGKILL when half of the callbacks' state is on the disk."""
    from lightning_cl.integrations._transformers import state_file

    whole = state_file.save_file

    def half(tensors, path, metadata):
        whole(tensors, path, metadata=metadata)
        if path.parent.name == "checkpoint-8" and path.parents[1].name == "b":
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    state_file.save_file = half
    sequence(Path(folder), resume=True)


def test_a_run_that_gets_sigkill_twice_resumes_bit_for_bit(tmp_path, unbroken):
    """Replay, EWC and SI: in the middle of the second task, and while the next checkpoint is written."""
    for kind in (killed_in_its_second_task, killed_while_it_writes):
        code = f"import test_transformers_trainer as t; t.{kind.__name__}({str(tmp_path)!r})"
        here = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
        done = forked.run("-c", code, env={**os.environ, "PYTHONPATH": here}, timeout=120)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    checkpoints = {path.name: path for path in (tmp_path / "b").glob("checkpoint-*")}
    assert (checkpoints["checkpoint-4"] / "continual.safetensors").is_file()
    assert not (checkpoints["checkpoint-8"] / "continual.safetensors").exists()
    end, methods, matrix, _ = sequence(tmp_path, resume=True)
    expected, theirs, their_matrix, _ = unbroken
    assert all(torch.equal(end[name], expected[name]) for name in expected)
    for method, other in zip(methods[::2], theirs[::2], strict=True):
        assert all(torch.equal(method.importance[name], other.importance[name]) for name in other.importance)
    assert torch.equal(matrix.matrix, their_matrix.matrix)
    buffers = [[b.get(n)["input_ids"].tolist() for n in b.numbers] for b in (methods[1].buffer, theirs[1].buffer)]
    assert buffers[0] == buffers[1]


def test_the_report_is_that_of_a_run_under_lightning(unbroken, tmp_path):
    _, methods, matrix, summary = unbroken
    assert matrix.tasks == ["a", "b"]
    assert matrix.matrix.shape == (3, 2)
    assert summary["mode"] == "min"
    report = matrix.last_report
    assert [cost["task"] for cost in report["costs"]["tasks"]] == ["a", "b"]
    second = report["costs"]["tasks"][1]
    assert second["replayed_tokens"] / (second["new_tokens"] + second["replayed_tokens"]) == pytest.approx(
        0.25, abs=0.03
    )
    assert set(report["methods"]) == {"EWC", "Replay", "SI"}
    assert report["methods"]["Replay"]["stored"] == {"a": 24, "b": 24}
    table = format_report(report, None)
    assert "eval_loss of every task after every task" in table
    assert len([line for line in table.splitlines() if line.strip().startswith(("a ", "b "))]) >= 2
    assert methods[0].report()["importance"][1]["task"] == "b"


def test_without_replay_the_report_counts_the_samples_too(tmp_path):
    network, matrix = model(), ours.TaskMatrix()
    tasks = [Task("a", samples(1, 10), val=samples(11)), Task("b", samples(2, 7), val=samples(12))]
    ours.fit_tasks(lambda task: trainer(network, tmp_path / task.name, task.train, []), tasks, [matrix])
    costs = matrix.last_report["costs"]["tasks"]
    assert [(cost["new_samples"], cost["replayed_samples"]) for cost in costs] == [(10, 0), (7, 0)]
    assert "10                 0" in format_report(matrix.last_report, None)


def test_a_checkpoint_without_the_callbacks_state_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    network = model()
    trainer(network, tmp_path, samples(1), [ours.EWC(strength=1.0, samples=4)], **saving).train()
    folder = tmp_path / "checkpoint-2"
    assert (folder / "continual.safetensors").is_file()
    with pytest.raises(ValueError, match=r"state of \['EWC'\], and the Trainer has \['SI'\]"):
        trainer(model(), tmp_path, samples(1), [ours.SI()], **saving).train(resume_from_checkpoint=str(folder))
    (folder / "continual.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"checkpoint-2.*no readable state"):
        trainer(model(), tmp_path, samples(1), [ours.EWC()], **saving).train(resume_from_checkpoint=str(folder))
    (folder / "continual.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-2.*resumes at step 2, and what EWC had learnt"):
        trainer(model(), tmp_path, samples(1), [ours.EWC()], **saving).train(resume_from_checkpoint=str(folder))


def test_a_resumed_plan_is_that_of_the_run(tmp_path):
    """Without fit_tasks the data set is made before the Trainer reads the checkpoint."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    network, replay = model(), ours.Replay(ratio=0.5)
    trainer(network, tmp_path / "a", samples(1), [replay]).train()
    trainer(network, tmp_path / "b", replay.mix(samples(2)), [replay], **saving).train()
    expected, folder = weights(network), tmp_path / "b" / "checkpoint-2"
    fresh = ours.Replay(ratio=0.5)
    with pytest.raises(ValueError, match=r"train_dataset: .*load_state"):
        trainer(model(), tmp_path / "b", fresh.mix(samples(2)), [fresh], **saving).train(
            resume_from_checkpoint=str(folder)
        )
    ours.load_state([fresh], folder)
    network = model()
    trainer(network, tmp_path / "b", fresh.mix(samples(2)), [fresh], **saving).train(resume_from_checkpoint=str(folder))
    assert all(torch.equal(value, expected[name]) for name, value in weights(network).items())


# ---------------------------------------------------------------------- adapters


def adapted(**settings):
    """The model with a LoRA adapter of peft; all but the adapter is frozen."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    network = get_peft_model(model(**settings), lora)
    for name, p in network.named_parameters():
        if "lora_" in name:  # neither factor is zero, and both have gradients worth the name
            torch.nn.init.normal_(p, 0.0, 0.3)
    return network


def empirical_fisher(network, data):
    """One sequence after another: Σ (∇ Σ_t log p)² / tokens, of the parameters that are trained."""
    total, tokens = {}, 0
    network.eval()
    for sample in data:
        count = int((sample["labels"][1:] != -100).sum())
        network.zero_grad()
        (network(**collate([sample])).loss * count).backward()
        for name, p in network.named_parameters():
            if p.requires_grad:
                total[name] = total.get(name, 0) + p.grad**2
        tokens += count
    network.zero_grad()
    return {name: value / tokens for name, value in total.items()}


def test_under_peft_the_adapter_alone_is_held_and_the_base_stays(tmp_path):
    network, new = adapted(), samples(2, 24)
    base = {name: p for name, p in weights(network).items() if "lora_" not in name}
    ewc = ours.EWC(strength=2000.0, estimator="empirical", samples=16, normalize=False)
    replay, plain, seen = ours.Replay(ratio=0.25), Gradients(), Gradients()
    trainer(network, tmp_path, replay.mix(samples(1), batch_size=4), [ewc, replay]).train()
    anchor = {name: p for name, p in weights(network).items() if "lora_" in name}
    fisher = empirical_fisher(network, samples(1))
    assert ewc.importance.keys() == ewc.anchor.keys() == {f"model.{name}" for name in anchor}
    for name, value in fisher.items():
        torch.testing.assert_close(ewc.importance[f"model.{name}"], value, rtol=1e-4, atol=1e-9)
        assert torch.equal(ewc.anchor[f"model.{name}"], anchor[name])
    mixed = replay.mix(new, batch_size=4)
    trainer(network, tmp_path, mixed, [plain, ewc, replay, seen], learning_rate=0.5).train()
    assert mixed.replayed_share() > 0.2
    shares = []
    for before, after in zip(plain.steps, seen.steps, strict=True):
        assert before.keys() == anchor.keys()
        for name, (theta, gradient) in before.items():
            penalty = 2000.0 * fisher[name] * (theta - anchor[name])
            shares.append(float(penalty.norm() / gradient.norm()))
            torch.testing.assert_close(after[name][1], gradient + penalty, rtol=1e-4, atol=1e-8)
    assert max(shares) > 0.01
    end = weights(network)
    assert all(torch.equal(end[name], value) for name, value in base.items())
    assert furthest(end, anchor) > 1e-3


def test_under_peft_a_killed_run_resumes_bit_for_bit(tmp_path):
    expected, theirs, _, _ = sequence(tmp_path / "unbroken", lora=True)
    with pytest.raises(SystemError):
        sequence(tmp_path / "killed", ("b", 7), lora=True)
    end, methods, _, _ = sequence(tmp_path / "killed", resume=True, lora=True)
    assert all(torch.equal(end[name], expected[name]) for name in expected)
    assert methods[0].importance.keys() == theirs[0].importance.keys()
    assert all("lora_" in name for name in methods[0].importance)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_sampling_strategy": "random"}, "train_sampling_strategy='random'.*sequential"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length"),
        ({"ignore_data_skip": True}, "ignore_data_skip=True"),
        ({"save_only_model": True, "save_strategy": "steps"}, "save_only_model=True"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
        ({"optim": "lomo"}, "optim='lomo'.*the penalty would do nothing"),
        ({"optim": "galore_adamw_layerwise"}, "optim='galore_adamw_layerwise'"),
    ],
    ids=str,
)
def test_settings_that_would_break_a_run_in_silence_are_refused(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        ours.continual_args(arguments(tmp_path, **settings))


def test_the_callbacks_check_their_trainer(tmp_path):
    ours.continual_args(arguments(tmp_path, train_sampling_strategy="random"), replay=False)
    mixed = ours.ReplayDataset(samples(1), filled())
    with pytest.raises(ValueError, match="train_sampling_strategy"):
        trainer(model(), tmp_path, mixed, [ours.SI()], train_sampling_strategy="random").train()
    with pytest.raises(ValueError, match=r"EWC\(last_task=False\)"):
        trainer(model(), tmp_path, samples(1), [ours.EWC(last_task=False)]).train()
    with pytest.raises(ValueError, match="draw='interfered'"):
        ours.Replay(draw="interfered")
    with pytest.raises(ValueError, match=r"expected those of lightning_cl\.integrations"):
        ours.fit_tasks(lambda task: None, [Task("a", samples(1))], [lightning_cl.EWC()])
    with pytest.raises(ValueError, match="another model"):
        ours.fit_tasks(
            lambda task: trainer(model(), tmp_path, task.train),
            [Task("a", samples(1, 4)), Task("b", samples(1, 4))],
        )


# ---------------------------------------------------------------------- TRL


def test_an_sft_trainer_reads_the_plan(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    mixed, seen = ours.ReplayDataset(samples(1, 10), filled(), ratio=0.3, seed=1), []
    settings = {key: getattr(arguments(tmp_path), key) for key in ("per_device_train_batch_size", "learning_rate")}
    args = trl.SFTConfig(
        str(tmp_path),
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        **settings,
    )

    def watching(batch):
        seen.extend(batch)
        tensors = [{key: torch.tensor(s[key]) for key in ("input_ids", "labels")} for s in batch]
        return collate(tensors)

    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w1", pad_token="w0"
    )
    network, penalty = model(), ours.SI(strength=0.01)
    run = trl.SFTTrainer(
        network,
        ours.continual_args(args),
        train_dataset=mixed.to_datasets(),
        data_collator=watching,
        processing_class=tokenizer,
        callbacks=[penalty],
    )
    run.args.num_train_epochs = 1
    run.train()
    assert [list(s["input_ids"]) for s in seen] == [s["input_ids"].tolist() for s in mixed]
    assert penalty.tasks_done == 1
    assert float(sum(value.sum() for value in penalty.importance.values())) > 0
    args.packing = True
    with pytest.raises(ValueError, match="packing=True"):
        ours.continual_args(args)


def test_short_names_on_the_command_line_are_those_of_lightning():
    """These classes are callbacks of Lightning too; jsonargparse refuses a short name that two classes answer to."""
    from jsonargparse import ArgumentParser
    from lightning.pytorch.callbacks import Callback

    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    for name in ours.__all__:
        if isinstance(getattr(ours, name), type) and issubclass(getattr(ours, name), Callback):
            read = parser.parse_args([f"--callbacks+={name}"])
            assert read.callbacks[0].class_path == f"lightning_cl.{name}"
