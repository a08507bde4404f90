"""The report of a run: its numbers, sentences and files, from matrices made by hand."""

from __future__ import annotations

import csv
import json
import re
import struct

import pytest
import torch

from lightning_cl import AGEM, EWC, L2SP, SI, DERpp, LwF, PromptSamples, Replay, SelfReplay, TaskMatrix
from lightning_cl.core.checks import named
from lightning_cl.evaluation import build_report, format_report, write_report

NAN, INF = float("nan"), float("inf")
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


def test_a_run_that_diverged_is_told_from_one_that_was_not_measured(tmp_path):
    write_report(report_of([[4.0, NAN], [INF, 3.0], [2.0, INF]], "ab"), tmp_path)
    found = read_json(tmp_path)
    assert found["matrix"] == [[4.0, None], [None, 3.0], [2.0, None]]  # valid JSON
    assert found["not_finite"] == [{"task": "a", "row": 1}, {"task": "b", "row": 2}]
    assert [line[1:] for line in read_csv(tmp_path)[1:]] == [["4.0", ""], ["inf", "3.0"], ["2.0", "inf"]]
    text = format_report(report_of([[4.0, NAN], [INF, 3.0], [2.0, INF]], "ab"), None)
    assert "before training       4.000           –" in text
    assert "b                     2.000  not finite" in text


@pytest.mark.parametrize(("mode", "worst"), [("min", INF), ("max", -INF)])
def test_a_task_that_diverged_is_named_and_the_average_is_the_worst(mode, worst):
    report = report_of([[4.0, 4.0], [1.0, 4.0], [worst, 0.143]], "ab", mode=mode)
    assert report["average"] == worst
    assert "not finite. It was 1.000 after a. The run diverged" in sentence(report, "a")
    report = report_of([[4.0, 4.0], [worst, 4.0], [3.0, 1.0]], "ab", mode=mode)
    assert "not finite when learnt, 3.000 now" in sentence(report, "a")
    assert report["mean_when_learnt"] == worst


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


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (
            [4.0, 4.5, 5.0],
            "not learnt: its training made val_loss worse, 4.000 before and 4.500 after; 5.000 now: 0.500 worse",
        ),
        (
            [4.0, 4.0, 4.0],
            "not learnt: its training left val_loss about where it was, 4.000 before and 4.000 after; 4.000 now.",
        ),
        ([4.0, 3.99, 5.0], "not learnt: its training left val_loss about where it was, 4.000 before and 3.990 after"),
    ],
)
def test_a_task_that_was_not_learnt_is_called_so(column, words):
    report = report_of([[value, 9.0 - i] for i, value in enumerate(column)], "ab")
    assert words in sentence(report, "a")
    assert "learning rate" in sentence(report, "a")  # nothing is there to keep yet: no method is to blame


def test_the_last_task_too_is_said_not_to_be_learnt():
    report = report_of([[4.0, 4.0], [2.0, 4.0], [2.0, 4.3]], "ab")
    assert "not learnt: its training made val_loss worse, 4.000 before and 4.300 after" in sentence(report, "b")
    # What the task before gave it is not what its own training gave.
    report = report_of([[4.0, 4.0], [2.0, 2.5], [2.0, 2.6]], "ab")
    assert "made val_loss worse" in sentence(report, "b")


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


FORGOT = [[4.0, 4.0], [2.0, 4.0], [3.8, 1.0]]
NOT_LEARNT = [[4.0, 4.0], [2.0, 4.0], [2.1, 4.1]]


@pytest.mark.parametrize(
    ("method", "keep", "learn"),
    [
        (Replay(10), "a larger Replay(ratio=…)", "a smaller Replay(ratio=…)"),
        (DERpp(10), "a larger DERpp(ratio=…, alpha=…)", "a smaller DERpp(ratio=…, alpha=…)"),
        (AGEM(10), "a larger AGEM(batch_size=…, buffer_size=…)", None),
        (SelfReplay(), "a larger SelfReplay(ratio=…)", "a smaller SelfReplay(ratio=…)"),
        (LwF(2.0), "a higher LwF(strength=…), 2 now", "a lower LwF(strength=…), 2 now"),
        (EWC(0.5), "a higher EWC(strength=…), 0.5 now", "a lower EWC(strength=…), 0.5 now"),
        (SI(), "a higher SI(share=…), 0.1 now", "a lower SI(share=…), 0.1 now"),
        (L2SP(0.0), "L2SP(strength='auto'): at 0 it protects nothing", None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_advice_is_about_the_methods_of_the_run(method, keep, learn):
    kept = sentence(report_of(FORGOT, "ab", methods=[method]), "a")
    assert f"To keep more: {keep}" in kept
    learnt = sentence(report_of(NOT_LEARNT, "ab", methods=[method]), "b")
    assert ("To learn more: " + (f"{learn}" if learn else "look at its learning rate")) in learnt
    for other in {"Replay", "DERpp", "EWC", "SelfReplay"} - {type(method).__name__}:
        assert not re.search(rf"\b{other}\b", kept + learnt)


def test_a_penalty_that_pulled_harder_than_the_task_is_not_to_be_stronger():
    method = EWC(5.0)
    method._diagnosis = [
        {"task": "b", "strength": 5.0, "penalty": 1.0, "largest_share": 12.0, "total": 1.0}
        | {"too_strong": True, "excess": 12.0}
    ]
    report = report_of(NOT_LEARNT, "ab", methods=[method])
    assert "a lower EWC(strength=…), 5 now, which is too strong: it pulled up to 12 times" in sentence(report, "b")
    assert "at most 12 times the task's: too strong" in report["methods"]["EWC"]["sentences"][0]
    kept = sentence(report_of(FORGOT, "ab", methods=[method]), "a")
    assert "higher EWC" not in kept
    assert "no higher strength" in kept


# ---------------------------------------------------------------------- rows of other data


def changed_report(**kwargs):
    """The run went on after `b` with other data for a and b; its last row but one was measured again."""
    changes = [
        {"task": name, "row": 2, "what": "limit_val_batches 10 → 2", "before": [before]}
        for name, before in (("a", 2.45), ("b", 3.0))
    ]
    rows = [[4.0, 4.2, 5.0], [2.401, 4.1, 5.0], [1.83, 3.1, 4.0], [1.827, 3.4, 1.0]]
    return report_of(rows, changes=changes, **kwargs)


def test_no_score_and_no_sentence_crosses_a_change_of_data():
    report = changed_report()
    assert report["average"] == pytest.approx((1.827 + 3.4 + 1.0) / 3)
    assert report["mean_when_learnt"] == pytest.approx((3.1 + 1.0) / 2)  # a was learnt on other data
    assert report["backward_transfer"] == pytest.approx(3.1 - 3.4)
    assert report["forgetting"] == pytest.approx(((1.827 - 1.83) + (3.4 - 3.1)) / 2)
    assert report["forward_transfer"] == pytest.approx(5.0 - 4.0)  # of b nothing is known
    a, b = (sentence(report, name) for name in "ab")
    assert "2.401" not in a
    assert "went from 1.830 to 1.827, 0.003 better than after b" in a
    assert "measured on other data (limit_val_batches 10 → 2)" in a
    assert "3.100 when learnt, 3.400 now: 0.300 worse" in b


def test_a_line_separates_rows_of_other_data(tmp_path):
    report = changed_report()
    lines = format_report(report, None).splitlines()
    place = next(i for i, line in enumerate(lines) if "(above: other data)" in line)
    assert lines[place].split()[-2:] == ["-----", "-----"]
    assert lines[place - 1].split()[0] == "a"
    assert lines[place + 1].split()[0] == "b"
    assert any("'b' on measured on other data than above: a (there 2.450), b (there 3.000)" in line for line in lines)
    write_report(report, tmp_path)
    assert [line[0] for line in read_csv(tmp_path)][2:5] == ["a", "(above: other data of a, b)", "b"]
    assert read_json(tmp_path)["data_changes"][0]["before"] == [2.45]


# ---------------------------------------------------------------------- the table


def test_the_table_shows_all_numbers_and_the_costs(tmp_path):
    text = format_report(report_of(LOSSES), tmp_path)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("  ") and line.split()}
    assert "before training  4.000  3.000  5.000" in " ".join(text.split("\n")).replace("   ", "  ")
    assert rows["c"] == ["c", "10", "2.0", "0.5", "1,200", "300"]
    assert "task  steps  training, s  end of task, s  new tokens  replayed tokens" in text
    assert "lower is better" in text
    assert str(tmp_path / "report.html") in text
    assert "report.json" in text


def test_unknown_entries_are_dashes_in_the_table():
    text = format_report(report_of([[NAN, 3.0], [2.0, NAN]], "ab"), None)
    assert "nan" not in text.lower()
    assert "–" in text


def test_totals_are_the_sum_of_training_and_evaluation():
    report = report_of(LOSSES, seconds=4.0)
    assert report["costs"]["evaluation_seconds"] == 4.0
    assert report["costs"]["total_seconds"] == pytest.approx(4.0 + 3 * 2.5)


def test_units_of_the_cost_table_are_one_for_a_column():
    report = report_of(LOSSES)
    report["costs"]["tasks"][1]["train_seconds"] = 240.0
    lines = format_report(report, None).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("  task"))
    assert "training, min" in lines[start]
    assert [line.split()[2] for line in lines[start + 1 : start + 4]] == ["0.0", "4.0", "0.0"]
    assert len({len(line) for line in lines[start : start + 4]}) == 1  # numbers to the right


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
