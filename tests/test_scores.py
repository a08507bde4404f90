"""All scores of a run together: definitions, references, what they were measured on, and where they stand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_report import INF, LOSSES, NAN, matrix_of, report_of, sentence
from toys import Classifier, classification, trainer

from lightning_cl import TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.evaluation import format_report, write_report
from lightning_cl.evaluation.tables import SCORES

REFERENCE = {"a": 1.5, "b": 1.25, "c": 1.5}


def with_reference(preset="gem", rows=LOSSES, reference=REFERENCE, **attributes):
    matrix = TaskMatrix("val_loss", "min", preset, reference)
    matrix.matrix, matrix.tasks = torch.tensor(rows, dtype=torch.float64), ["a", "b", "c"]
    for name, value in attributes.items():
        setattr(matrix, name, value)
    return matrix


def test_every_score_by_hand_with_its_definition():
    summary = with_reference().summary()
    expected = {
        "average": (3.5 + 1.0 + 1.25) / 3,
        "average_over_rows": (2.0 + (3.0 + 1.0) / 2 + (3.5 + 1.0 + 1.25) / 3) / 3,
        "worst_task": 3.5,
        "mean_when_learnt": (2.0 + 1.0 + 1.25) / 3,
        "share_kept": (0.5 + 1.5) / (2.0 + 1.5),  # a: 4.0, 2.0, 3.5; b: 2.5, 1.0, 1.0
        "forgetting": 0.75,
        "largest_drop": 1.5,
        "backward_transfer": -0.75,
        "forward_transfer": 0.75,
        "intransigence": ((2.0 - 1.5) + (1.0 - 1.25) + (1.25 - 1.5)) / 3,
    }
    assert {name: summary[name] for name in SCORES} == pytest.approx(expected)
    assert list(summary["definitions"]) == list(summary["fingerprints"])
    assert set(summary["definitions"]) == set(SCORES)
    assert all("R[" in words for words in summary["definitions"].values())
    assert summary["worst"] == {"worst_task": "a", "largest_drop": "a"}
    assert summary["kept"] == pytest.approx({"a": 0.25, "b": 1.0, "c": NAN}, nan_ok=True)
    assert "25% of what its training gave" in sentence(report_of(LOSSES), "a")  # the sentence has the same share


def test_sapt_compares_with_the_references():
    summary = with_reference("sapt").summary()
    assert summary["forward_transfer"] == pytest.approx(-(0.5 - 0.25 - 0.25) / 3)
    assert summary["backward_transfer"] == pytest.approx(-1.5 / 3)
    assert "s_j" in summary["definitions"]["forward_transfer"]


def test_one_matrix_under_every_preset():
    matrix = with_reference()
    scores = {preset: matrix.summary(preset) for preset in ("gem", "trace", "sapt")}
    for preset, found in scores.items():
        assert {name: found[name] for name in SCORES} == pytest.approx(
            {name: with_reference(preset).summary()[name] for name in SCORES}
        )
        assert found["fingerprints"] == with_reference(preset).summary()["fingerprints"]
    assert scores["gem"]["forward_transfer"] > 0.5 > scores["sapt"]["forward_transfer"]
    assert matrix.summary()["definitions"] == scores["gem"]["definitions"] != scores["sapt"]["definitions"]
    with pytest.raises(ValueError, match=r"summary\(preset='sapt'\): .* give reference="):
        with_reference(reference=None).summary("sapt")
    with pytest.raises(ValueError, match="preset='best'"):
        matrix.summary("best")


def test_without_a_reference_there_is_no_intransigence(tmp_path):
    report = report_of(LOSSES)
    assert "intransigence" not in report
    assert "intransigence" not in format_report(report, None)
    write_report(report, tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text())
    assert set(saved["definitions"]) == set(SCORES) - {"intransigence"}
    assert "largest drop (a)" in format_report(report, None)


def test_a_diverged_task_is_named_as_the_worst():
    summary = with_reference(rows=[*LOSSES[:3], [3.5, INF, 1.25]]).summary()
    assert summary["worst"] == {"worst_task": "b", "largest_drop": "b"}
    assert (summary["worst_task"], summary["largest_drop"]) == (INF, INF)
    assert (summary["share_kept"], summary["kept"]["b"]) == (-INF, -INF)
    assert math.isfinite(summary["intransigence"])  # b was learnt


def on(data="f00d", **other):
    return {"data": data, "samples": [9], "batches": [3], "batch_size": [3], "processes": 1, "packing": None} | other


def test_a_fingerprint_is_of_the_columns_that_a_score_reads():
    measured = {name: on(name) for name in "abc"}
    first = with_reference(measured_on=measured).summary()["fingerprints"]
    again = with_reference(measured_on={name: on(name, limit="5") for name in "cba"}).summary()["fingerprints"]
    assert first == again
    last = with_reference(measured_on=measured | {"c": on("other")}).summary()["fingerprints"]
    assert {name for name in SCORES if last[name] == first[name]} == {
        *("share_kept", "forgetting", "largest_drop", "backward_transfer")  # of earlier tasks alone
    }
    reference = with_reference(measured_on=measured, reference=REFERENCE | {"a": 1.6}).summary()["fingerprints"]
    assert {name for name in SCORES if reference[name] != first[name]} == {"intransigence"}
    other = with_reference(measured_on=measured, tasks=["b", "a", "c"]).summary()["fingerprints"]
    assert {name for name in SCORES if other[name] == first[name]} == {"average", "worst_task"}  # whatever the order
    unknown = with_reference(measured_on=measured | {"a": on(None)}).summary()["fingerprints"]
    assert [name for name in SCORES if unknown[name] is not None] == ["forward_transfer"]  # of b and c


# ---------------------------------------------------------------------- references from runs, and wrong ones


def data():
    return TaskDataModule({"a": classification(0), "b": classification(1)}, batch_size=16)


def test_a_reference_from_a_run_and_what_is_missing(tmp_path):
    fit_tasks(trainer(tmp_path, [TaskMatrix()], max_epochs=1), Classifier(), data())
    saved = json.loads((tmp_path / "report.json").read_text())
    whole = TaskMatrix(reference=str(tmp_path))
    summary = fit_tasks(trainer(tmp_path / "again", [whole], max_epochs=1), Classifier(), data())
    found = summary["reference"]
    assert [found[name]["score"] for name in "ab"] == saved["matrix"][-1]
    learnt = [summary["matrix"][1][0], summary["matrix"][2][1]]
    by_hand = sum(now - then for now, then in zip(learnt, saved["matrix"][-1], strict=True)) / 2
    assert summary["intransigence"] == pytest.approx(by_hand)
    for preset, given in (("gem", {"a": 0.5}), ("sapt", None)):
        matrix = TaskMatrix(preset=preset, reference=given)
        with pytest.raises(ValueError, match=r"no score for (a, )?b"):
            fit_tasks(trainer(tmp_path / "missing", [matrix], max_epochs=1), Classifier(), data())
    mixed = TaskMatrix(reference={"a": str(tmp_path / "report.json"), "b": 0.25, "later": 1})
    assert mixed._reference["a"]["score"] == saved["matrix"][-1][0]
    other = TaskDataModule({"a": classification(5), "b": classification(1)}, batch_size=16)
    with pytest.warns(UserWarning, match=r"the reference of a, of .* was measured on other data"):
        fit_tasks(trainer(tmp_path / "other", [TaskMatrix(reference=str(tmp_path))], max_epochs=1), Classifier(), other)


def test_references_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"reference\['a'\]=nan: expected a finite number"):
        TaskMatrix(reference={"a": NAN})
    with pytest.raises(FileNotFoundError, match=r"reference=.*there is no file"):
        TaskMatrix(reference=str(tmp_path))
    (tmp_path / "report.json").write_text('{"tasks": ["x"], "matrix": [[1.0]]}')
    with pytest.raises(ValueError, match=r"its tasks are x; none has the name 'a'"):
        TaskMatrix(reference={"a": str(tmp_path)})
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a report"):
        TaskMatrix(reference=str(tmp_path))


def test_matrix_of_is_what_it_was():
    assert matrix_of(LOSSES).summary()["reference"] == {}
