"""The report of a run: its numbers, sentences and files, from matrices made by hand."""

from __future__ import annotations

import csv
import json
import struct

import pytest
import torch

from lightning_cl import PromptSamples, TaskMatrix
from lightning_cl.callbacks.checks import named
from lightning_cl.evaluation import build_report, format_report, write_report

NAN = float("nan")
LOSSES = [[4.0, 3.0, 5.0], [2.0, 2.5, 4.5], [3.0, 1.0, 4.0], [3.5, 1.0, 1.25]]


def matrix_of(rows, tasks=("a", "b", "c"), mode="min", watched=(), **attributes):
    matrix = TaskMatrix("val_acc" if mode == "max" else "val_loss", mode)
    matrix.matrix = torch.tensor(rows, dtype=torch.float64)
    matrix.tasks, matrix.watched = list(tasks), list(watched)
    for name, value in attributes.items():
        setattr(matrix, name, value)
    return matrix


def report_of(rows, *args, methods=(), **kwargs):
    matrix = matrix_of(rows, *args, **kwargs)
    trained = min(len(rows) - 1, len(matrix.tasks) - len(matrix.watched))
    cost = {"steps": 10, "train_seconds": 2.0, "end_seconds": 0.5, "new_tokens": 1200, "replayed_tokens": 300}
    return build_report(matrix, [dict(cost) for _ in range(trained)], named([matrix, *methods]))


def sentence(report, task):
    (found,) = (s for s in report["sentences"] if s.split(":")[0].split(" ")[0] == task)
    return found


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def read_json(folder):
    return json.loads((folder / "report.json").read_text(), parse_constant=refuse)


def read_csv(folder):
    with (folder / "matrix.csv").open(newline="") as file:
        return list(csv.reader(file))


# ---------------------------------------------------------------------- files


def test_files_hold_the_numbers_of_the_matrix_exactly(tmp_path):
    rows = [[value / 3 for value in row] for row in LOSSES]  # thirds: rounding would show
    write_report(report_of(rows), tmp_path)
    assert read_json(tmp_path)["matrix"] == rows
    header, *lines = read_csv(tmp_path)
    assert header == ["after", "a", "b", "c"]
    assert [line[0] for line in lines] == ["before training", "a", "b", "c"]
    assert [[float(cell) for cell in line[1:]] for line in lines] == rows


def test_scores_in_the_json_are_worked_by_hand(tmp_path):
    write_report(report_of(LOSSES), tmp_path)
    report = read_json(tmp_path)
    assert report["average"] == pytest.approx((3.5 + 1.0 + 1.25) / 3)
    assert report["backward_transfer"] == pytest.approx(((2.0 - 3.5) + 0.0) / 2)
    assert report["forgetting"] == pytest.approx(((3.5 - 2.0) + 0.0) / 2)
    assert report["forward_transfer"] == pytest.approx(((3.0 - 2.5) + (5.0 - 4.0)) / 2)


def test_unknown_is_an_empty_cell_and_null(tmp_path):
    rows = [[NAN, 3.0], [2.0, NAN]]
    write_report(report_of(rows, "ab"), tmp_path)
    assert read_json(tmp_path)["matrix"] == [[None, 3.0], [2.0, None]]
    assert read_json(tmp_path)["forgetting"] is None  # of one trained task nothing can be forgotten
    assert [line[1:] for line in read_csv(tmp_path)[1:]] == [["", "3.0"], ["2.0", ""]]


def test_infinite_scores_are_valid_json_too(tmp_path):
    """A run that diverged still has a report."""
    write_report(report_of([[4.0], [float("inf")]], "a"), tmp_path)
    assert read_json(tmp_path)["matrix"] == [[4.0], [None]]


@pytest.mark.parametrize("rows", [LOSSES, LOSSES[:2], [[NAN] * 3] * 4], ids=["whole", "under way", "nothing known"])
def test_the_picture_is_a_png_of_a_readable_size(tmp_path, rows):
    write_report(report_of(rows), tmp_path)
    content = (tmp_path / "matrix.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 600 < width < 5000
    assert 300 < height < 5000
    assert content[-8:-4] == b"IEND"


def test_the_picture_leaves_the_users_matplotlib_alone(tmp_path):
    import sys

    before = "matplotlib.pyplot" in sys.modules
    write_report(report_of(LOSSES), tmp_path)
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_files_are_replaced_and_nothing_else_is_left(tmp_path):
    names = {"report.json", "matrix.csv", "matrix.png"}
    write_report(report_of(LOSSES[:2]), tmp_path / "new" / "folder")
    inodes = {path.name: path.stat().st_ino for path in (tmp_path / "new" / "folder").iterdir()}
    write_report(report_of(LOSSES), tmp_path / "new" / "folder")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == names
    # Another file under the old name: a reader of the old one has it to the end.
    assert all(path.stat().st_ino != inodes[path.name] for path in (tmp_path / "new" / "folder").iterdir())
    assert len(read_csv(tmp_path / "new" / "folder")) == 5


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    write_report(report_of(LOSSES), tmp_path)
    old = (tmp_path / "matrix.png").read_bytes()

    def broken(report, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("lightning_cl.evaluation.figure.draw_matrix", broken)
    with pytest.raises(OSError, match="disk full"):
        write_report(report_of(LOSSES), tmp_path)
    assert (tmp_path / "matrix.png").read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 3


# ---------------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("column", "words"),
    [
        # before, when learnt, after the last task
        ([4.0, 2.0, 3.0], "50% of what its training gave was kept"),
        ([4.0, 2.0, 2.2], "90% of what its training gave was kept"),
        ([4.0, 2.0, 4.0], "0% of what its training gave was kept"),
        ([4.0, 2.0, 2.0], "no worse than when it was learnt"),
        ([4.0, 2.0, 1.5], "no worse than when it was learnt"),
        ([4.0, 2.0, 4.5], "all that its training gave is lost, and more"),
        ([4.0, 4.5, 5.0], "0.500 worse"),  # it never learnt: a share of nothing says nothing
        ([NAN, 2.0, 3.0], "1.000 worse"),
    ],
)
def test_the_sentence_of_an_earlier_task(column, words):
    report = report_of([[value, 9.0 - i] for i, value in enumerate(column)], "ab")
    assert words in sentence(report, "a")


@pytest.mark.parametrize("column", [[4.0, NAN, 3.0], [4.0, 2.0, NAN]])
def test_unknown_entries_make_no_claim(column):
    text = sentence(report_of([[value, 9.0 - i] for i, value in enumerate(column)], "ab"), "a")
    assert "–" in text
    assert "nan" not in text.lower()
    assert "lost" not in text
    assert "kept" not in text


def test_higher_is_better_in_mode_max():
    # 10 % before, 90 % when learnt, 70 % at the end: three quarters of the gain are left.
    report = report_of([[0.1, 0.2], [0.9, 0.2], [0.7, 0.8]], "ab", mode="max")
    assert "75% of what its training gave was kept" in sentence(report, "a")


def test_the_last_task_has_nothing_to_forget():
    text = sentence(report_of(LOSSES), "c")
    assert "learnt last" in text
    assert "1.250" in text


@pytest.mark.parametrize(
    ("mode", "column", "words"),
    [
        ("min", [3.0, 3.5], "0.500 worse than before training"),
        ("min", [3.0, 2.5], "0.500 better than before training"),
        ("max", [0.5, 0.75], "0.250 better than before training"),
    ],
)
def test_a_watched_task_is_compared_with_before_training(mode, column, words):
    rows = [[1.0, column[0]], [0.5, column[1]]]
    text = sentence(report_of(rows, ("a", "general"), mode=mode, watched=["general"]), "general")
    assert "watched" in text
    assert words in text


def test_a_watched_task_that_did_not_change_is_not_called_worse():
    text = sentence(report_of([[1.0, 3.0], [0.5, 3.0]], ("a", "w"), watched=["w"]), "w")
    assert "worse" not in text
    assert "better" not in text


@pytest.mark.parametrize("column", [[NAN, 3.0], [3.0, NAN]])
def test_a_watched_task_with_an_unknown_entry_makes_no_claim(column):
    text = sentence(report_of([[1.0, column[0]], [0.5, column[1]]], ("a", "w"), watched=["w"]), "w")
    assert "worse" not in text
    assert "better" not in text


def test_a_watched_column_in_front_does_not_shift_the_rows():
    rows = [[3.0, 4.0, 5.0], [3.0, 2.0, 5.0], [3.0, 3.0, 1.0]]
    report = report_of(rows, ("w", "a", "b"), watched=["w"])
    assert "50% of what its training gave was kept" in sentence(report, "a")
    assert report["average"] == pytest.approx(2.0)


def test_a_sequence_under_way_speaks_of_trained_tasks_only():
    report = report_of(LOSSES[:2])
    assert [s.split(":")[0] for s in report["sentences"]] == ["a"]
    assert "learnt last" in report["sentences"][0]


def test_a_column_measured_on_training_data_says_so():
    assert "(measured on its training data)" in sentence(report_of(LOSSES, on_training_data=["b"]), "b")


def test_a_bad_loss_is_answered_with_advice_and_a_good_one_is_not():
    bad = report_of([[4.0, 4.0], [2.0, 4.0], [3.8, 1.0]], "ab")
    good = report_of([[4.0, 4.0], [2.0, 4.0], [2.1, 1.0]], "ab")
    assert "Replay" in sentence(bad, "a")
    assert "Replay" not in sentence(good, "a")


# ---------------------------------------------------------------------- the table


def test_the_table_shows_all_numbers_and_the_costs(tmp_path):
    text = format_report(report_of(LOSSES), tmp_path)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("  ") and line.split()}
    assert "before training  4.000  3.000  5.000" in " ".join(text.split("\n")).replace("   ", "  ")
    assert rows["c"] == ["c", "10", "2.0", "s", "0.5", "s", "1,200", "tokens", "300", "tokens"]
    assert "lower is better" in text
    assert str(tmp_path / "report.json") in text


def test_unknown_entries_are_dashes_in_the_table():
    text = format_report(report_of([[NAN, 3.0], [2.0, NAN]], "ab"), None)
    assert "nan" not in text.lower()
    assert "–" in text


def test_totals_are_the_sum_of_training_and_evaluation():
    report = report_of(LOSSES, seconds=4.0)
    assert report["costs"]["evaluation_seconds"] == 4.0
    assert report["costs"]["total_seconds"] == pytest.approx(4.0 + 3 * 2.5)


def test_answers_stand_side_by_side_under_their_prompt():
    prompts = PromptSamples(["Once upon", "def f("])
    prompts.answers = {0: ["xx", "yy"], 1: [" a time", "x):\n  return"], 2: ["?", "!"]}
    text = format_report(report_of(LOSSES[:3], methods=[prompts]), None)
    block = text[text.index("'Once upon'") : text.index("'def f('")]
    assert [line.split(" | ") for line in block.splitlines()[1:4]] == [
        ["     before training", "xx"],
        ["                   a", "a time"],
        ["                   b", "?"],
    ]
    # An answer of several lines stays on one.
    assert "x): return" in text[text.index("'def f('") :]


def test_answers_stand_in_one_column_whatever_the_names_are():
    prompts = PromptSamples(["Once"])
    prompts.answers = {0: ["x"], 1: ["y"], 2: ["z"]}
    names = ["a", "język polski — strony podręcznika"]
    report = report_of([[3.0, 3.0], [2.0, 3.0], [2.0, 1.0]], names, methods=[prompts])
    lines = [line for line in format_report(report, None).splitlines() if " | " in line]
    assert len({line.index(" | ") for line in lines}) == 1
    assert len(lines) == 3


def test_answers_are_in_the_json(tmp_path):
    prompts = PromptSamples(["Once"])
    prompts.answers = {0: ["x"], 1: ["y"]}
    write_report(report_of(LOSSES[:2], methods=[prompts]), tmp_path)
    assert read_json(tmp_path)["methods"]["PromptSamples"] == {"prompts": ["Once"], "answers": {"0": ["x"], "1": ["y"]}}
