"""Rehearsal of what the model writes: by whom it is written, what of it is learnt, and how it survives a stop."""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
from pathlib import Path

import forked
import lightning as L
import pytest
import torch
import yaml
from distilling import Recorder, assert_gradients, lm_reference
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regularized import MASKED, Sequences, SomebodysLM
from stand_in import chats, save_stand_in, sentence
from starting import puts_in_front
from torch.utils.data import DataLoader
from toys import TINY_LLAMA, Classifier, classification, trainer
from transformers import AutoTokenizer

from lightning_cl import CausalLM, DERpp, GeneralReplay, LwF, Replay, TaskDataModule, fit_tasks
from lightning_cl.callbacks.replay import sample_writer
from lightning_cl.callbacks.replay.rehearsal import Prompt, as_sample, choose
from lightning_cl.callbacks.replay.rehearsal_prompts import start_of_text
from lightning_cl.callbacks.replay.self_replay import SelfReplay
from lightning_cl.core.coordinator import TaskCoordinator
from lightning_cl.data import TrainedBPE
from lightning_cl.data.mixing.plan import seed_of
from lightning_cl.passes.generation import prompt_tokens, sample_tokens

pytestmark = pytest.mark.filterwarnings("ignore")
VOCABULARY = 300
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TrainedBPE(VOCABULARY, str(tmp_path_factory.mktemp("bpe"))).train([sentence(i) for i in range(30)])


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_stand_in(tmp_path_factory.mktemp("chat")))


def writer(kind=SomebodysLM, **settings):
    """Somebody's language model, of an assured tone: random weights, and far from uniform predictions."""
    torch.manual_seed(0)
    return kind(**{"tie": False, "lr": 1e-3, "vocab_size": VOCABULARY, "initializer_range": 0.7} | settings)


def texts(name: str, count: int = 24) -> list[str]:
    return [f"{name} {sentence(i)}" for i in range(count)]


def self_replay(**settings):
    return SelfReplay(**{"samples": 20, "ratio": 0.3, "max_new_tokens": 10, "batch_size": 6} | settings)


class Watch(Callback):
    """What each task starts from, its batches, which of their rows are replayed, and the samples to be rehearsed."""

    def __init__(self, method):
        self.method = method
        self.models, self.batches, self.kinds, self.samples = [], [], [], []

    def on_train_start(self, trainer, pl_module):
        self.models.append(copy.deepcopy(pl_module.model))
        self.samples.append([(s, t) for s, t in zip(self.method.buffer.items, self.method.buffer.tasks, strict=True)])
        self.batches.append([])
        self.kinds.append([])

    def on_before_backward(self, trainer, pl_module, loss):
        self.kinds[-1].append(TaskCoordinator.of(trainer).kinds)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches[-1].append(copy.deepcopy(batch))


def run(root, method, tokenizer, tasks=None, module=None, ckpt_path=None, callbacks=(), data=None, **settings):
    tasks = {"a": texts("a"), "b": texts("b")} if tasks is None else tasks
    module, watch = module or writer(), Watch(method)
    made = TaskDataModule(tasks, tokenizer, **{"max_length": 48, "batch_size": 4, "val_fraction": 0.1} | (data or {}))
    torch.manual_seed(1)
    fit_tasks(trainer(root, [method, watch, *callbacks], **{"max_epochs": 1} | settings), module, made, ckpt_path)
    return module, watch


def same(one, other):
    return [(s["input_ids"].tolist(), s["loss_mask"].tolist(), t) for s, t in one] == [
        (s["input_ids"].tolist(), s["loss_mask"].tolist(), t) for s, t in other
    ]


# ---------------------------------------------------------------------- by whom, and what


def free_texts(model, tokenizer, task, beginnings=(), count=20):
    """What the model of a task's start writes from the start of a text and from beginnings, one by one."""
    start, end = start_of_text(tokenizer), tokenizer.eos_token_id
    prompts = [start] * (count // 2 if beginnings else count)
    order = random.Random(seed_of(0, task)).sample(beginnings, len(beginnings)) if beginnings else []
    for place in range(count - len(prompts)):
        prompts.append(Prompt(tuple(order[place % len(order)]), "self:a", learnt=True))
    seeds = [seed_of(0, task, 1, row) for row in range(count)]
    written = [
        sample_tokens(model, [prompt.ids], 10, end, [seed], 1.0, 0.95, [end])[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    chosen, rejected = choose(prompts, written, 4, VOCABULARY)
    return [(as_sample(prompts[place], written[place]), prompts[place].task) for place in chosen], rejected


@pytest.mark.parametrize("start_token", [False, True])
def test_before_each_task_the_model_of_that_time_writes(tmp_path, tokenizer, start_token):
    method = self_replay()
    if start_token:
        tokenizer = copy.deepcopy(tokenizer)
        puts_in_front(tokenizer, tokenizer.convert_ids_to_tokens(7))
    _, watch = run(tmp_path, method, tokenizer)
    for task in (0, 1):
        # Without a start token, half of the second task's go on from first tokens of the first one.
        kept = method.beginnings["a"] if task and not start_token else []
        expected, rejected = free_texts(watch.models[task], tokenizer, task, kept)
        assert len(expected) >= 10
        assert same(watch.samples[task], expected)
        assert method.written["ab"[task]]["rejected"] == rejected
    assert not same(watch.samples[0], watch.samples[1])
    assert bool(method.beginnings) != start_token


def test_first_tokens_are_those_of_samples(tmp_path, tokenizer):
    method = self_replay(samples=9)
    tasks = {"a": [*texts("x", 30), *texts("y", 30)], "b": texts("z")}
    _, watch = run(tmp_path, method, tokenizer, tasks)
    x, y, z = (tokenizer(name)["input_ids"][:1] for name in "xyz")
    assert sorted(map(tuple, method.beginnings["a"])) not in ([tuple(x)] * 9, [tuple(y)] * 9)
    assert all(ids in (x, y) for ids in method.beginnings["a"])
    assert len(method.beginnings["a"]) == 9
    assert all(ids == z for ids in method.beginnings["b"])
    begun = [sample for sample, task in watch.samples[1] if task == "self:a"]
    assert len(begun) >= 2
    assert all(sample["input_ids"][:1].tolist() in (x, y) for sample in begun)
    assert all(sample["loss_mask"].all() for sample in begun)


def test_loss_is_on_all_of_a_free_text(tmp_path, tokenizer):
    method = self_replay()
    _, watch = run(tmp_path, method, tokenizer)
    endings = 0
    for sample, task in watch.samples[0]:
        assert task == "self"
        assert sample["loss_mask"].all()
        ids = sample["input_ids"].tolist()
        assert tokenizer.eos_token_id not in ids[:-1]  # nor in front: it ended another text
        endings += ids[-1] == tokenizer.eos_token_id
        assert 4 <= len(ids) <= 10
    assert method.written["a"]["tokens"] >= sum(len(s["input_ids"]) for s, _ in watch.samples[0])


def test_rehearsed_samples_have_their_share_and_are_told_from_new_ones(tmp_path, tokenizer):
    method = self_replay(ratio=0.3)
    _, watch = run(tmp_path, method, tokenizer, tasks={"a": texts("a", 60), "b": texts("b", 60)}, max_epochs=2)
    for task in (0, 1):
        stored = [sample["input_ids"].tolist() for sample, _ in watch.samples[task]]
        rehearsed = new = 0
        for batch, kinds in zip(watch.batches[task], watch.kinds[task], strict=True):
            for ids, labels, (part,) in zip(batch["input_ids"], batch["labels"], kinds, strict=True):
                tokens = int((labels[1:] != -100).sum())
                rehearsed, new = (rehearsed + tokens, new) if part.replayed else (rehearsed, new + tokens)
                known = ids[labels != -100].tolist()
                assert (known in stored) == part.replayed
                assert not part.replayed or part.owner is method.buffer
        assert rehearsed / (rehearsed + new) == pytest.approx(0.3, abs=0.02)


def test_an_instruction_is_asked_in_the_template_and_its_answer_learnt(tmp_path, chat_tokenizer):
    tokenizer, asked = chat_tokenizer, [sentence(1), sentence(2), sentence(3)]
    method = self_replay(prompts=asked, samples=9)
    module = writer(vocab_size=len(tokenizer))
    _, watch = run(tmp_path, method, tokenizer, {"a": chats(12), "b": chats(12, 20)}, module, data={"max_length": 128})
    prompts = [prompt_tokens(tokenizer, text, chat=True) for text in asked]
    for samples in watch.samples:
        assert len(samples) >= 6
        used = []
        for sample, _ in samples:
            ids, learnt = sample["input_ids"].tolist(), int(sample["loss_mask"].sum())
            assert not sample["loss_mask"][: len(ids) - learnt].any()
            used.append(prompts.index(ids[: len(ids) - learnt]))
            assert tokenizer.eos_token_id not in ids[len(ids) - learnt : -1]
        assert max(map(used.count, used)) <= 3  # in turn


def test_without_a_template_a_prompt_is_a_text_to_continue(tmp_path, tokenizer):
    method = self_replay(prompts=["the quick", "a lazy dog"])
    _, watch = run(tmp_path, method, tokenizer)
    prompts = [tokenizer(text)["input_ids"] for text in method.prompts]
    for sample, _ in watch.samples[0]:
        given = sample["input_ids"][~sample["loss_mask"]].tolist()
        assert given in prompts
        assert sample["input_ids"][: len(given)].tolist() == given
        assert sample["loss_mask"][len(given) :].all()


class Chatty(SomebodysLM):
    """Whatever it is asked, it says a few words and ends its turn."""

    def __init__(self, tokenizer, said):
        super().__init__(tie=False, lr=1e-3, vocab_size=len(tokenizer))
        end = tokenizer.eos_token_id
        chosen = torch.tensor(sorted({id for text in said for id in tokenizer(text)["input_ids"]}))

        def head(hidden):
            logits = torch.full((*hidden.shape[:-1], len(tokenizer)), -20.0)
            logits[..., chosen] = 0.0
            logits[..., end] = 0.5
            return logits + 0.0 * hidden.sum(-1, keepdim=True)

        self.model.lm_head.forward = head


def test_with_the_template_alone_the_model_asks_itself(tmp_path, chat_tokenizer):
    """Magpie: instructions are its own, as the template writes them, and bear no loss."""
    tokenizer = chat_tokenizer
    method = self_replay(samples=60, max_new_tokens=12, min_new_tokens=2)
    module = Chatty(tokenizer, [sentence(i) for i in range(9)])
    _, watch = run(tmp_path, method, tokenizer, {"a": chats(12)}, module, data={"max_length": 128})
    samples = [sample for sample, _ in watch.samples[0]]
    instructions = set()
    for sample in samples:
        learnt = int(sample["loss_mask"].sum())
        assert sample["loss_mask"][-learnt:].all()
        asked, answer = (
            tokenizer.decode(part) for part in sample["input_ids"].split([len(sample["input_ids"]) - learnt, learnt])
        )
        assert asked.startswith("<|im_start|>user\n")
        assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n")
        words = asked[len("<|im_start|>user\n") : -len("<|im_end|>\n<|im_start|>assistant\n")]
        assert asked == tokenizer.decode(prompt_tokens(tokenizer, words, chat=True))
        assert "<|" not in words
        assert words.strip()
        assert "<|" not in answer.removesuffix("<|im_end|>")
        instructions.add(words)
    counts = method.written["a"]
    assert len(instructions) == len(samples) >= 10
    assert counts["rejected"]["unfinished"] > 0
    assert counts["kept"] + sum(counts["rejected"].values()) == counts["written"] == 60


def test_a_model_that_asks_nothing_rehearses_nothing_and_says_so(tmp_path, chat_tokenizer):
    module = Chatty(chat_tokenizer, [sentence(i) for i in range(9)])
    method = self_replay(max_new_tokens=4)  # no turn that is so short
    with pytest.warns(UserWarning, match="0 of 20 texts kept .*nothing is rehearsed"):
        run(tmp_path, method, chat_tokenizer, {"a": chats(12)}, module, data={"max_length": 128})
    assert method.written["a"]["kept"] == 0


def test_beside_stored_samples_each_has_its_share(tmp_path, tokenizer):
    method, replay = self_replay(ratio=0.2), Replay(100, 0.3)
    tasks = {"a": texts("a", 60), "b": texts("b", 60)}
    _, watch = run(tmp_path, method, tokenizer, tasks, callbacks=[replay], max_epochs=2)
    tokens = {None: 0, id(method.buffer): 0, id(replay.buffer): 0}
    for batch, kinds in zip(watch.batches[1], watch.kinds[1], strict=True):
        for labels, (part,) in zip(batch["labels"], kinds, strict=True):
            tokens[id(part.owner) if part.replayed else None] += int((labels[1:] != -100).sum())
    total = sum(tokens.values())
    assert tokens[id(method.buffer)] / total == pytest.approx(0.2, abs=0.02)
    assert tokens[id(replay.buffer)] / total == pytest.approx(0.3, abs=0.02)


def test_beginnings_of_earlier_tasks_are_continued(tmp_path, tokenizer):
    method = self_replay(examples=3, samples=21)
    tasks = {name: texts(name) for name in "abc"}
    _, watch = run(tmp_path, method, tokenizer, tasks, data={"max_length": 40})
    assert {name: len(kept) for name, kept in method.beginnings.items()} == {"a": 3, "b": 3, "c": 3}
    data = TaskDataModule(tasks, tokenizer, max_length=40, val_fraction=0.1)
    data.setup()
    for name, kept in method.beginnings.items():
        trained = [sample["input_ids"].tolist() for sample in data.train_loader(data.tasks["abc".index(name)]).dataset]
        for ids in kept:
            assert any(ids == whole[: len(ids)] for whole in trained)
            assert len(ids) <= 32
    for task, samples in enumerate(watch.samples):
        names = [stored for _, stored in samples]
        assert set(names) == {"self", *(f"self:{name}" for name in "abc"[:task])}
        for sample, stored in samples:
            if stored != "self":
                given = sample["input_ids"][~sample["loss_mask"]].tolist()
                assert given in method.beginnings[stored.removeprefix("self:")]
                assert sample["loss_mask"][len(given) :].all()
                assert len(sample["input_ids"]) <= 40
    # Equal shares for the tasks, and for what is written from nothing.
    counts = [[stored for _, stored in watch.samples[2]].count(name) for name in ("self", "self:a", "self:b")]
    assert max(counts) <= 7


def test_the_beginnings_of_conversations_end_where_the_last_answer_begins(tmp_path, chat_tokenizer):
    tokenizer = chat_tokenizer
    method = self_replay(examples=4, prompts=[sentence(0)])
    module = writer(vocab_size=len(tokenizer))
    run(tmp_path, method, tokenizer, {"a": chats(12), "b": chats(12, 20)}, module, data={"max_length": 128})
    known = [
        tokenizer.apply_chat_template(chat["messages"][:3], tokenize=False, add_generation_prompt=True)
        for chat in chats(12)
    ]
    assert all(tokenizer.decode(ids) in known for ids in method.beginnings["a"])


def test_packed_with_new_samples(tmp_path, tokenizer):
    method = self_replay(ratio=0.4)
    _, watch = run(tmp_path, method, tokenizer, data={"packing": True})
    stored = [sample["input_ids"].tolist() for sample, _ in watch.samples[0]]
    found = 0
    for batch, kinds in zip(watch.batches[0], watch.kinds[0], strict=True):
        for ids, parts in zip(batch["input_ids"].tolist(), kinds, strict=True):
            start = 0
            for part in parts:
                assert (ids[start : start + part.length] in stored) == part.replayed
                found += part.replayed
                start += part.length
    assert found > 5


def test_a_model_with_an_adapter_writes_with_it(tmp_path):
    folder = save_stand_in(tmp_path / "model", initializer_range=0.7, tie_word_embeddings=False)
    module = CausalLM(folder, lora={"r": 2, "init_lora_weights": False})
    method, (end,) = (
        self_replay(prompts=["the"], samples=6),
        AutoTokenizer.from_pretrained(folder)("<|im_end|>")["input_ids"],
    )

    class Again(Callback):
        def on_train_start(self, trainer, pl_module):
            tokenizer = trainer.datamodule.tokenizer
            prompts = [prompt_tokens(tokenizer, "the", chat=True)] * 6
            seeds = [seed_of(0, 0, 1, row) for row in range(6)]
            with_it = sample_tokens(pl_module.lm, prompts, 10, end, seeds, 1.0, 0.95, [end])
            with pl_module.lm.disable_adapter():
                without = sample_tokens(pl_module.lm, prompts, 10, end, seeds, 1.0, 0.95, [end])
            stored = [sample["input_ids"][len(prompts[0]) :].tolist() for sample in method.buffer.items]
            assert stored
            assert all(ids in [text.ids for text in with_it] for ids in stored)
            assert not any(ids in [text.ids for text in without] for ids in stored)

    data = TaskDataModule({"a": chats(8)}, tokenizer=folder, max_length=128, batch_size=4)
    fit_tasks(trainer(tmp_path, [method, Again()], max_epochs=1), module, data)


# ---------------------------------------------------------------------- beside other callbacks


def settings_of(overlay):
    callbacks = yaml.safe_load((CONFIGS / "methods" / overlay).read_text())["trainer"]["callbacks+"]
    return {callback["class_path"].rsplit(".")[-1]: callback["init_args"] for callback in callbacks}


def test_what_the_model_wrote_is_held_to_the_base(tmp_path, tokenizer):
    """The shipped overlay: each step's gradient is that of the loss and of the KL to the base on the rehearsed rows."""
    shipped = settings_of("self_replay_to_base.yaml")
    method = SelfReplay(**shipped["SelfReplay"] | {"samples": 20, "max_new_tokens": 10, "batch_size": 10})
    recorder, lwf = Recorder(), LwF(**shipped["LwF"])
    module = writer(lr=1e-2)
    _, watch = run(tmp_path, method, tokenizer, module=module, callbacks=[lwf, recorder], log_every_n_steps=1)
    module.trainer = None
    for steps, kinds in zip(recorder.steps, watch.kinds, strict=True):
        replayed = [torch.tensor([part.replayed for (part,) in step]) for step in kinds]

        def check(flip=False, steps=steps, replayed=replayed):
            rows = iter(replayed)

            def mask(batch):
                bearing = batch["labels"][:, 1:] != -100
                return (next(rows) ^ flip)[:, None].expand(bearing.shape)[bearing]

            assert_gradients(steps, lm_reference(module, temperature=1.0), recorder.starts[0], mask, error=1e-3)

        check()
        with pytest.raises(AssertionError, match="off by"):
            check(flip=True)
        assert 0.1 < torch.cat(replayed).float().mean() < 0.9
    assert all(lwf.report()["divergence"][task] > 0 for task in "ab")


def test_kl_on_texts_of_the_base_is_the_kl_of_its_texts():
    """Against all texts there are, one by one: with uncut probabilities the mean of Σ_t KL_t is KL(base ‖ now)."""
    base, now = (writer(vocab_size=5, initializer_range=scale).model.eval() for scale in (0.5, 0.7))
    base.generation_config.eos_token_id = None  # all texts are of one length
    start, length = 4, 3

    @torch.no_grad()
    def log_probabilities(model, ids):
        return model(ids).logits.log_softmax(-1)[:, :-1]

    every = torch.tensor([[start, *text] for text in itertools.product(range(5), repeat=length)])
    p, q = (log_probabilities(m, every).gather(-1, every[:, 1:, None])[..., 0].sum(-1).double() for m in (base, now))
    exact = float((p.exp() * (p - q)).sum())
    found = {}
    for top_p in (1.0, 0.8):
        drawn = sample_tokens(base, [[start]] * 2000, length, 0, range(2000), 1.0, top_p)
        ids = torch.tensor([[start, *text.ids] for text in drawn])
        p, q = log_probabilities(base, ids), log_probabilities(now, ids)
        sums = (p.exp() * (p - q)).sum(-1).sum(-1)
        found[top_p] = abs(float(sums.mean()) - exact) / float(sums.std() / len(sums) ** 0.5)
    assert found[1.0] < 3  # standard errors
    assert found[0.8] > 6


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([Replay(20, 0.5)], r"(Replay and SelfReplay|SelfReplay and Replay): ratio.* add up to 1\.1"),
        ([Replay(20, 0.1, mode="add")], r"mode: .*SelfReplay\(mode='replace'\)"),
        ([DERpp(20, [[0, 0.1], [1, 0.4]])], r"add up to 1;"),
        ([GeneralReplay(["the quick brown fox"] * 9, 0.2), Replay(20, "1/t")], r"add up to 1\.3"),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_shares_and_modes_that_do_not_fit_are_found_before_anything_is_written(
    tmp_path, tokenizer, monkeypatch, others, message, first
):
    calls, method = counted(monkeypatch), self_replay(ratio=0.6)
    callbacks = [method, *others] if first else [*others, method]
    data = TaskDataModule({"a": texts("a"), "b": texts("b")}, tokenizer, max_length=48, batch_size=4)
    with pytest.raises(MisconfigurationException, match=message):
        fit_tasks(trainer(tmp_path, callbacks, max_epochs=1), writer(), data)
    assert not calls


def test_what_rehearses_nothing_is_in_nobodys_way(tmp_path, tokenizer):
    """With a ratio of 0 neither its mode nor its share counts, and it is no replay."""
    method = self_replay(ratio=0.0)
    run(tmp_path, method, tokenizer, callbacks=[Replay(20, 0.3, mode="add")])
    assert len(method.buffer) >= 10
    with pytest.raises(MisconfigurationException, match=r"where='replayed'.*nothing is replayed"):
        run(tmp_path, self_replay(ratio=0.0), tokenizer, callbacks=[LwF(where="replayed")])


# ---------------------------------------------------------------------- leaves no trace


def test_ratio_zero_is_training_without_it_bit_for_bit(tmp_path, tokenizer):
    def weights(callbacks):
        module = writer(attention_dropout=0.3)
        torch.manual_seed(1)
        data = TaskDataModule({"a": texts("a"), "b": texts("b")}, tokenizer, max_length=48, batch_size=4)
        fit_tasks(trainer(tmp_path, callbacks, max_epochs=1), module, data)
        return module.state_dict(), torch.rand(3)

    method = self_replay(ratio=0.0)
    (plain, after), (with_it, after_it) = weights([]), weights([method])
    assert all(torch.equal(value, with_it[name]) for name, value in plain.items())
    assert torch.equal(after, after_it)
    assert len(method.buffer) >= 10  # for others, that share it


@pytest.mark.parametrize("shuffle", [True, False])
def test_ratio_zero_in_a_plain_fit_too(tmp_path, tokenizer, shuffle):
    def weights(callbacks):
        module = writer(attention_dropout=0.3)
        module.tokenizer = tokenizer
        data = TaskDataModule({"a": texts("a")}, tokenizer, max_length=48)
        data.setup()
        tokens = data.train_loader(data.tasks[0])
        torch.manual_seed(1)
        loader = DataLoader(tokens.dataset, 4, shuffle=shuffle, collate_fn=tokens.collate_fn)
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, loader)
        return module.state_dict()

    method = self_replay(ratio=0.0)
    plain, with_it = weights([]), weights([method])
    assert all(torch.equal(value, with_it[name]) for name, value in plain.items())
    assert len(method.buffer) >= 10


def test_each_plain_fit_rehearses_what_its_own_model_writes(tmp_path, tokenizer):
    method = self_replay()
    watch, module = Watch(method), writer()
    module.tokenizer = tokenizer
    for name in "ab":
        data = TaskDataModule({name: texts(name)}, tokenizer, max_length=48, batch_size=4)
        trainer(tmp_path, [method, watch], max_epochs=1).fit(module, datamodule=data)
    for task in (0, 1):
        kept = method.beginnings["task-0"] if task else []
        expected = [
            (sample, stored.replace(":a", ":task-0"))
            for sample, stored in free_texts(watch.models[task], tokenizer, task, kept)[0]
        ]
        assert same(watch.samples[task], expected)
    assert list(method.written) == ["task-0", "task-1"]


def test_a_model_that_has_learnt_nothing_rehearses_nothing(tmp_path, tokenizer):
    """What a scratch model writes is noise: it trains as without."""

    def weights(callbacks):
        torch.manual_seed(0)
        module = CausalLM(TINY_LLAMA)
        data = TaskDataModule({"a": texts("a")}, tokenizer, max_length=48, batch_size=4)
        fit_tasks(trainer(tmp_path, callbacks, max_epochs=1), module, data)
        return module.state_dict()

    method = self_replay()
    plain, with_it = weights([]), weights([method])
    assert all(torch.equal(value, with_it[name]) for name, value in plain.items())
    counts = method.written["a"]
    assert counts["kept"] == 0
    assert counts["rejected"]["noise"] + counts["rejected"].get("short", 0) == 20


def test_once_for_each_task_also_where_the_loader_is_built_again(tmp_path, tokenizer, monkeypatch):
    calls = counted(monkeypatch)
    run(tmp_path, self_replay(), tokenizer, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert len(calls) == 2 * 4


def test_what_was_removed_is_not_stored_again(tmp_path, tokenizer):
    method = self_replay()
    _, watch = run(tmp_path / "1", method, tokenizer, {"a": texts("a")})
    secret = watch.samples[0][3][0]["input_ids"].tolist()
    assert method.buffer.remove(lambda stored: stored.sample["input_ids"].tolist() == secret) == 1
    method._written_for = None
    method.tasks_done = 0
    _, watch = run(tmp_path / "2", method, tokenizer, {"a": texts("a")})
    assert method.written["a"]["rejected"]["removed"] == 1
    assert secret not in [sample["input_ids"].tolist() for sample, _ in watch.samples[0]]


# ---------------------------------------------------------------------- stopped, and gone on


def counted(monkeypatch, stop_after=None):
    """Counts the batches that are written; stops with an exception in the one after so many."""
    calls = []

    def counting(*args, **settings):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(args)
        return sample_tokens(*args, **settings)

    monkeypatch.setattr(sample_writer, "sample_tokens", counting)
    return calls


def stopped(tmp_path, tokenizer, **settings):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path / "stopped", self_replay(**settings), tokenizer)


def test_writing_goes_on_where_it_was_stopped(tmp_path, tokenizer, monkeypatch):
    whole = self_replay()
    _, watch = run(tmp_path / "whole", whole, tokenizer, {"a": texts("a")})
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "other"))
    counted(monkeypatch, stop_after=2)
    stopped(tmp_path, tokenizer)
    calls = counted(monkeypatch)
    method = self_replay()
    _, again = run(tmp_path / "again", method, tokenizer, {"a": texts("a")})
    assert len(calls) == 2  # of four batches
    assert same(watch.samples[0], again.samples[0])
    assert counts_of(method) == counts_of(whole)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace("ids", "odds"),
        lambda text: json.dumps(json.loads(text)[1:]),
        lambda text: json.dumps([{**one, "ids": ["a"]} for one in json.loads(text)]),
    ],
)
def test_a_damaged_file_is_named_and_made_again(tmp_path, tokenizer, cache, monkeypatch, damage):
    _, watch = run(tmp_path / "whole", self_replay(), tokenizer, {"a": texts("a")})
    files = sorted(cache.glob("rehearsal/*/*.json"))
    assert [file.name for file in files] == ["0.json", "1.json", "2.json", "3.json"]
    files[1].write_text(damage(files[1].read_text()))
    calls = counted(monkeypatch)
    with pytest.warns(UserWarning, match=r"1\.json: a damaged file"):
        _, again = run(tmp_path / "again", self_replay(), tokenizer, {"a": texts("a")})
    assert len(calls) == 1
    assert same(watch.samples[0], again.samples[0])


@pytest.mark.parametrize(
    "changed",
    [{"temperature": 1.1}, {"top_p": 0.9}, {"seed": 1}, {"prompts": ["the"]}, {"max_new_tokens": 9}, {"batch_size": 5}],
    ids=str,
)
def test_other_settings_do_not_read_what_these_have_written(tmp_path, tokenizer, monkeypatch, changed):
    run(tmp_path, self_replay(), tokenizer, {"a": texts("a")})
    calls = counted(monkeypatch)
    run(tmp_path, self_replay(**changed), tokenizer, {"a": texts("a")})
    assert len(calls) == 4
    run(tmp_path, self_replay(), tokenizer, {"a": texts("a")})
    assert len(calls) == 4


def test_other_weights_do_not_read_what_these_have_written(tmp_path, tokenizer, monkeypatch):
    run(tmp_path, self_replay(), tokenizer, {"a": texts("a")})
    module = writer()
    with torch.no_grad():
        module.model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    calls = counted(monkeypatch)
    run(tmp_path, self_replay(), tokenizer, {"a": texts("a")}, module)
    assert len(calls) == 4


def test_a_full_disk_is_a_warning(tmp_path, tokenizer, monkeypatch):
    _, watch = run(tmp_path / "whole", self_replay(), tokenizer, {"a": texts("a")})
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "other"))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample_writer, "replace_file", full)
    with pytest.warns(UserWarning, match="rehearsal samples cannot be kept there"):
        _, again = run(tmp_path / "again", self_replay(), tokenizer, {"a": texts("a")})
    assert same(watch.samples[0], again.samples[0])


class LooksAhead(SomebodysLM):
    """Reads the number of steps to come, for which Lightning builds the loader early."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_resume_from_every_checkpoint_equals_never_stopped(tmp_path, tokenizer, monkeypatch):
    def start(root, ckpt_path=None):
        checkpoint = ModelCheckpoint(every_n_train_steps=5, save_top_k=-1, filename="{step}")
        method = self_replay(examples=2)
        module, _ = run(
            root, method, tokenizer, None, writer(LooksAhead, attention_dropout=0.3), ckpt_path, [checkpoint]
        )
        return module.state_dict(), method

    weights, method = start(tmp_path / "whole")
    checkpoints = sorted((tmp_path / "whole").rglob("*.ckpt"))
    assert len(checkpoints) >= 5
    for number, path in enumerate(checkpoints):
        state = torch.load(path, weights_only=True)["lightning_cl"]
        # Nothing that was written helps: not what is in the cache.
        monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / f"cache-{number}"))
        calls = counted(monkeypatch)
        again, theirs = start(tmp_path / f"again-{number}", path)
        assert all(torch.equal(value, again[name]) for name, value in weights.items()), path
        assert same(*(list(zip(m.buffer.items, m.buffer.tasks, strict=True)) for m in (method, theirs)))
        assert theirs.beginnings == method.beginnings
        # Inside a task its samples are in the checkpoint.
        tasks_left = 2 - state["index"]
        assert len(calls) == 4 * (tasks_left - 1 if state["started"] else tasks_left)


# ---------------------------------------------------------------------- ranks

SCRIPT = """
import os, sys, warnings
sys.path[:0] = {paths!r}
warnings.simplefilter("ignore")
import torch, test_self_replay as t
from pytest import MonkeyPatch
from lightning_cl.data import TrainedBPE
out = sys.argv[1]
calls, method = t.counted(MonkeyPatch()), t.self_replay(examples=2)
tokenizer = TrainedBPE(t.VOCABULARY, out).train([t.sentence(i) for i in range(30)])
_, watch = t.run(out, method, tokenizer, data={{"batch_size": 2}}, strategy="ddp", devices=2)
found = {{
    "samples": watch.samples,
    "counts": t.counts_of(method),
    "beginnings": method.beginnings,
    "calls": [len(call[1]) for call in calls],
}}
torch.save(found, out + "/rank" + os.environ["LOCAL_RANK"] + ".pt")
"""


def test_ranks_share_the_writing_and_hold_the_same_samples_as_one_process(tmp_path, tokenizer, monkeypatch):
    calls, method = counted(monkeypatch), self_replay(examples=2)
    _, one = run(tmp_path, method, tokenizer)
    folder, script = Path(__file__).parent, tmp_path / "script.py"
    script.write_text(SCRIPT.format(paths=[str(folder), str(folder.parent), str(folder.parents[1])]))
    forked.run_ranks(2, script, tmp_path, env=os.environ | {"LIGHTNING_CL_CACHE": str(tmp_path / "other")})
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    # Of the first task those of one process, whose rounding differs after training; of both the same on both ranks.
    assert same(one.samples[0], first["samples"][0])
    assert counts_of(method)["a"] == first["counts"]["a"]
    assert all(same(*parts) for parts in zip(first["samples"], second["samples"], strict=True))
    assert all(first[what] == second[what] for what in ("counts", "beginnings"))
    assert [len(call[1]) for call in calls] == [6, 6, 6, 2] * 2
    assert first["calls"] == [6, 6] * 2
    assert second["calls"] == [6, 2] * 2


def counts_of(method):
    """All that was counted, but for the time it took."""
    return {name: {**counts, "seconds": 0} for name, counts in method.written.items()}


# ---------------------------------------------------------------------- report, preflight


def test_the_report_counts_what_was_written(tmp_path, tokenizer):
    method = self_replay()
    run(tmp_path, method, tokenizer)
    report = method.report()
    for name in "ab":
        counts = report["tasks"][name]
        assert counts["written"] == 20
        assert counts["kept"] + sum(counts["rejected"].values()) == 20
        assert counts["kept"] <= counts["tokens"] <= 20 * 10
        assert counts["seconds"] > 0
    assert len(report["sentences"]) == 2
    assert set(report["stored"]) == {"self", "self:a"}
    assert sum(report["stored"].values()) == report["tasks"]["b"]["kept"]
    assert method.state_bytes() > 0
    json.dumps(report)


def test_a_preflight_writes_one_batch(tmp_path, tokenizer, monkeypatch):
    calls = counted(monkeypatch)
    run(tmp_path, self_replay(), tokenizer, fast_dev_run=True)
    assert [len(call[1]) for call in calls] == [6, 6]


# ---------------------------------------------------------------------- errors before any training


@pytest.mark.parametrize(
    "settings",
    [
        {"samples": 0},
        {"samples": True},
        {"ratio": 1.0},
        {"ratio": -0.1},
        {"examples": -1},
        {"max_new_tokens": 0},
        {"min_new_tokens": 0},
        {"min_new_tokens": 300},
        {"temperature": 0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"batch_size": 2.5},
        {"mode": "append"},
        {"seed": "x"},
        {"prompts": []},
    ],
    ids=str,
)
def test_a_wrong_argument_is_named_with_its_value(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}".replace("[", r"\[").replace("]", r"\]")):
        SelfReplay(**settings)


class Silent(L.LightningModule):
    """A module of which nothing writes."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return self.weight**2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_that_cannot_write_is_named(tmp_path, tokenizer):
    module = Silent()
    data = TaskDataModule({"a": texts("a")}, tokenizer, max_length=48)
    with pytest.raises(MisconfigurationException, match=r"nothing in Silent can write text: it needs a transformers"):
        fit_tasks(trainer(tmp_path, [self_replay()], max_epochs=1), module, data)
    assert module.steps == 0


def test_data_that_is_no_text_is_named(tmp_path, tokenizer):
    with pytest.raises(
        MisconfigurationException, match=r"sample of task 'a' holds tuple; it has to stand in one batch"
    ):
        fit_tasks(trainer(tmp_path, [self_replay()], max_epochs=1), Classifier(), {"a": DataLoader(classification(0))})
    with pytest.raises(MisconfigurationException, match=r"holds the keys \['attention_mask', 'input_ids', 'labels'\]"):
        fit_tasks(trainer(tmp_path, [self_replay()], max_epochs=1), writer(), {"a": Sequences(0, MASKED)})


def test_a_missing_tokenizer_is_named(tmp_path, tokenizer):
    data = TaskDataModule({"a": texts("a")}, tokenizer, max_length=48)
    data.setup()
    module = writer()
    loader = data.train_loader(data.tasks[0])
    with pytest.raises(MisconfigurationException, match=r"needs the model's tokenizer: give TaskDataModule"):
        trainer(tmp_path, [self_replay()], max_epochs=1).fit(
            module, DataLoader(loader.dataset, 4, collate_fn=loader.collate_fn)
        )


def test_an_encoder_decoder_is_named(tmp_path, tokenizer):
    module = writer()
    module.model.config.is_encoder_decoder = True
    with pytest.raises(MisconfigurationException, match="LlamaForCausalLM has an encoder and a decoder"):
        run(tmp_path, self_replay(), tokenizer, module=module)


def test_prompts_that_leave_no_room_are_left_out(tmp_path, tokenizer):
    long = " ".join(sentence(i) for i in range(9))
    method = self_replay(prompts=["the quick", long])
    _, watch = run(tmp_path, method, tokenizer, {"a": texts("a")})
    assert method.written["a"]["rejected"]["long"] == 10
    assert max(len(sample["input_ids"]) for sample, _ in watch.samples[0]) <= 48


def test_a_model_with_few_positions_writes_no_further(tmp_path, tokenizer):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "max_position_embeddings": 24}
    module = SomebodysLM(tie=False, kind="gpt2", vocab_size=VOCABULARY, initializer_range=0.7, **sizes)
    method = self_replay(prompts=["the quick brown fox", "a"], max_new_tokens=40)
    _, watch = run(tmp_path, method, tokenizer, {"a": ["the quick brown fox"] * 20}, module, data={"max_length": 100})
    assert max(len(sample["input_ids"]) for sample, _ in watch.samples[0]) <= 24
