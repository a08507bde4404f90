"""The script that waits for a GPU runs with small shapes on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import forked

SCRIPT = Path(__file__).parent / "benchmarks" / "gpu.py"


def test_parts_of_the_gpu_script_run_on_small_shapes(tmp_path):
    done = forked.run(SCRIPT, "--small", "--json", tmp_path / "gpu.json", "resume", "recipe", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {"resume", "recipe"}
    assert all(isinstance(row["value"], (int, float)) for row in rows), rows
    assert [row["value"] for row in rows if row["part"] == "resume"] == [0.0, 0.0]


def test_a_part_that_there_is_not_is_named(tmp_path):
    done = forked.run(SCRIPT, "--small", "speed", cwd=tmp_path)
    assert done.returncode == 2
    assert "there is no part 'speed'; there are numbers, resume, recipe" in done.stderr
