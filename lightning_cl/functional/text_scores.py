"""Scores of one written answer against its references: plain strings, no model.

Each score is between 0 and 1, and higher is better. With several references, the best one counts; SARI uses all of
them together.

Published figures differ in details that change the number. What is done here:

* ``exact_match``: equal after white space at both ends is removed. (TRACE compares without removing it.)
* ``normalized_match``: equal in lower case, without ASCII punctuation, with single spaces. It is the exact match of
  Super-NaturalInstructions and of O-LoRA. Do not use it for numbers: 1.5 and 15 are the same.
* ``label_match``: the label is the longest of the given choices that the text begins with, at the end of a word.
  Without choices, the label is the first line, without a full stop. Case makes no difference. (TRACE's ScienceQA
  compares the first character alone.)
* ``rouge_l``: F1 of the longest common subsequence of words (Lin 2004). Words are runs of letters and digits in lower
  case; each Chinese, Japanese or Korean sign is a word. On ASCII text, it is ``rouge_score`` without its stemmer.
* ``edit_similarity``: ``2 · LCS / (len(a) + len(b))`` over characters, which is ``fuzz.ratio`` / 100 of rapidfuzz, as
  TRACE and CodeXGLUE report it.
* ``sari``: see :func:`sari`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(f"[{_CJK}]|(?:(?![{_CJK}]|_)\\w)+")
_TOKEN = re.compile(r"\w+|[^\w\s]")
_ORDERS = 4  # SARI looks at n-grams of up to four words


def exact_match(prediction: str, references: Sequence[str]) -> float:
    r"""1 if the prediction equals a reference, apart from white space at both ends; else 0.

    Args:
        prediction: the written text.
        references: the accepted texts; at least one.

    Example:
        >>> exact_match(" 42\n", ["42", "forty-two"])
        1.0
    """
    return float(prediction.strip() in {reference.strip() for reference in references})


def normalized_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference in lower case, without ASCII punctuation, with single spaces; else 0.

    Args:
        prediction: the written text.
        references: the accepted texts; at least one.
    """
    return float(_normalized(prediction) in set(map(_normalized, references)))


def label_match(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 if the prediction begins with the label that a reference begins with; else 0.

    Args:
        prediction: the written text.
        references: the accepted texts; at least one.
        choices: the labels that are possible; without them, a text's first line is its label.

    Example:
        >>> label_match("very good, I think", ["very good"], ["very good", "good"])
        1.0
    """
    label = _label(prediction, choices)
    return float(label is not None and label in {_label(reference, choices) for reference in references})


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words (ROUGE-L, Lin 2004, eq. 2-4 with β = 1), of the best reference.

    Args:
        prediction: the written text.
        references: the accepted texts; at least one.

    Example:
        >>> rouge_l("the cat sat", ["the cat is here"])  # 2 words in common, of 3 and of 4
        0.5714285714285714
    """
    ours = _WORD.findall(prediction.lower())
    return max(_overlap(ours, _WORD.findall(reference.lower())) for reference in references)


def edit_similarity(prediction: str, references: Sequence[str]) -> float:
    """1 less the share of characters to insert and delete: ``2 · LCS / (len(a) + len(b))``, of the best reference.

    Two empty texts are equal. White space at both ends does not count.

    Args:
        prediction: the written text.
        references: the accepted texts; at least one.
    """
    ours = prediction.strip()
    return max(_overlap(ours, reference.strip(), both_empty=1.0) for reference in references)


def sari(prediction: str, references: Sequence[str], source: str) -> float:
    """SARI (Xu et al. 2016): what was added, kept and deleted of a source, against what the references did.

    The mean of three scores, each a mean over n-grams of 1 to 4 words: F1 of added n-grams, F1 of kept ones, and
    precision of deleted ones. The published code had two faults, which later versions corrected, and so does this one:
    the recall of kept n-grams is a ratio of sums (not a sum of ratios over a sum), and nothing to do that was not done
    counts as 1 (not 0). With these, it is Hugging Face's ``sari`` / 100, which TRACE reports, on lower-case words with
    punctuation as words of its own.

    Args:
        prediction: the written text.
        references: simplifications of the source; at least one.
        source: the text to simplify.
    """
    texts = [_TOKEN.findall(text.lower()) for text in (source, prediction, *references)]
    total = 0.0
    for n in range(1, _ORDERS + 1):
        begin, ours, *theirs = (_grams(text, n) for text in texts)
        goal = Counter[Hashable]()
        for grams in theirs:
            goal.update(grams)
        total += sum(_operations(begin, ours, goal, len(references)))
    return total / (3 * _ORDERS)


def _operations(
    begin: Counter[Hashable], ours: Counter[Hashable], goal: Counter[Hashable], references: int
) -> tuple[float, float, float]:
    """The scores of added, kept and deleted n-grams of one length."""
    # One of r references that keeps an n-gram keeps 1/r of it: everything else is counted r times.
    before = Counter({gram: count * references for gram, count in begin.items()})
    after = Counter({gram: count * references for gram, count in ours.items()})
    kept, to_keep = before & after, before & goal
    right = kept & goal
    precision = _share(sum(count / kept[gram] for gram, count in right.items()), len(kept))
    keep = _f1(precision, _share(right.total(), to_keep.total()))
    gone = before - after
    delete = _share(sum(count / gone[gram] for gram, count in (gone - goal).items()), len(gone))
    added, to_add = ours.keys() - begin.keys(), goal.keys() - begin.keys()
    both = len(added & to_add)
    return _f1(_share(both, len(added)), _share(both, len(to_add))), keep, delete


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _grams(words: Sequence[str], n: int) -> Counter[Hashable]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _normalized(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def _label(text: str, choices: Sequence[str]) -> str | None:
    said = text.strip().casefold()
    if not choices:
        return said.partition("\n")[0].strip().rstrip(".")
    fitting = [choice for choice in (one.strip().casefold() for one in choices) if _begins(said, choice)]
    return max(fitting, key=len, default=None)


def _begins(text: str, choice: str) -> bool:
    """Tells if a text begins with a choice, and the choice does not end inside a word."""
    inside = text[len(choice) : len(choice) + 1].isalnum() and choice[-1:].isalnum()
    return text.startswith(choice) and not inside


def _overlap(ours: Sequence[Hashable], theirs: Sequence[Hashable], both_empty: float = 0.0) -> float:
    total = len(ours) + len(theirs)
    return 2 * common_subsequence(ours, theirs) / total if total else both_empty


def common_subsequence(ours: Sequence[Hashable], theirs: Sequence[Hashable]) -> int:
    """The length of the longest common subsequence, by bit operations on whole rows (Hyyrö 2004).

    Args:
        ours: a sequence, such as a string or a list of words.
        theirs: the other one.
    """
    places: dict[Hashable, int] = {}
    for i, item in enumerate(ours):
        places[item] = places.get(item, 0) | 1 << i
    everything = (1 << len(ours)) - 1
    row = everything  # a 0 for each item of `ours` at which the length grows
    for item in theirs:
        matches = row & places.get(item, 0)
        row = (row + matches | row - matches) & everything
    return len(ours) - row.bit_count()
