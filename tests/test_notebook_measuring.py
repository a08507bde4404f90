"""What notebook 06 tells about its results is what its stored outputs say, and what its tables should be."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

PATH = Path(__file__).parents[1] / "notebooks" / "06_measuring.ipynb"
KINDS = ("colour", "home", "food")
NUMBER = r"[-+]?\d+\.\d\d"
T_OF_THREE = 4.3027  # the 0.975 quantile of Student's t with two degrees of freedom, from a table
CODE_OR_FOLDED = re.compile(r"<details>.*?</details>|```.*?```|`[^`\n]*`", re.DOTALL)


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PATH, as_version=4)


@pytest.fixture(scope="module")
def printed(notebook):
    streams = (output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    return "".join(output.text for output in streams if output.output_type == "stream")


def matrix(printed, title):
    """The rows of the table under a title, in the numbers that it shows."""
    lines = printed.split(f"{title}\n")[1].splitlines()[1:5]
    assert [line[:16].strip() for line in lines] == ["before training", *(f"after {kind}" for kind in KINDS)]
    return [[float(value.rstrip("%")) for value in line[16:].split()] for line in lines]


def numbers(printed, start, count):
    """The first numbers of the line that begins so."""
    line = re.search(rf"^ *{re.escape(start)} (.*)$", printed, re.MULTILINE)
    assert line, f"no line begins with {start!r}"
    return [float(value) for value in re.findall(NUMBER, line[1])[:count]]


def test_the_loss_and_the_answers_tell_other_stories(printed):
    loss = matrix(printed, "loss on held-out questions")
    written, chosen = matrix(printed, "exact_match"), matrix(printed, "acc")
    assert loss[2][0] > loss[0][0]  # worse than a model that never saw a colour
    assert written[2][0] == 0
    assert chosen[2][0] > 2 * 12.5  # but what it learnt is not all gone
    mean = sum(loss[j + 1][j] - loss[3][j] for j in (0, 1)) / 2
    assert numbers(printed, "in the loss", 1)[0] == pytest.approx(mean, abs=0.011)


def test_presets_of_one_matrix(printed):
    table = {preset: numbers(printed, preset, 4) for preset in ("gem", "trace", "sapt")}
    gem, trace, sapt = table.values()
    for column in (0, 1):  # backward transfer of the answers and of the loss
        assert trace[column] == pytest.approx(gem[column] * 2 / 3, abs=0.011)
        assert sapt[column] == trace[column]
    assert gem[2:] == trace[2:]
    assert gem[2] > 0 > sapt[2]  # two papers, one matrix, two signs


def test_controls(printed):
    rows = {name: numbers(printed, name, 4) for name in ("joint", "replay", "padB", "naive")}
    assert all(row[3] == pytest.approx(statistics.fmean(row[:3]), abs=0.011) for row in rows.values())
    assert rows["replay"][3] == pytest.approx(rows["joint"][3], abs=0.2)
    assert max(rows["replay"][3], rows["joint"][3]) < 0.25 * min(rows["padB"][3], rows["naive"][3])


def test_intervals_are_those_of_student_and_pairs_are_pairs(printed):
    means, differences = printed.split("difference to naive, seed by seed")
    means, differences = means.split("mean loss at the end\n")[1], differences.split("\nratio")[0]
    rows = {name: numbers(means, name, 6) for name in ("naive", "padB", "replay")}
    pairs = {name: numbers(differences, name, 7) for name in ("padB", "replay")}
    for *values, mean, low, high in [*rows.values(), *(row[:6] for row in pairs.values())]:
        half = T_OF_THREE * statistics.stdev(values) / 3**0.5
        assert mean == pytest.approx(statistics.fmean(values), abs=0.011)
        assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.06)
    for name, row in pairs.items():
        ours = [a - b for a, b in zip(rows[name][:3], rows["naive"][:3], strict=True)]
        assert row[:3] == pytest.approx(ours, abs=0.011)
    assert pairs["replay"][5] < 0  # the interval of the pairs does not reach 0
    assert pairs["replay"][6] == 0.25  # and three seeds have no smaller p
    assert min(pairs["padB"][:3]) < 0 < max(pairs["padB"][:3])  # two seeds, two sentences
    assert pairs["padB"][4] < 0 < pairs["padB"][5]
    assert pairs["padB"][5] - pairs["padB"][4] > rows["padB"][5] - rows["padB"][4]  # pairs are not magic


def test_the_choice_of_a_strength(printed):
    rows = re.findall(rf"^(0\.\d+) +({NUMBER}) +({NUMBER})$", printed, re.MULTILINE)
    assert len(rows) == 4
    allowed, future = (min(rows, key=lambda row: float(row[column]))[0] for column in (1, 2))
    assert f"chosen on the tasks so far: {allowed}, with all tasks in view: {future}" in printed


def test_verdicts(printed):
    naive, replay = (printed.split(f"--- {name}\n")[1].split("exit code")[0] for name in ("naive", "replay"))
    assert naive.startswith("the budget is exceeded")
    assert re.findall(r"exit code (\d)", printed)[0] == "2"
    for text in (naive, replay):
        for name in KINDS[:2]:
            rise, margin, allowed = map(float, re.search(rf"{name} +(\S+) ± (\S+) +(\S+)", text).groups())
            decision = "over" if rise - margin > allowed else "within" if rise + margin <= allowed else "not sure"
            assert re.search(rf"{name} .* {decision}$", text, re.MULTILINE)


def test_the_text_quotes_the_stored_numbers(notebook, printed):
    """Every number with two decimals in the text was printed, but for those that are no result."""
    markdown = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    told = CODE_OR_FOLDED.sub("", markdown)
    quoted = set(re.findall(r"(?<![\d.])\d+\.\d\d(?!\d)", told))
    shown = {value.lstrip("+-") for value in re.findall(NUMBER, printed)}
    given = {"0.05", "0.25", "4.30"}  # the shares of replay, and a quantile
    assert len(quoted) > 15
    assert quoted <= shown | given, quoted - shown - given
    shares = set(re.findall(r"(\d+) ?%", told)) - {"95", "80", "5", "4"}
    assert shares <= set(re.findall(r"(\d+)%", printed)), shares
