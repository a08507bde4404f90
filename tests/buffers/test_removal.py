"""What must be forgotten: gone at once, gone from every file, and gone for good."""

from __future__ import annotations

import io
import itertools
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_cl.buffers import DiskStore, ReplayBuffer, read_folder, remove_from_folder
from lightning_cl.buffers.disk.segment import RemovedError


def document(number: int, length: int = 12) -> dict:
    """Token ids that occur in no other record, and nowhere else in a file by chance."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(2**27, 2**31 - 1, (length,), generator=generator, dtype=torch.int64).int()
    return {"input_ids": ids, "loss_mask": torch.ones(length, dtype=torch.bool)}


def texts(number: int) -> tuple:
    return (f"the secret of record number {number:06d}", torch.full((6,), 1e6 + number, dtype=torch.float64), number)


def traces(number: int) -> list[bytes]:
    """What of a record must not be found anywhere: its ids in twos, its text, its numbers, what was beside it."""
    ids = document(number)["input_ids"].numpy().tobytes()
    text, values, _ = texts(number)
    beside = logits(number)["logits"].numpy().tobytes()
    return [*(ids[i : i + 8] for i in range(0, len(ids) - 7, 4)), text.encode(), values.numpy().tobytes(), beside]


def logits(number: int) -> dict:
    return {"logits": torch.full((4,), 0.1 + 1e-3 * number, dtype=torch.float64)}


def disk(folder, capacity=50, policy="fifo", seed=0) -> ReplayBuffer:
    return ReplayBuffer(capacity, policy, seed=seed, store=DiskStore(Path(folder)))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(state, folder, capacity=50, policy="fifo") -> ReplayBuffer:
    buffer = disk(folder, capacity, policy, seed=9)
    buffer.load_state_dict(through_a_file(state))
    return buffer


def fill(buffer, numbers, task="a") -> None:
    for number in numbers:
        sample = texts(number) if number % 4 == 3 else document(number)
        buffer.add(sample, task, position=number, extra=logits(number) if number % 2 else None)


def positions(buffer) -> set[int]:
    return {buffer.info(number).position for number in buffer.numbers}


def found_in(folder, number: int) -> list[str]:
    """Files in which anything of a record is left."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if any(trace in path.read_bytes() for trace in traces(number))]


def is_one_of(*numbers):
    return lambda stored: stored.position in numbers


GONE = (3, 5, 8)


@pytest.fixture
def buffer(tmp_path):
    buffer = disk(tmp_path)
    fill(buffer, range(12))
    buffer.commit()
    return buffer


def test_traces_are_found_where_nothing_was_removed(buffer, tmp_path):
    # Else the other tests could not fail.
    for number in range(12):
        assert any("tokens.bin" in name or "blobs.bin" in name for name in found_in(tmp_path, number))


# ---------------------------------------------------------------------- at once


@pytest.mark.parametrize("committed", [True, False])
def test_removed_samples_are_gone_at_once_from_the_buffer_and_the_files(tmp_path, committed):
    buffer = disk(tmp_path)
    fill(buffer, range(12))
    if committed:
        buffer.commit()
    numbers = {buffer.info(number).position: number for number in buffer.numbers}
    assert buffer.remove(is_one_of(*GONE)) == 3
    assert positions(buffer) == set(range(12)) - set(GONE)
    assert (len(buffer), len(buffer.items), len(buffer.tasks), buffer.counts()) == (9, 9, 9, {"a": 9})
    for number in GONE:
        with pytest.raises(RemovedError):
            buffer.get(numbers[number])
        with pytest.raises(RemovedError):
            buffer.extra(numbers[number])
        assert found_in(tmp_path, number) == []
    for number in set(range(12)) - set(GONE):
        sample = buffer.get(numbers[number])
        if number % 4 == 3:
            assert sample[0] == texts(number)[0]
        else:
            assert torch.equal(sample["input_ids"], document(number)["input_ids"])
        assert buffer.extra(numbers[number]).keys() == ({"logits"} if number % 2 else set())
    buffer.commit()
    assert all(found_in(tmp_path, number) == [] for number in GONE)


def test_removed_samples_are_never_drawn(buffer):
    buffer.remove(is_one_of(*GONE))
    drawn = {buffer.info(buffer.pick(value)).position for value in range(2000)}
    assert drawn == set(range(12)) - set(GONE)
    of_a = {buffer.info(buffer.pick(value, "a")).position for value in range(2000)}
    assert of_a == drawn


def test_everything_can_be_removed(buffer, tmp_path):
    assert buffer.remove(lambda stored: True) == 12
    assert (len(buffer), buffer.items, buffer.counts(), buffer.pick(3)) == (0, [], {}, None)
    assert all(found_in(tmp_path, number) == [] for number in range(12))
    fill(buffer, range(20, 24))
    assert positions(resumed(buffer.state_dict(), tmp_path)) == {20, 21, 22, 23}


def test_nothing_is_removed_where_nothing_is_meant(buffer):
    assert buffer.remove(lambda stored: False) == 0
    assert len(buffer) == 12


def test_a_predicate_that_fails_removes_nothing(buffer, tmp_path):
    with pytest.raises(KeyError):
        buffer.remove(lambda stored: stored.position == 3 or {}["x"])
    assert positions(buffer) == set(range(12))
    assert found_in(tmp_path, 3)


def test_the_predicate_sees_sample_task_place_and_class(tmp_path):
    buffer = ReplayBuffer(50, "class_balanced", store=DiskStore(tmp_path))
    for number in range(6):
        buffer.add((torch.tensor([number]), number % 2), "ab"[number // 3], position=10 + number)
    seen = []
    buffer.remove(lambda stored: seen.append(stored) or False)
    assert [(int(s.sample[0]), s.task, s.position, s.label) for s in seen] == [
        (number, "ab"[number // 3], 10 + number, number % 2) for number in range(6)
    ]
    assert buffer.remove(lambda stored: stored.task == "b" and stored.label == 1) == 2
    assert sorted(int(x) for x, _ in buffer.items) == [0, 1, 2, 4]


def test_what_the_buffer_has_let_go_is_removed_from_the_disk_too(tmp_path):
    buffer = disk(tmp_path, 4)
    fill(buffer, range(12))
    buffer.commit()
    assert found_in(tmp_path, 3)
    assert buffer.remove(is_one_of(*GONE, 10)) == 4
    assert positions(buffer) == {8, 9, 10, 11} - {8, 10}
    assert all(found_in(tmp_path, number) == [] for number in (*GONE, 10))


# ---------------------------------------------------------------------- for good


def test_removed_samples_are_not_stored_again(buffer, tmp_path):
    buffer.remove(is_one_of(*GONE))
    fill(buffer, GONE, "b")
    fill(buffer, range(20, 23), "b")
    buffer.add(document(5), "b", position=5, extra=logits(7))  # with something else beside it
    buffer.commit()
    assert positions(buffer) == {*range(12), 20, 21, 22} - set(GONE)
    assert all(found_in(tmp_path, number) == [] for number in GONE)


def test_a_removed_sample_that_is_offered_again_takes_nobodys_place(tmp_path):
    for policy in ("fifo", "reservoir"):
        folder = tmp_path / policy
        buffer = disk(folder, 4, policy)
        fill(buffer, range(6))
        gone = min(positions(buffer))
        buffer.remove(is_one_of(gone))
        before = positions(buffer)
        for _ in range(50):
            fill(buffer, [gone])
        assert positions(buffer) == before
        fill(buffer, range(20, 200))
        assert len(buffer) == 4


def test_a_removal_outlives_resumes_from_every_older_checkpoint(tmp_path):
    buffer, states = disk(tmp_path, 8), []
    for number in range(12):
        fill(buffer, [number])
        states.append(through_a_file(buffer.state_dict()))
    buffer.remove(is_one_of(*GONE))
    for number, state in enumerate(states):
        again = resumed(state, tmp_path, 8)
        assert positions(again) == set(range(max(number - 7, 0), number + 1)) - set(GONE)
        fill(again, GONE, "again")
        assert not positions(again) & set(GONE)
        fill(again, range(100, 120), "new")
        assert len(again) == 8  # the places of what was removed are filled again
        final = resumed(again.state_dict(), tmp_path, 8)
        assert positions(final) == set(range(112, 120))
    assert all(found_in(tmp_path, number) == [] for number in GONE)


def test_a_removal_without_a_run_reaches_every_checkpoint(tmp_path):
    buffer = disk(tmp_path, 8)
    fill(buffer, range(6))
    early = through_a_file(buffer.state_dict())
    fill(buffer, range(6, 12))
    late = through_a_file(buffer.state_dict())
    buffer.write_index()
    assert remove_from_folder(tmp_path, is_one_of(*GONE)) == 3
    assert all(found_in(tmp_path, number) == [] for number in GONE)
    assert positions(resumed(early, tmp_path, 8)) == {0, 1, 2, 4}
    assert positions(resumed(late, tmp_path, 8)) == set(range(4, 12)) - set(GONE)
    adopted = disk(tmp_path, 8)
    adopted.adopt()
    assert positions(adopted) == set(range(4, 12)) - set(GONE)
    for again in (resumed(early, tmp_path, 8), adopted):
        fill(again, GONE)
        assert not positions(again) & set(GONE)
    assert {stored.position for stored in read_folder(tmp_path)}.isdisjoint(GONE)
    assert remove_from_folder(tmp_path, is_one_of(*GONE)) == 0


@pytest.mark.parametrize("function", [read_folder, lambda folder: remove_from_folder(folder, lambda stored: True)])
def test_a_folder_without_a_buffer_is_named(tmp_path, function):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*no buffer"):
        function(tmp_path)


def test_a_removal_follows_a_run_into_its_next_folder(tmp_path):
    first = disk(tmp_path / "first")
    fill(first, range(6))
    state = through_a_file(first.state_dict())
    second = resumed(state, tmp_path / "second")
    fill(second, range(6, 12))
    middle = through_a_file(second.state_dict())
    second.remove(is_one_of(*GONE))
    assert all(found_in(tmp_path, number) == [] for number in GONE)
    for old, folder in ((state, "first"), (middle, "second"), (middle, "third")):
        third = resumed(old, tmp_path / folder)
        fill(third, GONE)
        assert not positions(third) & set(GONE)


# ---------------------------------------------------------------------- copies


def large(buffer, numbers) -> None:
    """A megabyte beside each, so that there is something to compact."""
    for number in numbers:
        buffer.add(document(number), "a", position=number, extra={"x": torch.full((100_000,), number)})


def test_what_a_compaction_has_replaced_is_removed_too(tmp_path):
    buffer = disk(tmp_path, 3)
    large(buffer, range(12))
    before = through_a_file(buffer.state_dict())
    buffer.compact()
    after = through_a_file(buffer.state_dict())
    assert len({path.parent for path in tmp_path.rglob("records.bin")}) == 2
    buffer.remove(is_one_of(4, 10))
    assert found_in(tmp_path, 4) == []
    assert found_in(tmp_path, 10) == []
    assert positions(buffer) == positions(resumed(after, tmp_path, 3)) == {9, 11}
    assert positions(resumed(before, tmp_path, 3)) == {9, 11}


def test_what_a_compaction_has_replaced_is_removed_also_after_a_resume(tmp_path):
    buffer = disk(tmp_path, 3)
    large(buffer, range(12))
    before = through_a_file(buffer.state_dict())
    buffer.compact()
    again = resumed(buffer.state_dict(), tmp_path, 3)  # which knows nothing of the old files
    again.remove(is_one_of(4, 10))
    assert found_in(tmp_path, 4) == []
    assert found_in(tmp_path, 10) == []
    assert positions(resumed(before, tmp_path, 3)) == {9, 11}


def test_what_a_killed_run_left_in_the_folder_is_removed_too(tmp_path):
    # Killed, gone on with from its last checkpoint, killed again, and again: each has stored the samples once more.
    first = disk(tmp_path)
    fill(first, range(6))
    state = through_a_file(first.state_dict())
    killed = resumed(state, tmp_path)
    fill(killed, range(6, 12))
    last = through_a_file(killed.state_dict())
    again = resumed(state, tmp_path)
    fill(again, range(6, 12))
    again.commit()
    again.remove(is_one_of(*GONE))
    assert positions(again) == set(range(12)) - set(GONE)
    assert all(found_in(tmp_path, number) == [] for number in GONE)
    assert positions(resumed(last, tmp_path)) == set(range(12)) - set(GONE)


def test_compaction_after_a_removal_keeps_what_is_left(tmp_path):
    buffer = disk(tmp_path, 4)
    large(buffer, range(12))
    buffer.remove(is_one_of(9))
    buffer.compact()
    state = through_a_file(buffer.state_dict())
    buffer.compact()
    for each in (buffer, resumed(state, tmp_path, 4)):
        assert positions(each) == {8, 10, 11}
        large(each, [9])
        assert positions(each) == {8, 10, 11}
        assert found_in(tmp_path, 9) == []


def test_a_removal_is_remembered_where_the_files_that_it_was_in_are_left_behind(tmp_path):
    # The second run keeps copies of its own, and does not look into the folder of the first any more.
    first = disk(tmp_path / "first", 3)
    large(first, range(12))
    first.remove(is_one_of(4, 10))
    second = resumed(first.state_dict(), tmp_path / "second", 3)
    second.compact()
    state = through_a_file(second.state_dict())
    shutil.rmtree(tmp_path / "first")
    third = resumed(state, tmp_path / "second", 3)
    assert positions(third) == {9, 11}
    large(third, [4, 10])
    assert positions(third) == {9, 11}


# ---------------------------------------------------------------------- interrupted, damaged


class Killed(BaseException):
    """Nobody catches it."""


def test_killed_at_any_write_of_a_removal_it_is_finished_by_the_next(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    buffer = disk(whole)
    fill(buffer, range(12))
    state = through_a_file(buffer.state_dict())
    opened, killed = Path.open, 0
    for count in itertools.count():
        folder = tmp_path / str(count)
        shutil.copytree(whole, folder)
        left = [count]

        def open_counted(path, mode="r", *args, left=left, **settings):
            if set(mode) & set("wa+"):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return opened(path, mode, *args, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", open_counted)
            try:
                remove_from_folder(folder, is_one_of(*GONE))
                break
            except Killed:
                killed += 1
        moved = dict(state, store=dict(state["store"], segments=[str(folder / "0000")]))
        again = resumed(moved, folder)
        for number in GONE:  # still there, or nowhere
            assert bool(found_in(folder, number)) == (number in positions(again)), count
        remove_from_folder(folder, is_one_of(*GONE))
        assert all(found_in(folder, number) == [] for number in GONE), count
        again = resumed(moved, folder)
        fill(again, GONE)
        assert positions(again) == set(range(12)) - set(GONE), count
    assert killed >= 6


def test_a_list_of_removed_samples_that_was_cut_off_loses_no_other_entry(tmp_path):
    buffer = disk(tmp_path)
    fill(buffer, range(12))
    state = through_a_file(buffer.state_dict())
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    buffer.remove(is_one_of(3, 5))
    (listed,) = [path for path in tmp_path.iterdir() if path.is_file() and path not in whole and path.suffix == ".bin"]
    content = listed.read_bytes()
    for end in range(len(content) // 2, len(content)):  # killed while the second of them was written
        for path, old in whole.items():
            path.write_bytes(old)
        listed.write_bytes(content[:end])
        again = resumed(state, tmp_path)
        assert again.remove(is_one_of(5, 8)) == 2
        final = resumed(again.state_dict(), tmp_path)
        fill(final, [5, 8])
        assert not positions(final) & {5, 8}, end


def test_a_flipped_bit_in_the_list_of_removed_samples_is_an_error_that_names_it(buffer, tmp_path):
    state = through_a_file(buffer.state_dict())
    before = set(tmp_path.iterdir())
    buffer.remove(is_one_of(*GONE))
    (listed,) = [path for path in tmp_path.iterdir() if path not in before and path.suffix == ".bin"]
    content = listed.read_bytes()
    for place in range(len(content)):
        listed.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(ValueError, match=re.escape(str(listed))):
            resumed(state, tmp_path)


class Reading(Dataset):
    def __init__(self, buffer):
        self.buffer = buffer

    def __len__(self):
        return len(self.buffer)

    def __getitem__(self, index):
        try:
            return self.buffer[index]
        except RemovedError:
            return "removed"


def test_workers_that_were_forked_before_a_commit_do_not_write_a_removed_sample_again(tmp_path):
    buffer = disk(tmp_path)
    fill(buffer, range(12))  # waits to be written
    loader = iter(DataLoader(Reading(buffer), 1, collate_fn=list, num_workers=1, multiprocessing_context="fork"))
    buffer.remove(is_one_of(8, 10, 11))
    read = [sample for (sample,) in loader]
    assert read[11] == "removed"
    assert [number for number in (8, 10, 11) if found_in(tmp_path, number)] == []


def test_a_full_disk_does_not_hide_that_a_removal_failed(buffer, tmp_path, monkeypatch):
    opened = Path.open

    def full(path, mode="r", *args, **settings):
        if set(mode) & set("wa+"):
            raise OSError(28, os.strerror(28))
        return opened(path, mode, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OSError, match="disk is full"):
            buffer.remove(is_one_of(*GONE))
    assert buffer.remove(is_one_of(*GONE)) == 3
    assert all(found_in(tmp_path, number) == [] for number in GONE)
    assert positions(buffer) == set(range(12)) - set(GONE)
    assert positions(resumed(buffer.state_dict(), tmp_path)) == set(range(12)) - set(GONE)
    fill(buffer, GONE)
    assert positions(buffer) == set(range(12)) - set(GONE)


# ---------------------------------------------------------------------- in memory


def test_a_buffer_in_memory_forgets_too_and_so_do_its_checkpoints():
    buffer = ReplayBuffer(50, "fifo")
    fill(buffer, range(12))
    assert buffer.remove(is_one_of(*GONE)) == 3
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    for number in GONE:
        assert not any(trace in file.getvalue() for trace in traces(number))
    assert any(trace in file.getvalue() for trace in traces(4))
    again = ReplayBuffer(50, "fifo")
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for each in (buffer, again):
        fill(each, GONE)
        assert positions(each) == set(range(12)) - set(GONE)


def test_a_removal_from_memory_goes_along_to_the_disk(tmp_path):
    # A Trainer says where its files lie only when it has begun.
    buffer = ReplayBuffer(50, "fifo")
    fill(buffer, range(12))
    buffer.remove(is_one_of(*GONE))
    buffer.move_to(DiskStore(tmp_path))
    fill(buffer, GONE)
    again = resumed(buffer.state_dict(), tmp_path)
    fill(again, GONE)
    for each in (buffer, again):
        assert positions(each) == set(range(12)) - set(GONE)
