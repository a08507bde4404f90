"""What a buffer stores: copies of its own, of anything that a checkpoint can hold without pickle."""

from __future__ import annotations

import enum
import io

import numpy as np
import pytest
import torch

from lightning_cl.buffers import ReplayBuffer


def saved(buffer: ReplayBuffer) -> bytes:
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    return file.getvalue()


def stored_and_loaded(*samples):
    buffer = ReplayBuffer(len(samples))
    for sample in samples:
        buffer.add(sample, "a")
    loaded = ReplayBuffer(len(samples))
    loaded.load_state_dict(torch.load(io.BytesIO(saved(buffer)), weights_only=True))
    return loaded.items


def same(left, right) -> bool:
    """Equal in value, type and dtype, all the way down."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, (np.ndarray, np.generic)):
        return left.dtype == right.dtype and left.shape == right.shape and bool((left == right).all())
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return left == right


SAMPLES = {
    "dict of tensors": {"input_ids": torch.arange(5, dtype=torch.int32), "loss_mask": torch.ones(5, dtype=torch.bool)},
    "tuple of tensors": (torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.tensor(1)),
    "tensor": torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
    "empty tensor": (torch.empty(0, 4), torch.empty(0, dtype=torch.int64)),
    "numpy array": np.arange(6, dtype=np.float32).reshape(2, 3),
    "unsigned array": np.array([1, 65535], dtype=np.uint16),
    "numpy scalars": (np.float64(0.1), np.int32(-3), np.bool_(True), np.uint8(255)),
    "text": "ein Stück Text 🐍",
    "bytes": b"\x00\xff",
    "numbers": [1, -2.5, True, None],
    "nested": {"a": [({"b": (torch.tensor([1]), "c")}, np.int64(4))], "d": {}, "e": ()},
    "keys that are no texts": {0: 1, (1, 2): "pair"},
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_sample_survives_the_checkpoint_with_its_types(kind):
    loaded = stored_and_loaded(SAMPLES[kind], SAMPLES[kind])
    assert all(same(sample, SAMPLES[kind]) for sample in loaded)


def test_samples_of_different_lengths_survive_the_checkpoint():
    samples = [{"ids": torch.arange(n), "matrix": torch.ones(n, 2)} for n in (3, 0, 7, 1)]
    assert same(stored_and_loaded(*samples), samples)


def test_samples_of_different_kinds_survive_together():
    samples = [{"x": torch.ones(2)}, {"x": torch.ones(2, 2)}, {"y": torch.ones(2)}, (torch.ones(1),), "text"]
    assert same(stored_and_loaded(*samples), samples)


def test_keys_in_another_order_do_not_swap_fields():
    samples = [{"a": torch.tensor([1]), "b": torch.tensor([2])}, {"b": torch.tensor([4]), "a": torch.tensor([3])}]
    assert same(stored_and_loaded(*samples), samples)


def test_fields_of_different_types_are_not_joined():
    samples = [(torch.tensor([1]),), (torch.tensor([1.5]),)]
    assert same(stored_and_loaded(*samples), samples)


def test_loaded_samples_share_no_memory_with_each_other():
    first, second = stored_and_loaded((torch.zeros(3),), (torch.zeros(3),))
    first[0].fill_(1)
    assert second[0].sum() == 0
    assert first[0].untyped_storage().nbytes() == 12


def test_stored_tensor_does_not_change_with_the_data_set():
    data = torch.zeros(10, 4)
    buffer = ReplayBuffer(1)
    buffer.add({"x": data[3], "nested": [data[4]]}, "a")
    data.fill_(7)
    assert buffer[0]["x"].sum() == 0
    assert buffer[0]["nested"][0].sum() == 0


def test_stored_array_does_not_change_with_the_data_set():
    data = np.zeros((10, 4))
    buffer = ReplayBuffer(1)
    buffer.add(data[3], "a")
    data += 7
    assert buffer[0].sum() == 0


def test_stored_containers_are_copies():
    record = {"tokens": [1, 2]}
    buffer = ReplayBuffer(1)
    buffer.add(record, "a")
    record["tokens"].append(3)
    assert buffer[0] == {"tokens": [1, 2]}


@pytest.mark.parametrize("wrap", [lambda t: (t,), lambda t: [t], lambda t: t.numpy()])
def test_checkpoint_does_not_hold_the_whole_data_set(wrap):
    data = torch.zeros(100_000, 4)
    buffer = ReplayBuffer(3)
    for i in range(3):
        buffer.add(wrap(data[i]), "a")
    assert len(saved(buffer)) < 20_000 < data.nbytes


def test_stored_tensor_needs_no_graph():
    buffer = ReplayBuffer(1)
    buffer.add(torch.ones(2, requires_grad=True) * 2, "a")
    assert not buffer[0].requires_grad


def test_a_token_sample_takes_four_bytes_and_a_bit_per_token():
    buffer = ReplayBuffer(2)
    buffer.add({"input_ids": torch.zeros(10, dtype=torch.int32), "loss_mask": torch.ones(10, dtype=torch.bool)}, "a")
    assert buffer.size_in_bytes() == 40 + 2
    buffer.add({"input_ids": [1] * 17, "labels": [-100] * 3 + [1] * 14, "attention_mask": [1] * 17}, "a")
    assert buffer.size_in_bytes() == 42 + 68 + 3


class Record:
    pass


@pytest.mark.parametrize(
    "sample",
    [Record(), {"x": [Record()]}, {1, 2}, lambda: 0, np.array(["text"]), np.array([Record()]), np.datetime64("2020")],
    ids=["object", "nested object", "set", "function", "array of texts", "array of objects", "date"],
)
def test_what_needs_pickle_is_refused(sample):
    with pytest.raises(TypeError):
        ReplayBuffer(1).add(sample, "a")


def test_refusal_names_the_type():
    with pytest.raises(TypeError, match="Record"):
        ReplayBuffer(1).add({"x": Record()}, "a")


class Label(enum.IntEnum):
    CAT = 1


def test_number_of_a_class_of_the_users_does_not_make_an_unreadable_checkpoint():
    # An IntEnum is an int, yet torch.save pickles its class and weights_only=True refuses the whole checkpoint.
    buffer = ReplayBuffer(1)
    try:
        buffer.add((torch.zeros(1), Label.CAT), "a")
    except TypeError:
        return
    state = torch.load(io.BytesIO(saved(buffer)), weights_only=True)
    assert state["samples"] is not None
