"""Records on disk: what was committed is whole whatever happens, and what is damaged is named."""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
import re
import shutil
import textwrap
import time
import tracemalloc
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from torch.utils.data import DataLoader, Dataset

from lightning_cl.buffers import DiskStore, ReplayBuffer, read_folder
from lightning_cl.buffers.disk import layout, segment

FILES = ("records.bin", "tokens.bin", "mask.bin", "blobs.bin", "names.jsonl")


def disk(folder, capacity=1000, policy="fifo", **settings) -> ReplayBuffer:
    return ReplayBuffer(capacity, policy, store=DiskStore(Path(folder), settings))


def document(number: int, length: int | None = None) -> dict:
    """A token record that can be told from any other."""
    length = 5 + 7 * number % 23 if length is None else length
    places = torch.arange(length, dtype=torch.int32)
    return {"input_ids": places * 11 + 1000 * number + 1, "loss_mask": (places + number) % 3 != 0}


def mixed(number: int) -> object:
    """Records of different kinds, so that all files are written to."""
    if number % 3 == 2:
        return {"text": f"record {number}", "x": (torch.full((3,), float(number)), number)}
    return document(number)


def same(left, right) -> bool:
    """Equal in value, type, dtype and container, all the way down; NaN is NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        return left.contiguous().view(-1).view(torch.uint8).equal(right.contiguous().view(-1).view(torch.uint8))
    if isinstance(left, (np.ndarray, np.generic)):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, float):
        return (math.isnan(left) and math.isnan(right)) or (left == right and str(left) == str(right))
    return left == right


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(state, folder, capacity=1000, policy="fifo", **settings) -> ReplayBuffer:
    buffer = disk(folder, capacity, policy, **settings)
    buffer.load_state_dict(through_a_file(state))
    return buffer


def in_order(buffer) -> list:
    """The documents of a buffer by their numbers: it may hold them in any order."""
    return sorted(buffer.items, key=lambda sample: int(sample["input_ids"][0]))


def in_another_process(code: str, *arguments) -> forked.Started:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n" + textwrap.dedent(code)
    return forked.start("-c", code, *arguments)


def size_on_disk(folder) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


# ---------------------------------------------------------------------- the layout

# By the table in `layout`, not by its constant: what another program would write down.
FIELDS = {
    "start": "<u8",
    "length": "<u4",
    "loss_tokens": "<i4",
    "blob": "<u8",
    "blob_size": "<u4",
    "task": "<u4",
    "form": "<u4",
    "position": "<i8",
    "label": "<i8",
    "flags": "<u4",
    "data_crc": "<u4",
    "crc": "<u4",
}

WRITE = """
    import os
    from test_storage_on_disk import disk, mixed
    buffer = disk(sys.argv[1])
    for number in range(12):
        extra = {"logits": __import__("torch").full((2, 2), float(number))} if number == 4 else None
        buffer.add(mixed(number), "chat" if number < 6 else "code", position=100 + number, extra=extra)
    buffer.commit()
    buffer.add(mixed(99), "lost")
    os._exit(0)
"""


@pytest.fixture(scope="module")
def written_elsewhere(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    with in_another_process(WRITE, folder) as process:
        assert process.wait(60) == 0, process.stderr
    return folder / "0000"


@pytest.fixture
def numpy_lines():
    """The lines of the module's docstring, as they stand."""
    block = layout.__doc__.split("without this library::")[1].split("\nRecords are written once")[0]
    return textwrap.dedent(block)


@pytest.mark.parametrize("number", [0, 4, 7, 10])
def test_numpy_reads_the_files_of_another_process_with_the_documented_lines(
    written_elsewhere, numpy_lines, monkeypatch, number
):
    monkeypatch.chdir(written_elsewhere)
    record_type = np.dtype(list(FIELDS.items()))
    assert record_type.itemsize == 64
    names = {"np": np, "RECORD": record_type}
    exec(re.sub(r"\[7\]", f"[{number}]", numpy_lines), names)
    assert len(names["records"]) == 12
    assert names["ids"].tolist() == document(number)["input_ids"].tolist()
    assert names["learnt"].astype(bool).tolist() == document(number)["loss_mask"].tolist()
    record = names["records"][number]
    assert record["position"] == 100 + number
    assert record["label"] == -1
    assert record["loss_tokens"] == int(document(number)["loss_mask"][1:].sum())
    assert record["start"] % 8 == 0


def test_what_is_no_token_sequence_lies_in_the_blobs_as_safetensors(written_elsewhere):
    records = np.memmap(written_elsewhere / "records.bin", np.dtype(list(FIELDS.items())), "r", 64)
    blobs = (written_elsewhere / "blobs.bin").read_bytes()[64:]
    for number in (2, 5, 8, 11):
        record = records[number]
        assert (record["length"], record["loss_tokens"]) == (0, -1)
        parts = load_tensors(blobs[record["blob"] : record["blob"] + record["blob_size"]])
        assert any(torch.equal(part, torch.full((3,), float(number))) for part in parts.values())
    beside = records[4]
    (logits,) = load_tensors(blobs[beside["blob"] : beside["blob"] + beside["blob_size"]]).values()
    assert torch.equal(logits, torch.full((2, 2), 4.0))


def test_names_say_what_the_numbers_mean(written_elsewhere):
    lines = [json.loads(line) for line in (written_elsewhere / "names.jsonl").read_text().splitlines()]
    tasks = {line["task"]: line["name"] for line in lines if "task" in line}
    records = np.memmap(written_elsewhere / "records.bin", np.dtype(list(FIELDS.items())), "r", 64)
    assert [tasks[int(number)] for number in records["task"]] == ["chat"] * 6 + ["code"] * 6


def test_a_buffers_folder_is_read_without_a_run(written_elsewhere):
    found = list(read_folder(written_elsewhere.parent))
    assert [stored.position for stored in found] == list(range(100, 112))
    assert [stored.task for stored in found] == ["chat"] * 6 + ["code"] * 6
    assert all(same(stored.sample, mixed(number)) for number, stored in enumerate(found))


# ---------------------------------------------------------------------- size


def test_ten_thousand_samples_of_two_million_tokens_take_ten_megabytes(tmp_path):
    lengths = torch.randint(20, 381, (10_000,), generator=torch.Generator().manual_seed(0))
    lengths[0] += 2_000_000 - int(lengths.sum())
    assert 0 < lengths[0] < 30_000
    buffer = disk(tmp_path, 10_000, "reservoir")
    ids = torch.arange(40_000, dtype=torch.int32)
    mask = ids % 2 == 0
    for length in lengths.tolist():
        buffer.add({"input_ids": ids[:length], "loss_mask": mask[:length]}, "dolly")
    buffer.commit()
    buffer.write_index()
    state = io.BytesIO()
    torch.save(buffer.state_dict(), state)
    assert len(buffer) == 10_000
    records = sum(path.stat().st_size for path in (tmp_path / "0000").iterdir())
    assert 8_220_000 < records <= 10_000_000
    assert len(state.getvalue()) < 1_000_000  # a checkpoint holds which, and not what


READ = """
    from test_storage_on_disk import disk, document, resumed
    import torch
    def resident():
        return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
    buffer, length, count = disk(sys.argv[1]), 131_072, 240
    buffer.add(document(0, length), "a"); buffer.commit(); buffer[0]
    start, wrote, read = resident(), 0.0, 0.0
    for number in range(1, count):
        buffer.add(document(number, length), "a")
        wrote = max(wrote, resident())
    state = buffer.state_dict()
    for reader in (buffer, resumed(state, sys.argv[1])):
        read = max(read, resident())
        for number in range(count):
            assert int(reader[number]["input_ids"][-1]) == (length - 1) * 11 + 1000 * number + 1
            read = max(read, resident())
    print(wrote - start, read - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the resident memory is read from /proc")
def test_resident_memory_does_not_grow_with_the_file(tmp_path):
    with in_another_process(READ, tmp_path) as process:
        assert process.wait(120) == 0, process.stderr
        wrote, read = map(float, process.stdout.split())
    assert size_on_disk(tmp_path) > 125e6
    assert wrote < 50
    assert read < 50


def test_the_index_of_a_million_samples_fits_fifty_megabytes():
    tracemalloc.start()
    buffer = ReplayBuffer(20_000)
    for number in range(20_000):
        buffer.put_number(buffer.choose_slot("a"), number)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used / 20_000 < 50


def test_drawing_takes_as_long_from_a_large_buffer_as_from_a_small_one(tmp_path):
    def seconds(size):
        buffer = disk(tmp_path / str(size), size)
        sample = document(3)
        for _ in range(size):
            buffer.add(sample, "a")
        buffer.commit()
        start = time.process_time()
        for value in range(500):
            buffer.get(buffer.pick(value))
        return time.process_time() - start

    seconds(100)
    assert seconds(20_000) < 10 * seconds(100)  # two hundred times, if it were linear


# ---------------------------------------------------------------------- every kind of sample

IDS = [5, 2**31 - 1, 0, 7, 9]
MASKED = [-100, 2**31 - 1, -100, 7, 9]
KINDS = {
    "plain record": document(3),
    "plain record without loss": {"input_ids": torch.arange(3).int(), "loss_mask": torch.zeros(3, dtype=torch.bool)},
    "plain record, fields swapped": dict(reversed(document(4).items())),
    "empty plain record": {"input_ids": torch.empty(0).int(), "loss_mask": torch.empty(0, dtype=torch.bool)},
    "record of int64": {"input_ids": torch.tensor(IDS), "loss_mask": torch.ones(5, dtype=torch.bool)},
    "strided record": {"input_ids": torch.arange(20).int()[::3], "loss_mask": (torch.arange(20) > 7)[::3]},
    "lists": {"input_ids": IDS, "labels": MASKED},
    "lists and attention": {"input_ids": IDS, "attention_mask": [1] * 5, "labels": MASKED},
    "labels first": {"labels": MASKED, "attention_mask": [1] * 5, "input_ids": IDS},
    "tensors": {"input_ids": torch.tensor(IDS), "labels": torch.tensor(MASKED)},
    "tensors and attention": {
        "input_ids": torch.tensor(IDS),
        "attention_mask": torch.ones(5, dtype=torch.bool),
        "labels": torch.tensor(MASKED),
    },
    "arrays": {"input_ids": np.array(IDS), "labels": np.array(MASKED, dtype=np.int32)},
    "lists and tensors": {"input_ids": IDS, "labels": torch.tensor(MASKED, dtype=torch.int32)},
    "small ids": {"input_ids": torch.tensor([1, 2, 255], dtype=torch.uint8), "labels": torch.tensor([-100, 2, 255])},
    "loss mask of numbers": {"input_ids": IDS, "loss_mask": [0, 1, 1, 0, 1]},
    "loss mask of other numbers": {"input_ids": torch.tensor(IDS), "loss_mask": torch.tensor([0, -1, 1, 2, 1])},
    "loss mask of truths": {"input_ids": IDS, "loss_mask": [False, True, True, False, True]},
    "ids alone": {"input_ids": IDS},
    "ids and attention": {"input_ids": torch.tensor(IDS), "attention_mask": torch.ones(5, dtype=torch.int64)},
    "padded": {"input_ids": IDS, "attention_mask": [1, 1, 1, 0, 0], "labels": MASKED},
    "labels that are not the ids": {"input_ids": IDS, "labels": [1, 2, 3, 4, 5]},
    "shifted labels": {"input_ids": IDS, "labels": [*IDS[1:], -100]},
    "labels of another length": {"input_ids": IDS, "labels": [1]},
    "ids out of range": {"input_ids": [2**31, 1], "labels": [2**31, 1]},
    "ids below zero": {"input_ids": [-100, 1], "labels": [-100, 1]},
    "huge ids": {"input_ids": [2**70, 1], "labels": [2**70, 1]},
    "empty lists": {"input_ids": [], "labels": [], "attention_mask": []},
    "rows": {"input_ids": torch.arange(6).reshape(2, 3), "labels": torch.arange(6).reshape(2, 3)},
    "more fields": {"input_ids": IDS, "labels": MASKED, "source": "web", "weight": 0.5},
    "ids and extra tensors": {"input_ids": torch.tensor(IDS), "labels": torch.tensor(MASKED), "x": torch.ones(2, 2)},
    "class beside ids": {"input_ids": torch.tensor(IDS), "labels": torch.tensor(3)},
    "tuple": (torch.arange(6.0).reshape(2, 3), 1),
    "pair of tensors": (torch.ones(2), torch.tensor(2)),
    "list of a tuple": [(1, torch.ones(1)), []],
    "nested": {"a": [({"b": (torch.tensor([1]), "c")}, np.int64(4))], "d": {}, "e": (), "f": None, 0: [None, {}]},
    "keys": {1: "number", "1": "text", (1, "a"): "pair", None: 0, 2.5: 1},
    "tensor": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "0-d tensor": torch.tensor(3.5),
    "empty tensors": (torch.empty(0), torch.empty(0, 4), torch.empty(3, 0, dtype=torch.int8)),
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "expanded": torch.ones(1, 3).expand(4, 3),
    "a row of a large tensor": torch.arange(1000.0).reshape(10, 100)[3],
    "dtypes": [
        torch.ones(2, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.bool)
    ],
    "not numbers": (torch.tensor([math.nan, math.inf, -0.0]), math.nan, -math.inf, -0.0, np.float32("nan")),
    "arrays of dtypes": [np.ones((2, 1), dtype=name) for name in ("f2", "f4", "f8", "i1", "u1", "i8", "u2", "?")],
    "array in columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "0-d and empty arrays": (np.array(3.5), np.empty((0, 2), dtype=np.int32), np.array([], dtype=np.float64)),
    "numpy scalars": (np.float64(0.1), np.int32(-3), np.bool_(True), np.uint8(255), np.float16(0.5)),
    "texts": ["", "ein Stück Text 🐍", "a\0b\n", "\ud800", 'quote " and \\'],
    "text": "just a text",
    "bytes": (b"", b"\x00\xff\n"),
    "numbers": [1, -2.5, True, False, None, 0, 2**62, -(2**63), 2**64, -(10**30), 1e-320],
    "number": 7,
    "nothing": None,
}


@pytest.fixture(scope="module")
def stored_kinds(tmp_path_factory):
    """All kinds in one file: one must not change another."""
    folder = tmp_path_factory.mktemp("kinds")
    buffer = disk(folder)
    extras = {"plain record", "tuple", "0-d tensor", "nothing"}
    for name, sample in KINDS.items():
        extra = {"logits": torch.ones(2, 3, dtype=torch.bfloat16), "0": torch.tensor(4)} if name in extras else None
        buffer.add(sample, name, extra=extra)
    assert all(same(buffer[i], sample) for i, sample in enumerate(KINDS.values()))  # before they are on the disk
    return resumed(buffer.state_dict(), folder), extras


@pytest.mark.parametrize("kind", KINDS)
def test_sample_comes_back_from_the_disk_with_value_type_and_container(stored_kinds, kind):
    buffer, extras = stored_kinds
    number = buffer.numbers[list(KINDS).index(kind)]
    assert same(buffer.get(number), KINDS[kind])
    assert buffer.info(number).task == kind
    beside = buffer.extra(number)
    if kind in extras:
        assert same(dict(sorted(beside.items())), {"0": torch.tensor(4), "logits": torch.ones(2, 3).bfloat16()})
    else:
        assert beside == {}


@pytest.mark.parametrize("kind", KINDS)
def test_memory_gives_back_what_the_disk_gives_back(kind):
    buffer = ReplayBuffer(1)
    buffer.add(KINDS[kind], "a")
    state, fresh = through_a_file(buffer.state_dict()), ReplayBuffer(1)
    fresh.load_state_dict(state)
    assert same(fresh[0], KINDS[kind])


@pytest.mark.parametrize(
    "array",
    [np.arange(3, dtype=">i4"), np.arange(3, dtype=">f8"), np.ones(2, np.longdouble), np.ones(2, "c8")],
    ids=["big-endian integers", "big-endian floats", "long doubles", "complex"],
)
def test_an_array_that_torch_does_not_know_comes_back_or_is_refused_by_its_type(tmp_path, array):
    buffer = disk(tmp_path)
    refused = None
    try:
        buffer.add((array, 1), "a")
    except TypeError as error:
        refused = str(error)
    assert "numpy" in refused if refused else same(buffer[0], (array, 1))


def test_a_refused_sample_leaves_the_buffer_as_it_was(tmp_path):
    buffer = disk(tmp_path, 4)
    for number in range(3):
        buffer.add(document(number), "a")
    with pytest.raises(TypeError, match="set"):
        buffer.add({"x": {1, 2}}, "a")
    for number in range(3, 6):
        buffer.add(document(number), "a")
    assert same(in_order(buffer), [document(number) for number in range(2, 6)])


def test_loaded_samples_can_be_changed_without_changing_what_is_stored(tmp_path):
    buffer = disk(tmp_path)
    for sample in (document(0), (torch.ones(2), np.ones(2))):
        buffer.add(sample, "a")
    buffer.commit()
    buffer[0]["input_ids"].fill_(0)
    changed = buffer[1]
    changed[0].fill_(7)
    changed[1][:] = 7
    assert same(buffer.items, [document(0), (torch.ones(2), np.ones(2))])


# ---------------------------------------------------------------------- killed in the middle of a write

KILLED = """
    import os
    from pathlib import Path
    import torch
    from test_storage_on_disk import disk, document, resumed
    folder, checkpoint = Path(sys.argv[1]), Path(sys.argv[2])
    buffer = disk(folder, 20)
    if checkpoint.exists():
        buffer = resumed(torch.load(checkpoint, weights_only=True), folder, 20)
    while True:
        for _ in range(5):
            buffer.add(document(buffer.seen, 30_000 + buffer.seen), "a", position=buffer.seen)
        torch.save(buffer.state_dict(), checkpoint.with_suffix(".new"))
        os.replace(checkpoint.with_suffix(".new"), checkpoint)
        for _ in range(9):
            buffer.add(document(buffer.seen, 30_000 + buffer.seen), "a", position=buffer.seen)
        buffer[len(buffer) - 1]
"""


def test_killed_while_it_writes_all_that_was_committed_is_there(tmp_path):
    folder, checkpoint = tmp_path / "buffer", tmp_path / "state.pt"
    seen = 0
    for kill in range(3):
        with in_another_process(KILLED, folder, checkpoint) as process:
            end, last, changes = time.monotonic() + 60, checkpoint.exists() and checkpoint.stat().st_mtime_ns, 0
            while changes < 2 + kill and process.poll() is None and time.monotonic() < end:
                now = checkpoint.exists() and checkpoint.stat().st_mtime_ns
                changes, last = changes + (now != last), now
                time.sleep(0.001)
            time.sleep(0.004 * kill)
            assert process.poll() is None, process.stderr
            process.kill()
            process.wait()
        buffer = resumed(torch.load(checkpoint, weights_only=True), folder, 20)
        assert buffer.seen > seen  # the run before was gone on with
        seen = buffer.seen
        assert len(buffer) == min(20, seen)
        expected = range(max(seen - 20, 0), seen)
        assert same(in_order(buffer), [document(number, 30_000 + number) for number in expected])
        for stored in read_folder(folder):  # nothing that lies there is half a record
            assert same(stored.sample, document(stored.position, 30_000 + stored.position))


class Files:
    """A folder whose files are put back after each experiment."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.content = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    def restore(self):
        for path, content in self.content.items():
            path.write_bytes(content)


@pytest.fixture
def behind_a_commit(tmp_path):
    """A commit and, behind it, records of a new task and a new form; the sizes at the commit."""
    buffer = disk(tmp_path, 50)
    for number in range(5):
        buffer.add(mixed(number), "first", position=number)
    state = through_a_file(buffer.state_dict())
    sizes = {name: (tmp_path / "0000" / name).stat().st_size for name in FILES}
    for number in range(5, 9):
        buffer.add([mixed(number)] if number == 7 else mixed(number), "second", position=number)
    buffer.commit()
    expected = [mixed(number) for number in range(5)]
    later = {n: [mixed(n)] if n == 7 else mixed(n) for n in range(5, 9)}
    files = Files(tmp_path / "0000")
    assert all(len(files.content[tmp_path / "0000" / name]) > sizes[name] for name in FILES)
    return tmp_path, state, sizes, files, expected, later


def check_intact(folder, state, expected, later):
    buffer = disk(folder, 50)
    buffer.load_state_dict(state)
    assert same(buffer.items, expected)
    assert [buffer.info(number).task for number in buffer.numbers] == ["first"] * len(expected)
    stored = {found.position: found for found in read_folder(folder)}
    for number, sample in enumerate(expected):
        assert same(stored[number].sample, sample)
    for number in stored.keys() - set(range(len(expected))):
        assert same(stored[number].sample, later[number])  # whole, or not there
        assert stored[number].task == "second"


@pytest.mark.parametrize("name", FILES)
def test_files_cut_off_anywhere_behind_a_commit_lose_nothing_of_it(behind_a_commit, name):
    folder, state, sizes, files, expected, later = behind_a_commit
    path = folder / "0000" / name
    for end in range(sizes[name], len(files.content[path])):
        path.write_bytes(files.content[path][:end])
        check_intact(folder, state, expected, later)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("garbage", [b"\0", b"\xff", b"\n", b"}\n{"], ids=["zeros", "ones", "newline", "lines"])
def test_garbage_anywhere_behind_a_commit_loses_nothing_of_it(behind_a_commit, name, garbage):
    folder, state, sizes, files, expected, later = behind_a_commit
    path = folder / "0000" / name
    content = files.content[path]
    for start in range(sizes[name], len(content), 3):
        path.write_bytes(content[:start] + (garbage * 16)[:16] + content[start + 16 :])
        check_intact(folder, state, expected, later)


def test_any_mixture_of_cut_off_files_loses_nothing_of_a_commit(behind_a_commit):
    folder, state, sizes, files, expected, later = behind_a_commit
    generator = np.random.default_rng(0)
    for _ in range(100):
        for path, content in files.content.items():
            end = int(generator.integers(sizes[path.name], len(content) + 1))
            path.write_bytes(content[:end] + generator.bytes(int(generator.integers(0, 40))))
        check_intact(folder, state, expected, later)


def test_a_run_goes_on_behind_what_a_killed_one_left(behind_a_commit):
    folder, state, sizes, files, expected, _ = behind_a_commit
    for name in FILES:
        (folder / "0000" / name).write_bytes(files.content[folder / "0000" / name][: sizes[name] + 9])
    buffer = disk(folder, 50)
    buffer.load_state_dict(state)
    for number in range(20, 24):
        buffer.add(mixed(number), "third")
    again = disk(folder, 50)
    again.load_state_dict(through_a_file(buffer.state_dict()))
    assert same(again.items, [*expected, *(mixed(number) for number in range(20, 24))])


class Disk:
    """So many bytes are left; a write that does not fit writes what fits, as the operating system does."""

    def __init__(self, monkeypatch, folder, error=None):
        self.left, opened = math.inf, Path.open
        self.error = error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no crash of the machine is tested here

        def open_counted(path, mode="r", *args, **kwargs):
            file = opened(path, mode, *args, **kwargs)
            if set(mode) & set("wa+") and folder in path.parents:
                return Counted(file, self)
            return file

        monkeypatch.setattr(Path, "open", open_counted)


class Counted:
    def __init__(self, file, disk):
        self.file, self.disk = file, disk

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        fits = int(min(len(data), max(self.disk.left, 0)))
        self.file.write(data[:fits])
        self.disk.left -= fits
        if fits < len(data):
            self.file.flush()
            raise self.disk.error
        return fits


class Killed(BaseException):
    """Nobody catches it."""


def test_killed_at_any_byte_of_what_is_written_loses_nothing_of_a_commit(tmp_path, monkeypatch):
    # Also while a segment begins: each of its files may be missing, or end anywhere.
    room = Disk(monkeypatch, tmp_path, Killed())
    expected, killed = [mixed(number) for number in range(5)], 0
    for left in itertools.chain(range(0, 460, 5), range(460, 1300, 41)):
        folder = tmp_path / str(left)
        first = disk(folder, 50)
        for number in range(5):
            first.add(mixed(number), "first", position=number)
        state = through_a_file(first.state_dict())
        second = resumed(state, folder, 50)
        room.left = left
        try:
            for number in range(5, 9):
                second.add(mixed(number), "second", position=number)
            second.commit()
        except Killed:
            killed += 1
        room.left = math.inf
        check_intact(folder, state, expected, {number: mixed(number) for number in range(5, 9)})
        third = resumed(state, folder, 50)
        third.add(mixed(20), "third")
        assert same(resumed(third.state_dict(), folder, 50).items, [*expected, mixed(20)])
    assert killed > 100


# ---------------------------------------------------------------------- damaged files


@pytest.fixture
def committed(tmp_path):
    """Records without padding between them: every byte counts."""
    buffer = disk(tmp_path, 50, tokenizer="ours")
    samples = [document(1, 8), document(2, 16), (torch.ones(2), "text"), document(3, 8)]
    for number, sample in enumerate(samples):
        extra = {"logits": torch.ones(3)} if number == 1 else None
        buffer.add(sample, "first" if number < 2 else "second", position=number, extra=extra)
    buffer.commit()
    return tmp_path, through_a_file(buffer.state_dict()), Files(tmp_path / "0000"), samples


def everything(buffer):
    """What a buffer tells of its samples."""
    infos = [buffer.info(number) for number in buffer.numbers]
    extras = [buffer.extra(number) for number in buffer.numbers]
    return [*buffer.items, [tuple(info) for info in infos], extras]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_an_error_that_names_the_file(committed, name):
    folder, state, files, _ = committed
    path = folder / "0000" / name
    content, right = files.content[path], None
    right = everything(resumed(state, folder, 50))
    silent = []
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        message = ""
        try:
            found = everything(resumed(state, folder, 50, tokenizer="ours"))
        except layout.DamagedFileError as error:
            message = str(error)
        if message:
            assert name in message, place
            assert str(folder) in message
        else:
            assert same(found, right), f"byte {place} of {name} is wrong, and nobody says so"
            silent.append(place)
    assert name == "names.jsonl" or silent == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_off_inside_a_commit_is_named(committed, name, monkeypatch):
    monkeypatch.setattr(segment, "_PATIENCE", 0.0)  # a reader waits for records that another rank may still write
    folder, state, files, _ = committed
    path = folder / "0000" / name
    content = files.content[path]
    for end in range(0, len(content) - 1, 5):
        path.write_bytes(content[:end])
        with pytest.raises(layout.DamagedFileError, match=re.escape(str(path))):
            everything(resumed(state, folder, 50))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(committed, name):
    folder, state, _, _ = committed
    (folder / "0000" / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(folder / "0000" / name))):
        everything(resumed(state, folder, 50))


@pytest.mark.parametrize("name", FILES[:4])
@pytest.mark.parametrize("other", ["text", "empty", "kind", "version"])
def test_a_wrong_header_is_named(committed, name, other):
    folder, state, files, _ = committed
    path = folder / "0000" / name
    content = files.content[path]
    next_kind = folder / "0000" / FILES[(FILES.index(name) + 1) % 4]
    wrong = {
        "text": b"somebody's notes".ljust(len(content), b"."),
        "empty": b"",
        "kind": files.content[next_kind][:64] + content[64:],
        "version": content[:8] + b"\x09\0\0\0" + content[12:],
    }
    path.write_bytes(wrong[other])
    with pytest.raises(layout.DamagedFileError, match=re.escape(str(path))) as error:
        resumed(state, folder, 50)
    assert ("version" in str(error.value)) == (other == "version")


def test_a_missing_segment_is_named_and_what_to_do(committed):
    folder, state, _, _ = committed
    (folder / "0000").rename(folder.parent / "elsewhere")
    with pytest.raises(FileNotFoundError, match=re.escape(str(folder / "0000"))):
        resumed(state, folder, 50)
    (folder.parent / "elsewhere").rename(folder / "0000")
    assert len(resumed(state, folder, 50)) == 4


def test_a_run_folder_that_was_moved_is_found_at_its_new_place(committed, tmp_path_factory):
    folder, state, _, samples = committed
    place = tmp_path_factory.mktemp("moved") / "buffer"
    folder.rename(place)
    assert same(resumed(state, place, 50).items, samples)


def test_another_runs_segment_of_the_same_name_is_not_taken_for_the_checkpoints(committed, tmp_path_factory):
    # Run folders are moved, deleted and filled again; every one of them begins with a segment 0000.
    folder, state, _, _ = committed
    place = tmp_path_factory.mktemp("other")
    other = disk(place, 50)
    for number in range(40, 44):
        other.add(document(number), "other")
    other.commit()
    (folder / "0000").rename(folder.parent / "elsewhere")
    (place / "0000").rename(folder / "0000")
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(folder / "0000"))):
        resumed(state, folder, 50)


def test_samples_of_another_tokenizer_are_refused(committed):
    folder, state, _, samples = committed
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))}.*another tokenizer"):
        resumed(state, folder, 50, tokenizer="theirs")
    with pytest.raises(ValueError, match="another tokenizer"):
        resumed(state, folder, 50).store.expect_tokenizer("theirs")
    assert same(resumed(state, folder, 50, tokenizer="ours").items, samples)
    assert same(resumed(state, folder, 50).items, samples)  # of samples that are no tokens nobody asks


def test_a_damaged_index_of_an_earlier_run_is_named(committed):
    folder, state, _, samples = committed
    resumed(state, folder, 50).write_index()
    path = folder / "buffer.pt"
    content = path.read_bytes()
    for place in range(0, len(content), 41):
        path.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        buffer, message = disk(folder, 50), ""
        try:
            buffer.adopt()
        except layout.DamagedFileError as error:
            message = str(error)
        assert str(path) in message if message else same(buffer.items, samples), place


@pytest.mark.parametrize(
    ("argument", "settings"),
    [("buffer_size", {"capacity": 49}), ("policy", {"policy": "reservoir"}), ("unit", {"unit": "tokens"})],
)
def test_what_an_earlier_run_left_must_fit_the_buffer(committed, argument, settings):
    folder, state, _, _ = committed
    resumed(state, folder, 50).write_index()
    settings = {"capacity": 50, "policy": "fifo"} | settings
    buffer = ReplayBuffer(**settings, store=DiskStore(folder))
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))}.*{argument}="):
        buffer.adopt()


# ---------------------------------------------------------------------- worker processes


class Reading(Dataset):
    """Somebody's data set over a buffer."""

    def __init__(self, buffer):
        self.buffer = buffer

    def __len__(self):
        return len(self.buffer)

    def __getitem__(self, index):
        return self.buffer[index]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes_read_the_records(tmp_path, start):
    buffer = disk(tmp_path)
    for number in range(24):
        buffer.add(mixed(number), "a")
    buffer.commit()
    buffer[0]  # the maps are open when the workers begin
    loader = DataLoader(Reading(buffer), 4, collate_fn=list, num_workers=2, multiprocessing_context=start)
    found = [sample for batch in loader for sample in batch]
    assert same(found, [mixed(number) for number in range(24)])
    buffer.add(mixed(24), "a")  # workers leave the writer's place alone
    assert same(resumed(buffer.state_dict(), tmp_path).items, [mixed(number) for number in range(25)])


# ---------------------------------------------------------------------- a full disk


def test_a_disk_that_gets_full_at_any_byte_loses_nothing_and_the_buffer_goes_on(tmp_path, monkeypatch):
    room, failed = Disk(monkeypatch, tmp_path), 0
    for left in itertools.chain(range(0, 800, 9), [100_000]):
        folder = tmp_path / str(left)
        buffer = disk(folder, 50)
        for number in range(4):
            buffer.add(mixed(number), "first")
        state = through_a_file(buffer.state_dict())
        for number in range(4, 8):
            buffer.add(mixed(number), "second")
        room.left = left
        message = ""
        try:
            buffer.commit()
        except OSError as error:
            message, number = str(error), error.errno
        if message:
            failed += 1
            assert number == errno.ENOSPC
            assert re.search(rf"{re.escape(str(folder))}.*the disk is full.*make room", message)
        room.left = math.inf
        assert same(resumed(state, folder, 50).items, [mixed(number) for number in range(4)])
        for number in range(8, 12):
            buffer.add(mixed(number), "third")
        final = resumed(buffer.state_dict(), folder, 50)
        assert same(final.items, [mixed(number) for number in range(12)])
        assert [final.info(n).task for n in final.numbers] == ["first"] * 4 + ["second"] * 4 + ["third"] * 4
    assert failed > 50


@pytest.mark.parametrize("left", [0, 40, 64, 200, 300])
def test_a_disk_that_is_full_at_the_first_record_leaves_a_buffer_that_goes_on(tmp_path, monkeypatch, left):
    room = Disk(monkeypatch, tmp_path)
    buffer = disk(tmp_path, 50)
    room.left = left

    def fill():
        for number in range(4):
            buffer.add(mixed(number), "a")
            buffer.commit()

    with pytest.raises(OSError, match="disk is full"):
        fill()
    kept = buffer.items  # whichever were told to be stored
    room.left = math.inf
    for number in range(10, 14):
        buffer.add(mixed(number), "a")
    assert same(resumed(buffer.state_dict(), tmp_path, 50).items, [*kept, *(mixed(n) for n in range(10, 14))])
    assert len(list(read_folder(tmp_path))) >= 4


@pytest.mark.parametrize("policy", ["fifo", "reservoir"])
def test_a_sample_that_did_not_fit_the_disk_does_not_take_room_in_the_budget(tmp_path, monkeypatch, policy):
    room = Disk(monkeypatch, tmp_path)
    buffer = disk(tmp_path, 4, policy)
    for number in range(3):
        buffer.add(document(number), "a")
    buffer.commit()
    room.left = 5000
    with pytest.raises(OSError, match="disk is full"):
        buffer.add(document(3, 400_000), "a")  # too much to wait for a commit
    room.left = math.inf
    assert len(buffer.items) >= 3
    for number in range(4, 30):
        buffer.add(document(number), "a")
    assert len(buffer) == len(buffer.items) == 4
    final = resumed(buffer.state_dict(), tmp_path, 4, policy)
    assert same(final.items, buffer.items)
    if policy == "fifo":
        assert same(in_order(final), [document(number) for number in range(26, 30)])


# ---------------------------------------------------------------------- compaction


def large(number: int) -> dict:
    return document(number, 20_000)


@pytest.fixture
def half_evicted(tmp_path):
    """Two megabytes on the disk, of which the buffer still wants a fifth."""
    buffer = disk(tmp_path / "buffer", 5)
    for number in range(24):
        buffer.add(large(number), "a" if number % 2 else "b", position=number, extra={"x": torch.tensor([number])})
    buffer.commit()
    return buffer, tmp_path / "buffer", [large(number) for number in range(19, 24)]


def test_compaction_gives_room_back_and_keeps_content(half_evicted):
    buffer, folder, expected = half_evicted
    before = size_on_disk(folder)
    tasks, infos = buffer.tasks, [buffer.info(number) for number in buffer.numbers]
    buffer.compact()
    state = through_a_file(buffer.state_dict())
    buffer.compact()  # the next boundary: the checkpoint that wanted the old files is no longer the newest
    assert size_on_disk(folder) < before / 3
    for found in (buffer, resumed(state, folder, 5)):
        assert same(in_order(found), expected)
        assert found.tasks == tasks
        assert [found.info(number) for number in found.numbers] == infos
        assert sorted(found.extra(number)["x"].item() for number in found.numbers) == list(range(19, 24))


def test_an_old_checkpoint_finds_its_files_until_the_boundary_after_a_compaction(half_evicted):
    buffer, folder, expected = half_evicted
    state = through_a_file(buffer.state_dict())
    buffer.compact()
    assert same(in_order(resumed(state, folder, 5)), expected)  # killed before its new checkpoint was written
    buffer.add(large(30), "c")
    assert same(in_order(resumed(state, folder, 5)), expected)
    buffer.compact()
    with pytest.raises(FileNotFoundError, match=re.escape(str(folder))):
        resumed(state, folder, 5)
    assert same(in_order(buffer), [*expected[1:], large(30)])


def test_a_compacted_buffer_goes_on_as_one_that_was_not(half_evicted, tmp_path):
    buffer, folder, _ = half_evicted
    buffer.compact()
    other = disk(tmp_path / "other", 5)
    for number in range(24):
        other.add(large(number), "a" if number % 2 else "b")
    for number in range(30, 33):
        for each in (buffer, other):
            each.add(large(number), "c")
    assert same(in_order(buffer), in_order(other))
    assert sorted(buffer.tasks) == sorted(other.tasks)
    assert same(in_order(resumed(buffer.state_dict(), folder, 5)), in_order(other))


def test_nothing_is_copied_where_little_is_gained(tmp_path):
    buffer = disk(tmp_path, 20)
    for number in range(24):
        buffer.add(large(number), "a")
    numbers = list(buffer.numbers)
    buffer.compact()
    assert list(buffer.numbers) == numbers
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["0000"]


def test_compaction_leaves_the_files_of_another_runs_folder_alone(half_evicted, tmp_path):
    buffer, folder, expected = half_evicted
    state = through_a_file(buffer.state_dict())
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    second = resumed(state, tmp_path / "second", 5)
    second.compact()
    second.compact()
    assert same(in_order(second), expected)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert same(in_order(resumed(state, folder, 5)), expected)


def test_killed_while_it_deletes_replaced_files_hides_nothing(half_evicted, monkeypatch):
    buffer, folder, expected = half_evicted
    buffer.compact()
    buffer.add(large(30), "c")
    state = through_a_file(buffer.state_dict())

    def killed(path, **settings):
        next(file for file in sorted(Path(path).rglob("*")) if file.is_file()).unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            buffer.compact()
    again = resumed(state, folder, 5)
    assert same(in_order(again), [*expected[1:], large(30)])
    assert len(list(read_folder(folder))) >= 5
    again.add(large(31), "c")
    again.compact()
    assert size_on_disk(folder) < 1e6  # and what was left half deleted is gone
    assert same(in_order(resumed(again.state_dict(), folder, 5)), [*expected[2:], large(30), large(31)])


def test_a_disk_that_gets_full_in_a_compaction_leaves_the_buffer_as_it_was(half_evicted, monkeypatch):
    buffer, folder, expected = half_evicted
    state = through_a_file(buffer.state_dict())
    room = Disk(monkeypatch, folder)
    room.left = 120_000
    with pytest.raises(OSError, match="disk is full"):
        buffer.compact()
    room.left = math.inf
    assert same(in_order(buffer), expected)
    assert same(in_order(resumed(state, folder, 5)), expected)
    buffer.compact()
    buffer.add(large(30), "c")
    assert same(in_order(resumed(buffer.state_dict(), folder, 5)), [*expected[1:], large(30)])


# ---------------------------------------------------------------------- several runs


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_runs_that_go_on_from_one_checkpoint_leave_each_others_files_alone(tmp_path):
    first = disk(tmp_path, 6)
    for number in range(4):
        first.add(document(number), "a")
    state = through_a_file(first.state_dict())
    before = contents(tmp_path)
    # Both know where they will write before either does: they were started at the same time.
    runs = [resumed(state, tmp_path, 6) for _ in range(2)]
    for number in range(10, 20):
        for place, run in enumerate(runs):
            run.add(document(number + 100 * place), "b")
            run.commit()
    for place, run in enumerate(runs):
        expected = [document(number + 100 * place) for number in range(14, 20)]
        assert same(in_order(run), expected)
        assert same(in_order(resumed(run.state_dict(), tmp_path, 6)), expected)
    assert same(in_order(resumed(state, tmp_path, 6)), [document(number) for number in range(4)])
    assert before.items() <= contents(tmp_path).items()


def test_a_run_and_one_that_goes_on_from_its_checkpoint_leave_each_others_files_alone(tmp_path):
    first = disk(tmp_path, 50)
    for number in range(4):
        first.add(document(number), "a")
    second = resumed(first.state_dict(), tmp_path, 50)
    for number in range(10, 14):
        first.add(document(number), "a")
        second.add(document(100 + number), "a")
    for run, start in ((first, 10), (second, 110)):
        expected = [document(number) for number in (*range(4), *range(start, start + 4))]
        assert same(in_order(resumed(run.state_dict(), tmp_path, 50)), expected)
