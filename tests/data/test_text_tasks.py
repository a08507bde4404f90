"""Text tasks in the DataModule: splits, bad records, packing under fit_tasks, chat templates."""

from __future__ import annotations

import copy
import json
import logging
import warnings

import datasets
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from stand_in import CHATML, chats, save_stand_in, sentence, write_jsonl
from toys import trainer

from lightning_cl import CausalLM, Replay, Task, TaskDataModule, TaskMatrix, TrainedBPE, fit_tasks
from lightning_cl.core.coordinator import TaskCoordinator
from lightning_cl.data.text.tokenizer import fingerprint, load_tokenizer
from lightning_cl.sequence.evaluate import evaluate_tasks

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stand_in(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "cache"))


def texts(start, count=4):
    return [{"text": sentence(i)} for i in range(start, start + count)]


def completions(count, start=0):
    return [{"prompt": sentence(i, 4), "completion": " " + sentence(i + 1, 6)} for i in range(start, start + count)]


def ready(tasks, tokenizer, **settings):
    data = TaskDataModule(tasks, tokenizer=tokenizer, **{"max_length": 96} | settings)
    data.setup()
    return data


def documents(data, role, tokenizer, task="a"):
    """What stands in a task's samples, as sorted texts."""
    samples = getattr(data._prepared[task], role)
    if samples is None:
        return None
    return sorted(tokenizer.decode(samples[i]["input_ids"], skip_special_tokens=True) for i in range(len(samples)))


def plain(records):
    return sorted(record["text"] for record in records)


# ---------------------------------------------------------------------- splits

SPLIT = {"train": texts(0, 6), "valid": texts(20, 3), "test": texts(40, 2)}


def as_folder(tmp_path, splits=SPLIT):
    for name, records in splits.items():
        write_jsonl(tmp_path / "splits" / f"{name}.jsonl", records)
    return tmp_path / "splits"


def as_dataset_dict(tmp_path, splits=SPLIT):
    return datasets.DatasetDict({name: datasets.Dataset.from_list(records) for name, records in splits.items()})


@pytest.mark.parametrize("make", [as_folder, as_dataset_dict])
def test_splits_of_a_source_take_their_roles(tmp_path, tokenizer, make):
    data = ready({"a": make(tmp_path)}, tokenizer)
    for role, split in (("train", "train"), ("val", "valid"), ("test", "test")):
        assert documents(data, role, tokenizer) == plain(SPLIT[split])
    assert data.has_test_data(data.current)
    assert not data._prepared["a"].held_out
    assert not data.validated_on_training_data(data.current)


@pytest.mark.parametrize("make", [as_folder, as_dataset_dict])
@pytest.mark.parametrize("role", ["val", "test"])
def test_what_the_task_says_wins(tmp_path, tokenizer, make, role):
    data = ready([Task("a", make(tmp_path), **{role: texts(60, 2)})], tokenizer)
    assert documents(data, role, tokenizer) == plain(texts(60, 2))
    other, split = ("test", "test") if role == "val" else ("val", "valid")
    assert documents(data, other, tokenizer) == plain(SPLIT[split])


@pytest.mark.parametrize("make", [as_folder, as_dataset_dict])
def test_splits_without_validation_are_split(tmp_path, tokenizer, make):
    source = make(tmp_path, {"train": texts(0, 20), "test": SPLIT["test"]})
    data = ready({"a": source}, tokenizer, val_fraction=0.2)
    train, val = (documents(data, role, tokenizer) for role in ("train", "val"))
    assert sorted(train + val) == plain(texts(0, 20))
    assert len(val) in (3, 4, 5)


def test_a_dictionary_of_two_tables_is_training_and_validation(tokenizer):
    """Arguments of a task look like a ``DatasetDict`` then; both readings mean the same."""
    train, val = (datasets.Dataset.from_list(texts(i)) for i in (0, 20))
    data = ready({"a": {"train": train, "val": val}}, tokenizer)
    assert documents(data, "train", tokenizer) == plain(texts(0))
    assert documents(data, "val", tokenizer) == plain(texts(20))


def test_two_tables_that_are_no_text_are_training_and_validation():
    """Tokenised by somebody: no tokenizer of ours, no columns that we know."""
    train, val = (
        datasets.Dataset.from_dict({"input_ids": [[i, i + 1]] * 3, "labels": [[i, i + 1]] * 3}).with_format("torch")
        for i in (1, 5)
    )
    data = TaskDataModule({"a": {"train": train, "val": val}}, batch_size=3)
    data.setup()
    assert next(iter(data.train_loader(data.current)))["input_ids"].tolist() == [[1, 2]] * 3
    assert next(iter(data.val_loader(data.current)))["input_ids"].tolist() == [[5, 6]] * 3


def test_one_table_with_a_limit_is_a_task(tokenizer):
    table = datasets.Dataset.from_list(texts(0))
    data = ready({"a": {"train": table, "val": table, "max_steps": 7}}, tokenizer)
    assert data.current.max_steps == 7
    assert documents(data, "train", tokenizer) == plain(texts(0))


def test_the_matrix_is_measured_on_the_validation_file(tmp_path, folder):
    """Oracle: the same weights on the same file as plain data."""
    matrix = TaskMatrix()
    model = CausalLM(folder)
    fit_tasks(trainer(tmp_path, [matrix], max_steps=2), model, TaskDataModule({"a": as_folder(tmp_path)}, folder, 96))
    data = TaskDataModule([Task("v", texts(0), val=SPLIT["valid"]), Task("t", texts(0), val=SPLIT["test"])], folder, 96)
    results = evaluate_tasks(trainer(tmp_path), model, data)
    assert float(matrix.matrix[-1, 0]) == pytest.approx(results["v"]["val_loss"], abs=1e-6)
    assert float(matrix.matrix[-1, 0]) != pytest.approx(results["t"]["val_loss"], abs=1e-3)


@pytest.mark.parametrize("make", [as_folder, as_dataset_dict])
def test_testing_uses_the_test_split(tmp_path, folder, make):
    """As ``lightning-cl test`` does it: nothing was set up before."""
    model = CausalLM(folder)
    found = evaluate_tasks(trainer(tmp_path), model, TaskDataModule({"a": make(tmp_path)}, folder, 96), "test")
    data = TaskDataModule([Task("a", texts(0), test=SPLIT["test"])], folder, 96)
    expected = evaluate_tasks(trainer(tmp_path), model, data, "test")
    assert found["a"]["test_loss"] == pytest.approx(expected["a"]["test_loss"], abs=1e-6)


def test_watched_splits_are_measured_on_validation(tmp_path, tokenizer):
    data = ready([Task("a", texts(0)), Task("w", val=str(as_folder(tmp_path)))], tokenizer)
    assert documents(data, "val", tokenizer, "w") == plain(SPLIT["valid"])


def test_whole_documents_reproducibly_and_copies_on_one_side(tokenizer, tmp_path, monkeypatch):
    pool = [{"text": " ".join(sentence(i + j) for j in range(5))} for i in range(0, 200, 5)]
    records = [*pool, *pool[:20], *chats(10), *chats(10)]
    sides = []
    for run in range(2):
        monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / str(run)))  # else the second one reads it
        data = ready({"a": records}, tokenizer, max_length=512, val_fraction=0.25, seed=5)
        sides.append((documents(data, "train", tokenizer), documents(data, "val", tokenizer)))
    train, val = sides[0]
    assert sides[0] == sides[1]
    assert len(train) + len(val) == len(records)  # none is longer than a sample, so none was cut
    assert not set(train) & set(val)
    share = sum(map(len, val)) / sum(map(len, train + val))
    assert 0.2 < share < 0.3
    other = ready({"a": records}, tokenizer, max_length=512, val_fraction=0.25, seed=6)
    assert documents(other, "val", tokenizer) != val


def test_a_long_document_is_on_one_side_with_all_of_its_blocks(tokenizer):
    records = [{"text": f"document{i} " + f"word{i} " * 150} for i in range(8)]
    data = ready({"a": records}, tokenizer, max_length=32, val_fraction=0.25)
    sides = [set(documents(data, role, tokenizer)) for role in ("train", "val")]
    held_out = {i for i in range(8) if any(f"word{i} " in text for text in sides[1])}
    assert 1 <= len(held_out) <= 3
    assert not any(f"word{i} " in text for i in held_out for text in sides[0])


# ---------------------------------------------------------------------- bad records

BAD_LINES = ['{"text": "' + sentence(i) + '"}' for i in range(9)]


def bad_file(tmp_path, lines=(3, 6)):
    rows = list(BAD_LINES)
    rows[lines[0]], rows[lines[1]] = '{"text": 5}', '{"text": "open'
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    return tmp_path / "bad.jsonl"


class Never(Callback):
    def on_train_start(self, trainer, pl_module):
        pytest.fail("training has begun")


@pytest.mark.parametrize("matrix", [True, False])
def test_file_line_and_reason_before_any_training(tmp_path, folder, matrix):
    """Also where the bad file belongs to the last task."""
    data = TaskDataModule({"good": texts(0), "mails": bad_file(tmp_path)}, folder, 96)
    callbacks = [Never(), *([TaskMatrix()] if matrix else [])]
    with pytest.raises(ValueError, match=r"task 'mails', train=.*bad\.jsonl', line 4: .*string") as error:
        fit_tasks(trainer(tmp_path, callbacks, max_steps=1), CausalLM(folder), data)
    assert "line 7" not in str(error.value)


def test_skipping_trains_on_the_rest_counts_and_warns(tmp_path, folder, tokenizer):
    data = TaskDataModule({"mails": bad_file(tmp_path)}, folder, 96, on_bad_record="skip")
    with pytest.warns(UserWarning, match="2 malformed records were skipped") as caught:
        fit_tasks(trainer(tmp_path, max_epochs=1), CausalLM(folder), data)
    (message,) = (str(w.message) for w in caught if "malformed" in str(w.message))
    assert "line 4: " in message
    assert "line 7: " in message
    assert data._prepared["mails"].train.tally.bad == 2
    both = documents(data, "train", tokenizer, "mails") + documents(data, "val", tokenizer, "mails")
    assert sorted(both) == sorted(sentence(i) for i in range(9) if i not in (3, 6))
    assert "2 malformed" in "\n".join(data.describe(data.current))


def test_the_warning_comes_again_from_the_cache(tmp_path, folder):
    for _ in range(2):
        with pytest.warns(UserWarning, match="2 malformed records were skipped"):
            ready({"mails": bad_file(tmp_path)}, folder, on_bad_record="skip")


@pytest.mark.parametrize("role", ["train", "val"])
def test_all_records_bad(tmp_path, folder, role):
    path = tmp_path / "all.jsonl"
    path.write_text('{"txt": 1}\n{"txt": 2}\n')
    data = TaskDataModule([Task("mails", **{"train": texts(0)} | {role: path})], folder, 96, on_bad_record="skip")
    with pytest.raises(ValueError, match=rf"task 'mails', {role}.*no text.*2 bad records.*line 1"):
        fit_tasks(trainer(tmp_path, [Never()], max_steps=1), CausalLM(folder), data)


def test_skipping_holds_while_a_vocabulary_is_trained(tmp_path):
    bpe = TrainedBPE(257, str(tmp_path / "bpe"))
    with pytest.warns(UserWarning, match="2 malformed records were skipped"):
        data = ready({"mails": bad_file(tmp_path)}, bpe, on_bad_record="skip")
    assert len(data._prepared["mails"].train) > 0


def test_a_conversation_that_the_template_refuses_is_a_bad_record(folder):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    records = chats(6)
    records[2] = {"messages": [{"role": "system", "content": "Be brief."}, *records[2]["messages"]]}
    with pytest.raises(ValueError, match=r"task 'a', train, item 2: .*no system role"):
        ready({"a": records}, folder, chat_template=template)
    with pytest.warns(UserWarning, match=r"1 malformed.*\n.*item 2: .*no system role"):
        ready({"a": records}, folder, chat_template=template, on_bad_record="skip")


# ---------------------------------------------------------------------- packing under fit_tasks


def mixed(folder, **settings):
    tasks = {
        "chat": {"train": chats(14), "val": chats(5, 50)},
        "ask": {"train": completions(20), "val": completions(6, 50)},
        "text": {"train": texts(0, 20), "val": texts(50, 6)},
    }
    return TaskDataModule(tasks, folder, 128, batch_size=3, **settings)


def test_validation_loss_is_the_same_packed(tmp_path, folder):
    model = CausalLM(folder)
    losses = [
        evaluate_tasks(trainer(tmp_path), model, mixed(folder, packing=packing, length_buckets=False))
        for packing in (False, True)
    ]
    for task in ("chat", "ask", "text"):
        one, other = losses[0][task], losses[1][task]
        assert one["val_loss"] == pytest.approx(other["val_loss"], abs=1e-5)
        assert one["val_token_accuracy"] == pytest.approx(other["val_token_accuracy"], abs=1e-6)


def test_gradient_of_a_packed_batch_is_that_of_its_samples(tmp_path, folder):
    model = CausalLM(folder)
    data = TaskDataModule({"a": {"train": chats(6) + completions(9) + texts(0, 7), "val": ["x"]}}, folder, 128, 100)
    evaluate_tasks(trainer(tmp_path), model, data)  # builds the model
    gradients = []
    for packing in (False, True):
        data.packing = packing
        (batch,) = data.train_loader(data.current)
        assert ("position_ids" in batch) == packing
        model.zero_grad()
        model._loss(batch)[0].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    one, other = gradients
    scale = max(float(gradient.abs().max()) for gradient in one.values())
    assert scale > 1e-3
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-6 * max(scale, 1)


class Tokens(Callback):
    """Loss-bearing tokens of each batch that was trained on."""

    def __init__(self):
        self.trained = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        name = trainer.datamodule.current.name
        self.trained[name] = self.trained.get(name, 0) + int((batch["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("packing", [False, True])
def test_replayed_share_in_the_report(tmp_path, folder, packing):
    """Completions have prompts without loss: shares of tokens and of samples differ."""
    matrix, tokens = TaskMatrix(), Tokens()
    tasks = {
        "text": {"train": texts(0, 60), "val": texts(90)},
        "ask": {"train": completions(150), "val": completions(4, 400)},
    }
    data = TaskDataModule(tasks, folder, 64, batch_size=2, packing=packing)
    fit_tasks(trainer(tmp_path, [Replay(60, 0.25), matrix, tokens], max_epochs=1), CausalLM(folder), data)
    first, second = json.loads((tmp_path / "report.json").read_text())["costs"]["tasks"]
    assert first["replayed_tokens"] == 0
    share = second["replayed_tokens"] / (second["new_tokens"] + second["replayed_tokens"])
    one_block = 64 / (second["new_tokens"] + second["replayed_tokens"])
    assert abs(share - 0.25) < one_block
    assert second["replayed_samples"] / (second["new_samples"] + second["replayed_samples"]) != pytest.approx(
        share, abs=0.02
    )
    train = data._prepared["ask"].train
    assert second["new_tokens"] == sum(train.loss_tokens(i) for i in range(len(train)))
    for cost, name in ((first, "text"), (second, "ask")):
        assert cost["new_tokens"] + cost["replayed_tokens"] == tokens.trained[name]


def test_a_packed_run_resumed_inside_a_task_ends_the_same(tmp_path, folder):
    def run(root, ckpt_path=None):
        L.seed_everything(1, verbose=False)
        model = CausalLM(folder)
        save = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
        used = trainer(root, [Replay(20, 0.3), save], max_steps=3)
        fit_tasks(used, model, mixed(folder, packing=True), ckpt_path)
        return model.state_dict(), [cost["new_tokens"] for cost in TaskCoordinator.of(used).costs]

    weights, costs = run(tmp_path / "1")
    for number, checkpoint in enumerate(sorted(tmp_path.rglob("1-ask/*.ckpt"))):
        resumed, same = run(tmp_path / f"resumed{number}", checkpoint)
        assert all(torch.equal(weights[name], resumed[name]) for name in weights)
        assert costs == same
    assert number == 2


@pytest.mark.parametrize("packing", [False, True])
def test_the_plan_tells_samples_tokens_masks_and_padding(tmp_path, folder, packing, caplog):
    data = TaskDataModule(
        {"ask": {"train": [*completions(10), {"prompt": "p" * 99, "completion": "c"}], "val": completions(2, 50)}},
        folder,
        40,
        batch_size=2,
        packing=packing,
    )
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit_tasks(trainer(tmp_path, fast_dev_run=True), CausalLM(folder), data)
    (plan,) = (record.getMessage() for record in caplog.records if "Preflight" in record.getMessage())
    train = data._prepared["ask"].train
    # Counted anew, from the tensors.
    tokens, places = 0, 0
    learnt = sum(int(train[i]["loss_mask"][1:].sum()) for i in range(len(train)))
    tokens = sum(len(train[i]["input_ids"]) for i in range(len(train)))
    for batch in data.train_loader(data.current):
        rows, longest = batch["input_ids"].shape
        places += rows * (40 if packing else longest)
    assert f"{len(train):,} samples, {tokens:,} tokens, {1 - learnt / tokens:.1%} of them without loss" in plan
    assert f"{1 - tokens / places:.1%} padding" in plan
    assert "cut off" in plan
    assert "dropped" in plan


# ---------------------------------------------------------------------- chat templates

SHOUTING = CHATML.replace("<|im_start|>{{ message['role'] }}", "<|im_start|>{{ message['role']|upper }}").replace(
    "assistant", "ASSISTANT"
)


@pytest.fixture
def base(tokenizer):
    """The tokenizer of a base model: no template."""
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = None
    return copied


@pytest.mark.parametrize("how", ["text", "file"])
def test_template_of_the_users_own(tmp_path, tokenizer, base, how):
    (tmp_path / "own.jinja").write_text(SHOUTING, encoding="utf-8")
    template = SHOUTING if how == "text" else str(tmp_path / "own.jinja")
    for given in (tokenizer, base):
        before = given.chat_template, fingerprint(given)
        data = ready({"a": {"train": chats(3), "val": chats(1, 9)}}, given, max_length=256, chat_template=template)
        sample = data._prepared["a"].train[0]
        expected = given.apply_chat_template(chats(1)[0]["messages"], chat_template=SHOUTING, tokenize=False)
        assert given.decode(sample["input_ids"]) == expected
        learnt = given.decode(sample["input_ids"][sample["loss_mask"]])
        said = [m["content"] for m in chats(1)[0]["messages"] if m["role"] == "assistant"]
        assert learnt == "".join(f"{words}<|im_end|>" for words in said)
        assert (given.chat_template, fingerprint(given)) == before  # the user's own object
        assert data.tokenizer.chat_template == SHOUTING  # saved with the model


def test_conversations_for_a_base_model_say_what_to_do(tmp_path, base, folder):
    data = TaskDataModule({"a": texts(0), "b": chats(3)}, base, 96)
    with pytest.raises(ValueError, match=r"task 'b', train, item \d: .*chat template.*chat_template=…"):
        fit_tasks(trainer(tmp_path, [Never()], max_steps=1), CausalLM(folder), data)


def test_instructions_need_no_template(base, tokenizer):
    records = [{"instruction": sentence(i, 4), "output": sentence(i + 1, 4)} for i in range(6)]
    without, with_ = (documents(ready({"a": records}, t), "train", tokenizer)[0] for t in (base, tokenizer))
    assert without.startswith("### Instruction:\n")
    assert with_.startswith("user\n")


def test_no_such_template_file():
    with pytest.raises(ValueError, match=r"chat_template='nowhere.jinja': .*no such file"):
        TaskDataModule({"a": ["x"]}, TrainedBPE(257), chat_template="nowhere.jinja")


def test_template_as_a_path_object(tmp_path, base):
    (tmp_path / "own.jinja").write_text(SHOUTING)
    data = TaskDataModule({"a": chats(3)}, base, chat_template=tmp_path / "own.jinja")
    assert data.chat_template == SHOUTING


# ---------------------------------------------------------------------- resumes


def test_a_tokenizer_saved_with_a_truncation_can_be_resumed_with(tmp_path, folder):
    """Many a ``tokenizer.json`` has one; the first call of the tokenizer takes it out of the object."""
    place = tmp_path / "model"
    load_tokenizer(folder).save_pretrained(place)
    content = json.loads((place / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
    (place / "tokenizer.json").write_text(json.dumps(content))

    def run(root, ckpt_path=None):
        data = TaskDataModule({"a": texts(0), "b": texts(9)}, str(place), 96)
        module = CausalLM(folder)
        fit_tasks(trainer(root, [ModelCheckpoint(root)], max_steps=1), module, data, ckpt_path)
        return module.state_dict()

    whole = run(tmp_path / "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed = run(tmp_path / "2", tmp_path / "1" / "tasks" / "0-a.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
