"""The data of nano-TRACE: eight small tasks in TRACE's own layout, from text that machines have.

    python tests/benchmarks/nano_trace_data.py folder=runs/nano_trace/data [train=500] [eval=50] [test=100] [seed=0]

It writes ``<folder>/<task>/{train,eval,test}.json``, lists of ``{"prompt", "answer"}``, and ``pad.json``, text that has
nothing to do with the tasks.

``capitals`` asks for the same facts in all splits, its evaluation prompts are among the test prompts, and about half of
the word problems of the test have the story and the numbers of a training item: both measure what is kept in mind, and
nothing is to be chosen on their evaluation data.

It needs ``pip install num2words countryinfo babel``, and the lists of Debian's packages (``apt-get update``).
"""

from __future__ import annotations

import ast
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import babel
import countryinfo
from num2words import num2words

from lightning_cl.data.text.sample_texts import SAMPLES

Pair = tuple[str, str]
Splits = dict[str, list[Pair]]

SECTIONS = ("games", "sound", "graphics", "fonts", "science", "mail", "editors", "database", "haskell", "perl")
METRICS = {
    "section": ["accuracy"],
    "capitals": ["exact_match", "edit_similarity"],
    "summary": ["rouge_l"],
    "code": ["edit_similarity", "exact_match"],
    "sums": ["exact_match"],
    "problems": ["exact_match"],
    "numbers": ["edit_similarity", "exact_match"],
    "names": ["edit_similarity", "exact_match"],
}
"""The tasks in their order, with the slots of TRACE that they stand for: classification, facts, summary, code, two of
arithmetic, and two of another language."""


def _cut(pairs: list[Pair], sizes: dict[str, int], draw: random.Random) -> Splits:
    """Disjoint splits of pairs with different prompts, in random order."""
    different = list(dict(pairs).items())
    draw.shuffle(different)
    wanted = sum(sizes.values())
    if len(different) < wanted:
        raise SystemExit(f"nano-TRACE: a task has {len(different)} samples, and {wanted} are asked for")
    splits, start = {}, 0
    for role, size in sizes.items():
        splits[role] = different[start : start + size]
        start += size
    return splits


def section(sizes: dict[str, int], draw: random.Random) -> Splits:
    """The section of a Debian package, from its description; ten of them, equally often."""
    listed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=False).stdout
    found: dict[str, list[Pair]] = {name: [] for name in SECTIONS}
    for entry in listed.split("\n\n"):
        fields = dict(re.findall(r"^(Description|Section): (.+)$", entry, re.MULTILINE))
        name = fields.get("Section", "")
        if name in found and "Description" in fields:
            found[name].append((f"Package: {fields['Description'][:80]}\nSection:", f" {name}"))
    if any(not pairs for pairs in found.values()):
        raise SystemExit("nano-TRACE: apt-cache has no descriptions of packages; run apt-get update")
    parts = [_cut(pairs, {role: size // 10 for role, size in sizes.items()}, draw) for pairs in found.values()]
    splits = {role: [pair for part in parts for pair in part[role]] for role in sizes}
    for pairs in splits.values():
        draw.shuffle(pairs)
    return splits


def capitals(sizes: dict[str, int], draw: random.Random) -> Splits:
    """Capitals of countries: the same facts in all splits, asked in other words."""
    asked = ("The capital of {} is", "Capital of {}:", "{} is governed from")
    found = []
    for country in countryinfo.all_countries():
        name, capital = country.name(), country.capital()
        if isinstance(name, str) and isinstance(capital, str) and name and capital:
            found.append((name.title(), capital))
    draw.shuffle(found)
    found = found[: max(sizes["train"] // 2, sizes["test"], sizes["eval"])]
    splits = {"train": [(form.format(name), f" {city}") for form in asked[:2] for name, city in found]}
    draw.shuffle(splits["train"])
    for role in ("eval", "test"):
        splits[role] = [(asked[2].format(name), f" {city}") for name, city in found[: sizes[role]]]
    splits["train"] = splits["train"][: sizes["train"]]
    return splits


def summary(sizes: dict[str, int], draw: random.Random) -> Splits:
    """The first line of a docstring of the standard library, from the rest of it."""
    pairs = []
    for text in _docstrings():
        first, _, rest = text.partition("\n\n")
        first, rest = " ".join(first.split()), " ".join(rest.split())
        if 20 <= len(first) <= 80 and len(rest) >= 60:
            pairs.append((f"{rest[:160]}\nSummary:", f" {first}"))
    return _cut(pairs, sizes, draw)


def code(sizes: dict[str, int], draw: random.Random) -> Splits:
    """The next line of the standard library's code, from the three before it."""
    pairs = []
    for file in _sources():
        lines = file.splitlines()
        for i in range(3, len(lines), 7):
            before, line = "\n".join(lines[i - 3 : i]), lines[i]
            if 8 <= len(line.strip()) <= 50 and 20 <= len(before) <= 160 and "#" not in before + line:
                pairs.append((f"{before}\n", line))
    draw.shuffle(pairs)
    return _cut(pairs[: 10 * sum(sizes.values())], sizes, draw)


def sums(sizes: dict[str, int], draw: random.Random) -> Splits:
    """Sums of two numbers below 100."""
    return _cut([(f"{a} + {b} =", f" {a + b}") for a in range(100) for b in range(100)], sizes, draw)


def problems(sizes: dict[str, int], draw: random.Random) -> Splits:
    """Word problems with two numbers below 20."""
    stories: list[tuple[str, Callable[[int, int], int]]] = [
        ("{who} has {a} {what} and buys {b}. How many {what}?", lambda a, b: a + b),
        ("{who} has {a} {what} and loses {b}. How many are left?", lambda a, b: a - b),
        ("{who} finds {b} {what} more than {a}. How many {what}?", lambda a, b: a + b),
    ]
    pairs = [
        (f"{story.format(who=who, what=what, a=a, b=b)}\nAnswer:", f" {count(a, b)}")
        for story, count in stories
        for who in ("Ada", "Ben", "Eva", "Tom")
        for what in ("apples", "books", "coins")
        for a in range(1, 20)
        for b in range(1, a + 1)
    ]
    return _cut(pairs, sizes, draw)


def numbers(sizes: dict[str, int], draw: random.Random) -> Splits:
    """Numbers below 1,000 in German words."""
    return _cut([(f"{n} in words:", f" {num2words(n, lang='de')}") for n in range(1, 1000)], sizes, draw)


def names(sizes: dict[str, int], draw: random.Random) -> Splits:
    """Names of countries, languages and currencies in German, from English."""
    english, german = babel.Locale("en"), babel.Locale("de")
    pairs = [
        (f"{name} in German:", f" {theirs[key]}")
        for ours, theirs in (
            (english.territories, german.territories),
            (english.languages, german.languages),
            (english.currencies, german.currencies),
        )
        for key, name in ours.items()
        if key in theirs and theirs[key] != name and len(name) <= 40
    ]
    return _cut(pairs, sizes, draw)


MAKERS: dict[str, Callable[[dict[str, int], random.Random], Splits]] = {
    "section": section,
    "capitals": capitals,
    "summary": summary,
    "code": code,
    "sums": sums,
    "problems": problems,
    "numbers": numbers,
    "names": names,
}


def _sources() -> list[str]:
    folder = Path(ast.__file__).parent
    files = sorted(folder.glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="ignore") for file in files]


def _docstrings() -> Iterator[str]:
    for source in _sources():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                yield ast.get_docstring(node) or ""


def write_data(folder: Path, sizes: dict[str, int], seed: int = 0, only: tuple[str, ...] = tuple(METRICS)) -> None:
    """Writes the tasks that are not there yet.

    Args:
        folder: made if it is not there.
        sizes: samples of ``train``, ``eval`` and ``test``.
        seed: seed of the choice.
        only: names of the tasks.
    """
    for name in only:
        target = folder / name
        if (target / "test.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        splits = MAKERS[name](sizes, random.Random(f"{name} {seed}"))
        for role, pairs in splits.items():
            records = [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
            (target / f"{role}.json").write_text(json.dumps(records, ensure_ascii=False, indent=0), encoding="utf-8")
    prose = "\n\n".join(SAMPLES["prose"]())
    pad = [{"text": prose[i : i + 120]} for i in range(0, 120 * 2000, 120)]
    (folder / "pad.json").write_text(json.dumps(pad), encoding="utf-8")


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    counts = {role: int(given.get(role, usual)) for role, usual in (("train", 500), ("eval", 50), ("test", 100))}
    write_data(Path(given.get("folder", "runs/nano_trace/data")), counts, int(given.get("seed", 0)))
