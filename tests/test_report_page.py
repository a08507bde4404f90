"""The report page: what stands in it, that markup stays text, and how a real browser shows it."""

import copy
import html.parser
import json
import math
import re
import shutil
import subprocess

import pytest
from matplotlib.image import imread

from lightning_cl.evaluation.page import format_page, write_page

HOSTILE = '<script>alert("1")</script> & $x_1$ </text>'
NAMES = [HOSTILE, "中文对话", "Русский 🚀", "watched <b>"]
BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium-headless-shell")


def a_report():
    """A run of three tasks and a watched one, with everything that a page can show."""
    a, b, c, watched = NAMES
    return {
        "format": 1,
        "average": 3.25,
        "mean_when_learnt": 2.125,
        "share_kept": 0.315,
        "forgetting": 1.0625,
        "definitions": {"average": "mean over the tasks at the end", "share_kept": "a share", "forgetting": "a rise"},
        "worst": {"worst_task": a, "largest_drop": a},
        "kept": {a: 0.25, b: 0.95, c: math.nan},
        "preset": "gem",
        "monitor": "val_loss",
        "mode": "min",
        "tasks": NAMES,
        "watched": [watched],
        "measured_on": {a: {"data": "c15e86ef8669e385", "samples": [54], "limit": "24"}},
        "data_changes": [{"task": watched, "row": 2, "what": "samples", "before": []}],
        "not_finite": [],
        "matrix": [[7.0, 6.5, 6.25, 3.0], [2.0, 6.0, 6.125, 3.5], [4.75, 2.5, 6.0, 3.75], [5.75, 2.675, 1.875, 4.0]],
        "sentences": [f"{a}: val_loss 2.000 when learnt, 5.750 now: 25% of what its training gave was kept."],
        "costs": {
            "tasks": [{"task": n, "steps": 3, "train_seconds": 1.5, "end_seconds": 0.25} for n in (a, b, c)],
            "evaluation_seconds": 11.0,
            "total_seconds": 16.25,
            "state_bytes": {"EWC": 1536},
        },
        "methods": {
            "EWC": {"strength": 0.0625, "sentences": ["EWC held <i>much</i>"]},
            "PromptSamples": {"prompts": [f"a {HOSTILE}"], "answers": {"0": ["</table>"], "3": ["  "]}},
        },
        "probe": {
            "GeneralProbe": {
                "definition": "share of right answers",
                "columns": ["arithmetic <u>"],
                "after": [0, 3],
                "rows": [[0.8125], [0.5625]],
                "standard_errors": [[0.03125], [0.04375]],
            }
        },
        "guard": [
            {"step": 7, "training": b, "task": a, "D": 0.34375, "SE": 0.015625, "n": 64, "allowed": 0.05}
            | {"decision": "breach", "action": "replay"}
        ],
        "budget": {a: "breach", b: "safe"},
        "recovery": {
            "steps": 5,
            "samples": 8,
            "after": {c: {a: {"share": 0.625, "control": {"after": 5.5}, "learnt": 2.0, "now": 5.75, "after": 3.375}}},
        },
        "curves": {
            "tasks": {a: [[0, 7.0], [3, 2.0], [4, 6.5625], [9, 5.75]], b: [[3, 6.0], [6, 2.5], [9, 2.675]]},
            "switches": [
                {"task": a, "step": 0, "gaps": {}},
                {
                    "task": b,
                    "step": 3,
                    "gaps": {
                        a: {"rise": 4.5625, "remains": 3.75, "depth": 0.8125, "peak": 6.5625, "peak_step": 1}
                        | {"steps_to_recover": 6}
                    },
                },
            ],
        },
        "metrics": {
            "scores": {
                "exact_match": {
                    "mode": "max",
                    "matrix": [[0.0, math.nan, 0.1, 0.2], [0.9375, math.nan, 0.1, 0.2]]
                    + 2 * [[0.4375, math.nan, 0.3, 0.2]],
                }
            },
            "definitions": {"exact_match": "share of answers that are equal"},
            "answers": {
                a: [
                    {
                        "prompt": "2+2=",
                        "references": ["4"],
                        "answers": {"1": "4", "3": "five"},
                        "scores": {"1": 1.0, "3": 0.0},
                    }
                ]
            },
        },
        "provenance": {"command": "lightning-cl fit", "seed": "42", "torch": "2.13.0", "commit": None},
    }


class _Text(html.parser.HTMLParser):
    """The text of a page, the tags that it is made of, and where they lead."""

    def __init__(self):
        super().__init__()
        self.text, self.tags, self.leads = "", set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.leads += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value[:1] != "#"]

    def handle_data(self, data):
        self.text += data


def read(page):
    found = _Text()
    found.feed(page)
    return found


def numbers_of(value):
    """All numbers in a report that are finite."""
    if isinstance(value, dict):
        return {n for item in value.values() for n in numbers_of(item)}
    if isinstance(value, (list, tuple)):
        return {n for item in value for n in numbers_of(item)}
    return (
        {value} if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else set()
    )


def check_whole(found, report):
    for name in [*NAMES, "EWC held <i>much</i>", "</table>", "arithmetic <u>", "c15e86ef8669e385"]:
        assert name in found.text
    missing = {n for n in numbers_of(report) if json.dumps(n) not in found.text}
    assert not missing


def test_page_has_every_number_and_name_and_no_markup_of_others():
    page = format_page(a_report(), title="run <1>", config="a: <b>\n", others=[("earlier", a_report())])
    found = read(page)
    check_whole(found, a_report())
    assert not found.tags & {"script", "i_", "b", "u", "img", "link", "iframe", "object"}
    assert not found.leads
    assert "a: <b>" in found.text
    # Verdict first, with the worst task by name; the shares as they are in the report.
    verdict = found.text.index("1 of 2 earlier tasks were not kept")
    assert verdict < found.text.index("Every task after every task")
    assert f"{HOSTILE} kept 25% of what its training gave" in found.text
    assert "exceeded" in found.text
    # In the order that a reader needs.
    order = ["verdict", "matrix", "curves", "runs", "answers", "costs", "methods", "definitions", "provenance"]
    places = [page.index(f'<section id="{name}">') for name in order]
    assert places == sorted(places)


def test_cells_are_red_where_a_task_got_worse_by_the_share_of_the_largest_change():
    page = format_page(a_report())
    cells = re.findall(r'<td class="(\w+)( now)?" style="--shade: ([\d.]+)"[^>]*>([^<]+)</td>', page)[:16]
    kinds = [kind for kind, *_ in cells]
    assert kinds[:4] == ["before"] * 4
    # 5.75 - 2.0 is the largest change: full colour; the second task lost 0.175 of it.
    assert cells[12][0] == "worse"
    assert float(cells[12][2]) == 1.0
    assert cells[13][0] == "worse"
    assert float(cells[13][2]) == pytest.approx(0.175 / 3.75, abs=1e-3)
    assert [i for i, cell in enumerate(cells) if cell[1]] == [4, 9, 14]  # just trained


def test_a_diverged_run_is_named_and_its_page_reads_back_from_the_file():
    report = a_report()
    report["matrix"][3][1] = None  # as report.json has it
    report["not_finite"] = [{"task": NAMES[1], "row": 3}]
    report["average"] = None
    found = read(format_page(report))
    assert f"The run diverged: val_loss of {NAMES[1]} is not finite." in found.text
    assert "not finite" in found.text


def test_nothing_of_the_machine_stands_in_the_page(tmp_path):
    report = a_report()
    report["methods"]["EWC"]["folders"] = [str(tmp_path / "buffer")]
    write_page(report, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert str(tmp_path) not in page
    assert "RUN/buffer" in page


def test_runs_next_to_it_are_shown_if_they_measured_the_same(tmp_path):
    for name, change in (("v0", {}), ("v1", {}), ("other", {"monitor": "val_acc"})):
        (tmp_path / name).mkdir()
        text = json.dumps(copy.deepcopy(a_report()) | change).replace("NaN", "null")
        (tmp_path / name / "report.json").write_text(text)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "report.json").write_text("{")
    write_page(a_report(), tmp_path / "v1")
    text = read((tmp_path / "v1" / "report.html").read_text(encoding="utf-8")).text
    assert "v1 (this run)" in text
    assert "v0" in text
    assert "other" not in text.split("Next to earlier runs")[1].split("Answers")[0].replace("another", "")


def test_a_diverged_neighbour_is_left_out_and_other_files_do_no_harm(tmp_path):
    for name, change in (("good", {}), ("diverged", {"forgetting": None})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(a_report() | change).replace("NaN", "null"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes(b"a: \xff\xfe")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "report.json").symlink_to(tmp_path / "nowhere")
    write_page(a_report(), tmp_path / "run")
    shown = read((tmp_path / "run" / "report.html").read_text(encoding="utf-8")).text
    table = shown.split("Next to earlier runs")[1].split("Answers")[0]
    assert "good" in table
    assert "diverged" not in table


def test_a_configuration_in_the_working_folder_is_not_taken_for_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("password: secret")
    write_page(a_report(), tmp_path)
    assert "secret" not in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Runs the browser without a network."""

    folder = tmp_path_factory.mktemp("profile")

    def ask(*arguments):
        plain = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder}"]
        flags = [*plain, "--allow-file-access-from-files", "--hide-scrollbars", "--enable-logging=stderr"]
        return subprocess.run([BROWSER, *flags, *arguments], capture_output=True, text=True, timeout=120, check=True)

    return ask


@needs_browser
def test_a_browser_shows_all_of_it_at_400_pixels_and_in_the_dark(tmp_path, browser):
    write_page(a_report(), tmp_path)
    page = (tmp_path / "report.html").as_uri()
    frame = f'<body style="margin:0"><iframe id="f" src="{page}" style="width:400px;height:9000px;border:0"></iframe>'
    script = """<script>onload = () => {
      const page = document.getElementById("f").contentDocument;
      const isOut = e => !e.closest(".wide") && e.getBoundingClientRect().right > 400;
      const wide = [...page.querySelectorAll("body *")].filter(isOut);
      document.title = [page.documentElement.scrollWidth, wide.length, page.fonts.size].join(" ");
      document.body.append(Object.assign(document.createElement("pre"), {textContent: page.body.textContent}));
    }</script>"""
    (tmp_path / "frame.html").write_text(frame + script, encoding="utf-8")
    dark = "--blink-settings=preferredColorScheme=0"
    told = browser(
        dark, "--window-size=400,9000", "--virtual-time-budget=2000", "--dump-dom", (tmp_path / "frame.html").as_uri()
    )
    width, outside, fonts = map(int, re.search(r"<title>(\d+) (\d+) (\d+)</title>", told.stdout).groups())
    assert (width, outside, fonts) == (400, 0, 0)
    check_whole(read(told.stdout), a_report())
    assert "CONSOLE" not in told.stderr
    assert "ERR_" not in told.stderr
    for name, flags in (("dark", [dark]), ("light", ["--blink-settings=preferredColorScheme=1"])):
        target = tmp_path / f"{name}.png"
        browser(*flags, "--window-size=400,2000", f"--screenshot={target}", page)
        pixels = imread(target)[..., :3]
        assert pixels.shape[1] == 400
        assert pixels.std() > 0.05  # not blank
        assert (pixels.mean() < 0.4) == (name == "dark")
