"""The router: it recovers tasks that differ, row by row, in every pass that a user makes."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch
from adapting import SomebodysAdapter, move, peft_model
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from stand_in import save_stand_in
from toys import Classifier, classification, trainer

from lightning_cl import CausalLM, PromptSamples, Task, TaskAdapters, TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.callbacks.architecture.adapter_router import AdapterRouter, RoutedRows, prompts_in
from lightning_cl.data.text.collator import TokenCollator
from lightning_cl.data.text.prompts import PromptDataset
from lightning_cl.models.adapters import allocate_adapter, using_adapter
from lightning_cl.passes.generation import continue_tokens
from lightning_cl.sequence.evaluate import evaluate_tasks
from lightning_cl.sequence.predict import predict_tasks

pytestmark = pytest.mark.filterwarnings("ignore")


class Rows(torch.utils.data.Dataset):
    """Samples, as a data set that is no list of records."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class Answers(Rows):
    """Prompts of 6 to 10 tokens out of the eight of a task, and answers of three."""

    def __init__(self, low, count=32, seed=0):
        generator = torch.Generator().manual_seed(seed + low)
        super().__init__([])
        for i in range(count):
            ids = torch.randint(low, low + 8, (9 + i % 5,), generator=generator)
            self.samples.append({"input_ids": ids, "loss_mask": torch.arange(len(ids)) >= 6 + i % 5})


NAMES = ["low", "high"]


def module_of(lr=1e-2):
    return SomebodysAdapter(dropout=0.0, lr=lr)


def tasks(watch=()):
    known = [Task(name, Answers(low), val=Answers(low, 8, 1)) for name, low in zip(NAMES, (0, 100), strict=True)]
    return [*known, *(Task(name, val=Rows(val)) for name, val in watch)]


def data_of(list_of_tasks, **settings):
    return TaskDataModule(list_of_tasks, batch_size=8, seed=0, collate_fn=TokenCollator(0), **settings)


def mixed():
    """Rows of both tasks in one batch, in turns."""
    low, high = Answers(0, 4, 2), Answers(100, 4, 2)
    return [sample for pair in zip(low, high, strict=True) for sample in pair]


@pytest.fixture(scope="module", params=["embedding", "likelihood"])
def trained(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    method, matrix, module = TaskAdapters(router=request.param), TaskMatrix(), module_of()
    run = trainer(root, [method, matrix], max_epochs=8, enable_checkpointing=True)
    fit_tasks(run, module, data_of(tasks([("both", mixed())])))
    return module, method, matrix, root, run


# ---------------------------------------------------------------------- a whole run


def test_it_recovers_the_tasks_and_reports_it(trained):
    _, method, *_ = trained
    assert method.routed[1]["low"]["low"] >= 0.8  # the base is left for what is like nothing
    for name in NAMES:
        assert method.routed[2][name][name] >= 0.8, method.routed
        assert sum(method.routed[2][name].values()) == pytest.approx(1)
        told = f"TaskAdapters, {name}: the router gives {method.routed[2][name][name]:.0%} of its validation prompts"
        assert any(sentence.startswith(told) for sentence in method.report()["sentences"])


def test_a_watched_task_and_a_fresh_process_get_the_rows_adapters(trained, tmp_path):
    """Its loss is that of each row under the adapter that its prompt alone gets, weighed by tokens."""
    module, method, matrix, root, _ = trained
    batch = TokenCollator(0)(mixed())
    prompts = [PromptDataset(mixed())[i]["prompt"] for i in range(8)]
    chosen = [method._router.route(module, [prompt], NAMES, None)[0] for prompt in prompts]
    assert [name for name in chosen if name is not None] == [n for n, c in zip(NAMES * 4, chosen, strict=True) if c]
    assert set(chosen) >= set(NAMES)
    total = 0.0
    for row, task in enumerate(chosen):
        with using_adapter(module, task), torch.no_grad():
            one = {key: value[row : row + 1] for key, value in batch.items()}
            total += float(module.eval().inner["model"](**one).loss) * int((one["labels"] != -100).sum())
    expected = total / int((batch["labels"] != -100).sum())
    assert float(matrix.matrix[2, 2]) == pytest.approx(expected, rel=1e-5)
    # With one adapter for all rows it is another number.
    for name in NAMES:
        with using_adapter(module, name), torch.no_grad():
            assert abs(float(module.eval().inner["model"](**batch).loss) - expected) > 0.01

    path = next(root.rglob("tasks/1-*.ckpt"))
    again = trainer(tmp_path, [TaskAdapters(router=method.router)])
    known = data_of(tasks([("never heard of", mixed())]))
    found = evaluate_tasks(again, module_of(), known, ckpt_path=path)
    assert [values["val_loss"] for values in found.values()] == pytest.approx(matrix.matrix[2].tolist(), rel=1e-6)


def test_text_is_generated_row_by_row(trained):
    module, method, _, _, run = trained
    model = module.inner["model"]
    model.generation_config.eos_token_id = None
    prompts = [PromptDataset(mixed())[i]["prompt"] for i in range(8)]
    chosen = [method._router.route(module, [prompt], NAMES, None)[0] for prompt in prompts]
    expected = []
    for prompt, task in zip(prompts, chosen, strict=True):
        with using_adapter(module, task):
            expected += continue_tokens(model, [prompt], 3, 0)
    model.train()
    with method.deployed(run, module, None):
        assert continue_tokens(model, prompts, 3, 0) == expected
        assert continue_tokens(model, prompts[:1], 3, 0) == expected[:1]
    assert model.active_adapters == ["task-high"]
    with method.deployed(run, module, "low"):
        assert model.active_adapters == ["task-low"]


def test_beams_have_the_adapter_of_their_prompt(trained):
    module, method, _, _, run = trained
    model = module.inner["model"].eval()
    model.generation_config.eos_token_id = None
    prompts = [PromptDataset(mixed())[i]["prompt"] for i in (0, 1)]
    chosen = [method._router.route(module, [prompt], NAMES, None)[0] for prompt in prompts]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    expected = []
    for row, task in enumerate(chosen):
        with using_adapter(module, task):
            written = model.generate(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1], **settings)
            expected.append(written[0])
    with method.deployed(run, module, None):
        written = model.generate(input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(written, torch.stack(expected))


# ---------------------------------------------------------------------- parts


def test_a_prompt_like_no_task_is_of_the_base(trained):
    module, method, *_ = trained
    strange = [[299, 298, 297, 299, 296, 295, 294], [290] * 6]
    found = method._router.route(module, strange, NAMES, "low")
    assert found == [None, None] if method.router == "embedding" else set(found) <= set(NAMES)
    assert method._router.route(module, [[]], NAMES, "low") == ["low"]


def test_the_likelihood_is_that_of_each_prompt_alone():
    holder = module_of()
    for name in NAMES:
        allocate_adapter(holder, name)
    move(holder, NAMES, 0.1)
    router = AdapterRouter("likelihood", tokens=5)
    prompts = [[5, 9, 200], [7, 8, 9, 10, 11, 12, 13], [250, 1], [3]]
    losses = router._losses(holder, prompts[:3], NAMES)
    for column, name in enumerate(NAMES):
        with using_adapter(holder, name), torch.no_grad():
            for row, prompt in enumerate(prompts[:3]):
                ids = torch.tensor([prompt[:5]])
                loss = holder.eval().inner["model"](input_ids=ids, labels=ids).loss
                assert float(losses[column, row]) == pytest.approx(float(loss), rel=1e-5)
    best = [NAMES[i] for i in losses.argmin(0).tolist()]
    assert router.route(holder, prompts, NAMES, "of one token") == [*best, "of one token"]


def test_prompts_of_a_batch_are_those_of_generation():
    samples = [*Answers(0, 5), {"input_ids": torch.arange(90), "loss_mask": torch.ones(90, dtype=torch.bool)}]
    expected = [PromptDataset(samples)[i]["prompt"] for i in range(6)]
    assert [len(prompt) for prompt in expected] == [6, 7, 8, 9, 10, 32]
    collate = TokenCollator(0)
    padded = collate(samples)
    assert prompts_in(padded) == [[prompt] for prompt in expected]
    left = {name: value.flip(1) for name, value in padded.items()}
    assert [len(row[0]) for row in prompts_in({k: v for k, v in left.items() if k != "labels"})] == [
        9,
        10,
        11,
        12,
        13,
        90,
    ]
    packed = collate([samples[:3], samples[3:]])
    assert prompts_in(packed) == [expected[:3], expected[3:]]


def test_embeddings_are_the_bases_under_adapters_of_embeddings():
    found = []
    for settings in ({}, {"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["embed_tokens"]}):
        holder = module_of()
        holder.inner["model"] = peft_model(**settings)
        move_all(holder)
        router = AdapterRouter("embedding", 64)
        found.append(router._vectors(_weight(holder), [[1, 2, 3], [4]])[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def move_all(holder):
    with torch.no_grad():
        for name, parameter in holder.named_parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
            assert "original_module" not in name or not parameter.requires_grad


def _weight(holder):
    from lightning_cl.callbacks.architecture import adapter_router

    return adapter_router._embeddings(holder)


def test_passes_that_are_not_of_the_batch_are_left_alone():
    holder = module_of()
    for name in NAMES:
        allocate_adapter(holder, name)
    move(holder, NAMES, 0.1)
    batch = TokenCollator(0)(mixed())
    model = holder.inner["model"].eval()
    rows = RoutedRows(holder, lambda prompts: [NAMES[i % 2] for i in range(len(prompts))], "high")
    probe = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), using_adapter(holder, "high"):
        expected = model(input_ids=probe).logits
    with rows.entered(), torch.no_grad():
        rows.begin(batch)
        first = model(**batch).logits
        assert torch.equal(model(input_ids=probe).logits, expected)
        # Through the decoder alone, as a split head calls it, and after the pass of something else.
        hidden = model.get_base_model().get_decoder()(batch["input_ids"], attention_mask=batch["attention_mask"])
        assert torch.equal(model.get_output_embeddings()(hidden.last_hidden_state), first)
        packed = TokenCollator(0)([mixed()[:2]])
        with pytest.raises(ValueError, match=r"several documents share a row.*packing=False"):
            rows.begin(packed)
        with pytest.raises(ValueError, match="without `input_ids`"):
            model(inputs_embeds=torch.zeros(1, 2, 32))


# ---------------------------------------------------------------------- refusals


def test_packed_rows_of_a_watched_task_are_refused(tmp_path):
    data = data_of(tasks([("both", mixed())]), packing=True)
    with pytest.raises(MisconfigurationException, match=r"packing=True\): the watched task 'both' has no adapter"):
        fit_tasks(trainer(tmp_path, [TaskAdapters(router="embedding")], max_steps=1), module_of(), data)


def test_adapters_that_work_on_whole_batches_are_refused(tmp_path):
    holder = module_of()
    holder.inner["model"] = peft_model(use_dora=True)
    with pytest.raises(MisconfigurationException, match=r"router='likelihood'\): adapters with use_dora=True"):
        fit_tasks(trainer(tmp_path, [TaskAdapters(router="likelihood")], max_steps=1), holder, data_of(tasks()))


def test_data_without_tokens_is_refused(tmp_path):
    data = TaskDataModule({"a": classification(1)}, batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"batches of task 'a' have no `input_ids`"):
        fit_tasks(trainer(tmp_path, [TaskAdapters(router="embedding")], max_steps=1), Classifier(), data)


@pytest.mark.parametrize(
    ("settings", "words"), [({"router": "mean"}, "router='mean': expected 'embedding'"), ({"router_tokens": 0}, "=0")]
)
def test_arguments_out_of_their_range(settings, words):
    with pytest.raises(ValueError, match=words):
        TaskAdapters(**settings)


def test_questions_are_asked_of_the_deployed_model(tmp_path, monkeypatch):
    """PromptSamples asks inside of the view: without a router and with unseen='base', the base."""
    seen = []

    def answer(model, *args):
        seen.append((list(model.active_adapters), model.get_base_model().model.layers[0].mlp.up_proj.disable_adapters))
        return [""]

    monkeypatch.setattr("lightning_cl.callbacks.monitoring.prompts.answers", answer)
    monkeypatch.setattr("lightning_cl.callbacks.monitoring.prompts.prompt_tokens", lambda *args: [1])
    for unseen in ("base", "latest"):
        data = data_of(tasks()[:1])
        data.tokenizer = type("Tokenizer", (), {"decode": None})()
        callbacks = [TaskAdapters(unseen=unseen), PromptSamples(["?"])]
        L.seed_everything(1, verbose=False)
        fit_tasks(trainer(tmp_path, callbacks, max_steps=1), module_of(), data)
    assert [off for _, off in seen] == [True, True, False, False]


# ---------------------------------------------------------------------- texts, from end to end


def texts(words, count, start=0):
    """Prompts and completions out of a few words."""
    said = [" ".join(words[(i * 5 + j * j + i) % len(words)] for j in range(12)) for i in range(start, start + count)]
    return [{"prompt": text, "completion": " " + text[:20]} for text in said]


def test_texts_of_unknown_tasks_are_predicted_by_the_adapters_of_known_ones(tmp_path, monkeypatch):
    """`CausalLM`, trained on packed batches; in a fresh process nobody knows the names of the tasks."""
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "cache"))
    base = save_stand_in(tmp_path / "base")
    sources = {"animals": ["fox", "dog", "owls", "hens"], "places": ["barn", "river", "near", "over"]}

    def parts(names):
        return [
            Task(name, train=texts(words, 24), val=texts(words, 4, 24))
            for name, words in zip(names, sources.values(), strict=True)
        ]

    def lm():
        adamw = lambda p: torch.optim.AdamW(p, lr=2e-2)  # noqa: E731
        return CausalLM(base, adamw, schedule=None, lora={"r": 4}, max_new_tokens=4)

    def predicted(names, root, settings):
        run = trainer(tmp_path, [TaskAdapters(**settings)])
        data = TaskDataModule(parts(names), base, max_length=128, batch_size=4)
        (tmp_path / root).mkdir()
        file = predict_tasks(run, lm(), data, next(tmp_path.rglob("tasks/1-*.ckpt")), folder=tmp_path / root)
        return [json.loads(line)["generated"] for line in file.read_text().splitlines()]

    method = TaskAdapters(router="embedding")
    data = TaskDataModule(parts(sources), base, max_length=128, batch_size=2, packing=True)
    fit_tasks(trainer(tmp_path, [method], max_epochs=4, enable_checkpointing=True), lm(), data)
    assert method.routed[2] == {name: {name: 1.0} for name in sources}
    known = predicted(sources, "known", {"router": "embedding"})
    assert predicted(["one", "other"], "unknown", {"router": "embedding"}) == known
    latest = predicted(["one", "other"], "latest", {})
    assert latest[4:] == known[4:]
    assert latest[:4] != known[:4]
