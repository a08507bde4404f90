"""The DataModule of a sequence: errors before anything is built, and what its loaders give."""

from __future__ import annotations

import datasets
import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from toys import Classifier, classification, trainer

from lightning_cl import Task, TaskDataModule
from lightning_cl.data import TaskLoader, TrainedBPE

ANY = classification(0, samples=10)
TEXTS = [f"document {i}: " + "word " * i for i in range(1, 30)]


@pytest.mark.parametrize("tasks", [{}, []])
def test_no_tasks(tasks):
    with pytest.raises(ValueError, match="tasks: there are none"):
        TaskDataModule(tasks)


@pytest.mark.parametrize("tasks", [5, "data.txt", None])
def test_tasks_of_an_unknown_kind(tasks):
    with pytest.raises(TypeError, match=f"tasks: .* got a {type(tasks).__name__}"):
        TaskDataModule(tasks)


def test_two_tasks_of_one_name():
    with pytest.raises(ValueError, match=r"'chat'.*unique"):
        TaskDataModule([Task("chat", ANY), Task("code", ANY), Task("chat", ANY)])


def test_all_tasks_watched():
    with pytest.raises(ValueError, match="nothing to train on"):
        TaskDataModule([Task("a", val=ANY), Task("b", val=ANY)])


def test_unknown_argument_of_a_task_is_named_with_the_right_ones():
    with pytest.raises(TypeError, match=r"task 'chat'.*'epochs'.*max_epochs"):
        TaskDataModule({"chat": {"train": ANY, "epochs": 3}})


def test_key_and_task_of_different_names():
    with pytest.raises(ValueError, match=r"'chat'.*'code'"):
        TaskDataModule({"chat": Task("code", ANY)})


def test_data_instead_of_a_task_in_a_list():
    with pytest.raises(TypeError, match="expected a Task"):
        TaskDataModule([ANY])


def test_text_without_a_tokenizer():
    with pytest.raises(ValueError, match=r"task 'chat', train.*tokenizer"):
        TaskDataModule({"chat": TEXTS})


def test_text_for_validation_without_a_tokenizer():
    with pytest.raises(ValueError, match=r"task 'chat', val.*tokenizer"):
        TaskDataModule({"chat": {"train": ANY, "val": TEXTS}})


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("val_fraction", 0),
        ("val_fraction", 1),
        ("val_fraction", -0.1),
        ("val_fraction", float("nan")),
        ("val_fraction", "5%"),
        ("batch_size", 0),
        ("batch_size", 2.0),
        ("batch_size", True),
        ("max_length", 1),
        ("max_length", None),
        ("num_workers", -1),
        ("num_workers", None),
    ],
)
def test_argument_out_of_range_is_named_with_its_value(argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value!r}"):
        TaskDataModule({"a": ANY}, **{argument: value})


@pytest.mark.parametrize("data", [5, 0.5, [], {1, 2}, object(), [1, 2]])
def test_data_of_an_unknown_kind(data):
    with pytest.raises(TypeError, match="task 'a', train: expected"):
        TaskDataModule({"a": data})


def test_datasets_dataset_without_a_text_column_is_a_data_set_like_any_other():
    source = datasets.Dataset.from_dict({"x": list(range(6))})
    data = TaskDataModule({"a": source}, batch_size=3)
    data.setup()
    assert sorted(x for batch in data.train_loader(data.current) for x in batch["x"].tolist()) == list(range(6))


def test_missing_file_is_found_before_anything_is_built(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"task 'b', val=.*nowhere\.txt"):
        TaskDataModule({"a": TEXTS, "b": {"train": TEXTS, "val": tmp_path / "nowhere.txt"}}, tokenizer=TrainedBPE(300))


def test_plain_fit_of_several_tasks_is_refused_and_names_fit_tasks(tmp_path):
    data = TaskDataModule({"a": ANY, "b": ANY})
    with pytest.raises(RuntimeError, match="fit_tasks"):
        trainer(tmp_path, max_steps=1).fit(Classifier(), datamodule=data)


def test_tasks_can_be_looked_at_without_a_trainer():
    data = TaskDataModule({"a": ANY, "b": ANY})
    data.setup("fit")
    assert len(data.train_loader(data.tasks[1])) > 0


def test_loaders_before_setup_say_what_to_do():
    with pytest.raises(RuntimeError, match="setup"):
        TaskDataModule({"a": ANY}).train_dataloader()


def test_watched_tasks_are_not_among_the_trained():
    data = TaskDataModule([Task("w", val=ANY), Task("a", ANY), Task("b", ANY)])
    assert [task.name for task in data.trained_tasks] == ["a", "b"]
    assert data.current.name == "a"


def ready(tasks, tmp_path, **settings):
    data = TaskDataModule(tasks, tokenizer=TrainedBPE(257, str(tmp_path)), **settings)
    data.setup()
    return data


def texts_of(loader, tokenizer):
    """The texts of all rows in a loader's batches, without padding."""
    return sorted(
        tokenizer.decode(row[mask.bool()], skip_special_tokens=True)
        for batch in loader
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )


def test_text_is_split_into_whole_documents(tmp_path):
    data = ready({"a": TEXTS}, tmp_path, val_fraction=0.2)
    train = texts_of(data.train_loader(data.current), data.tokenizer)
    val = texts_of(data.val_loader(data.current), data.tokenizer)
    assert sorted(train + val) == sorted(TEXTS)
    assert val


def test_split_is_the_same_in_another_process(tmp_path):
    first, second = (ready({"a": TEXTS}, tmp_path, val_fraction=0.2) for _ in range(2))
    assert texts_of(first.val_loader(first.current), first.tokenizer) == texts_of(
        second.val_loader(second.current), second.tokenizer
    )


def test_text_with_its_own_validation_is_not_split(tmp_path):
    data = ready({"a": {"train": TEXTS, "val": ["held out"]}}, tmp_path)
    assert texts_of(data.train_loader(data.current), data.tokenizer) == sorted(TEXTS)
    assert texts_of(data.val_loader(data.current), data.tokenizer) == ["held out"]


def test_single_document_is_split_at_its_end(tmp_path):
    text = "".join(f"{i:4}" for i in range(100))
    data = ready({"a": [text]}, tmp_path, val_fraction=0.1)
    assert texts_of(data.train_loader(data.current), data.tokenizer) == [text[:360]]
    assert texts_of(data.val_loader(data.current), data.tokenizer) == [text[360:]]


def test_data_that_is_no_text_is_validated_on_itself_and_says_so():
    data = TaskDataModule({"a": ANY, "b": {"train": ANY, "val": ANY}})
    data.setup()
    assert [data.validated_on_training_data(task) for task in data.tasks] == [True, False]


def test_validation_is_in_order():
    data = TaskDataModule({"a": ANY}, batch_size=4)
    data.setup()
    x = torch.cat([x for x, _ in data.val_loader(data.current)])
    assert torch.equal(x, ANY.tensors[0])


def test_tasks_of_one_data_set_have_different_orders():
    data = TaskDataModule({"a": ANY, "b": ANY}, batch_size=10)
    data.setup()
    (first,), (second,) = (list(data.train_loader(task)) for task in data.tasks)
    assert not torch.equal(first[0], second[0])


def test_batch_size_of_a_task_overrides_the_modules():
    data = TaskDataModule({"a": {"train": ANY, "batch_size": 5}, "b": ANY}, batch_size=2)
    data.setup()
    assert [len(next(iter(data.train_loader(task)))[0]) for task in data.tasks] == [5, 2]


def test_batch_size_of_a_task_overrides_a_loaders():
    data = TaskDataModule({"a": {"train": DataLoader(ANY, batch_size=3), "batch_size": 5}})
    data.setup()
    assert len(next(iter(data.train_loader(data.current)))[0]) == 5


def test_collate_function_joins_the_samples_of_torch_data_sets():
    data = TaskDataModule({"a": ANY}, batch_size=5, collate_fn=len)
    data.setup()
    assert list(data.train_loader(data.current)) == [5, 5]


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(4)


def test_stream_is_given_on_in_batches():
    data = TaskDataModule({"a": Stream()}, batch_size=2)
    data.setup()
    assert [batch.tolist() for batch in data.train_loader(data.current)] == [[0, 1], [2, 3]]


class Theirs(L.LightningDataModule):
    def setup(self, stage):
        self.data = classification(3, samples=12)

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=4)

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=6)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return "transferred"


def test_datamodule_of_somebody_gives_its_own_batches():
    data = TaskDataModule({"a": Theirs()})
    data.setup()
    loader = data.train_loader(data.current)
    assert isinstance(loader, TaskLoader)
    assert torch.equal(torch.cat([x for x, _ in loader]), classification(3, samples=12).tensors[0])
    assert len(list(data.val_loader(data.current))) == 2


def test_datamodule_of_somebody_keeps_its_transfer_hooks():
    data = TaskDataModule({"a": Theirs(), "b": ANY})
    assert data.on_after_batch_transfer("batch", 0) == "transferred"
    data.index = 1
    assert data.on_after_batch_transfer("batch", 0) == "batch"


def fail_in(data, task, then=None):
    with data.showing(task):
        assert data.val_dataloader().dataset is (task.train or task.val)
        if then is not None:
            with pytest.raises(ZeroDivisionError):
                fail_in(data, then)
            assert data.val_dataloader().dataset is (task.train or task.val)
        assert data.driven
        raise ZeroDivisionError


def test_showing_gives_one_tasks_loaders_and_what_raises_in_it_leaves_no_trace():
    data = TaskDataModule(
        [Task("a", classification(0)), Task("b", classification(1)), Task("c", None, val=classification(2))],
        batch_size=8,
    )
    data.prepare_data()
    data.setup()
    first, second, watched = data.tasks
    with pytest.raises(ZeroDivisionError):
        fail_in(data, watched, then=second)
    assert (data.watch, data.driven) == (None, False)
    assert data.val_dataloader().dataset is first.train


def test_showing_a_task_of_other_data_names_the_tasks():
    data = TaskDataModule({"a": classification(0)}, batch_size=8)
    with (
        pytest.raises(ValueError, match=r"task 'b': expected one of the tasks \['a'\]"),
        data.showing(Task("b", classification(1))),
    ):
        pass
    assert (data.watch, data.driven) == (None, False)
