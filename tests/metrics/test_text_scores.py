"""Scores of written answers against independent references, written from the papers' formulas."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from fractions import Fraction

import pytest
import torch
from torchmetrics.functional.text import edit_distance

from lightning_cl.functional.text_scores import (
    common_subsequence,
    edit_similarity,
    exact_match,
    label_match,
    normalized_match,
    rouge_l,
    sari,
)
from lightning_cl.metrics import SARI, EditSimilarity, ExactMatch, NormalizedMatch, RougeL
from lightning_cl.metrics.text import BY_LIKELIHOOD, DEFINITIONS, answer_score, choice_score
from lightning_cl.tasks import METRICS


def table_lcs(a, b):
    """The textbook table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if x == y else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


def random_texts(count, letters="ab c", longest=70):
    draw = random.Random(0)
    return ["".join(draw.choice(letters) for _ in range(draw.randrange(longest))) for _ in range(count)]


@pytest.mark.parametrize("letters", ["ab", "abcdefghij ", "a"])
def test_common_subsequence_is_the_textbook_tables(letters):
    texts = random_texts(40, letters)
    for a, b in zip(texts, reversed(texts), strict=True):
        assert common_subsequence(a, b) == table_lcs(a, b) == common_subsequence(b, a)


def test_edit_similarity_is_one_less_the_share_of_insertions_and_deletions():
    texts = [text.strip() or "x" for text in random_texts(12, "abc", 30)]
    for a, b in itertools.pairwise(texts):
        # A substitution that costs 2 is a deletion and an insertion.
        distance = float(edit_distance([a], [b], substitution_cost=2))
        assert edit_similarity(a, [b]) == pytest.approx(1 - distance / (len(a) + len(b)))
    assert edit_similarity("", [""]) == 1.0
    assert edit_similarity("abc", [""]) == 0.0
    assert edit_similarity(" abd\n", ["xyz", "abc"]) == pytest.approx(4 / 6)


def test_rouge_l_is_f1_of_common_words_of_the_best_reference():
    texts = random_texts(30, "ab c,_", 40)
    for a, b in itertools.pairwise(texts):
        ours, theirs = (re.sub(r"[^a-z0-9]+", " ", text.lower()).split() for text in (a, b))
        common = table_lcs(ours, theirs)
        recall, precision = (Fraction(common, len(words)) if words else 0 for words in (theirs, ours))
        f1 = 2 * precision * recall / (precision + recall) if common else 0
        assert rouge_l(a, [b]) == pytest.approx(float(f1))
        assert rouge_l(a, [b, a]) == max(rouge_l(a, [b]), rouge_l(a, [a]))
    assert rouge_l("Grüße, Welt_1", ["grüße welt 1"]) == 1.0
    assert rouge_l("我爱北京", ["我爱上海"]) == 0.5


# ---------------------------------------------------------------------- SARI


def papers_sari(source, prediction, references):
    """Xu et al. 2016, section 4, with fractions of references, and the two corrections, which are marked."""

    def grams(text, n):
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    def share(part, whole):
        return Fraction(part) / whole if whole else Fraction(1)  # correction: nothing to do is all right

    def f1(p, r):
        return 2 * p * r / (p + r) if p + r else Fraction(0)

    total, r = Fraction(0), len(references)
    for n in range(1, 5):
        i, o, theirs = grams(source, n), grams(prediction, n), [grams(text, n) for text in references]
        weight = {g: Fraction(sum(t[g] for t in theirs), r) for g in {g for t in theirs for g in t}}
        added, to_add = {g for g in o if g not in i}, {g for g in weight if g not in i}
        total += f1(share(len(added & to_add), len(added)), share(len(added & to_add), len(to_add)))
        kept = {g: min(i[g], o[g]) for g in i if g in o}
        to_keep = {g: min(Fraction(i[g]), weight[g]) for g in i if g in weight}
        right = {g: min(Fraction(c), weight.get(g, Fraction(0))) for g, c in kept.items()}
        precision = share(sum(right[g] / kept[g] for g in kept), len(kept))
        recall = share(sum(right.values()), sum(to_keep.values()))  # correction: a ratio of sums
        total += f1(precision, recall)
        gone = {g: i[g] - o[g] for g in i if i[g] > o[g]}
        good = {g: max(c - weight.get(g, Fraction(0)), 0) for g, c in gone.items()}
        total += share(sum(good[g] / gone[g] for g in gone), len(gone))
    return float(total / 12)


def test_sari_is_that_of_the_paper():
    draw = random.Random(1)
    words = ["a", "b", "c", "d", "e", "."]
    for _ in range(40):
        source, prediction, *references = (
            " ".join(draw.choice(words) for _ in range(draw.randrange(0, 9))) for _ in range(draw.randrange(3, 6))
        )
        assert sari(prediction, references, source) == pytest.approx(papers_sari(source, prediction, references))


def test_sari_of_the_published_example():
    """The example in the documentation of Hugging Face's metric."""
    source = "About 95 species are currently accepted."
    references = [
        "About 95 species are currently known.",
        "About 95 species are now accepted.",
        "95 species are now accepted.",
    ]
    assert sari("About 95 you now get in.", references, source) == pytest.approx(0.26953601953601954)
    assert sari(references[0], references[:1], source) == 1.0


# ---------------------------------------------------------------------- matches and labels


def test_matches():
    assert exact_match(" -3\n", ["4", "-3"]) == 1.0
    assert exact_match("3", ["-3"]) == exact_match("Yes", ["yes"]) == 0.0
    assert normalized_match("The  answer: YES!", ["the answer yes"]) == 1.0
    assert normalized_match("the yes", ["yes"]) == 0.0  # articles stay, unlike in SQuAD


@pytest.mark.parametrize(
    ("prediction", "reference", "choices", "right"),
    [
        ("very negative.", "very negative", ["negative", "very negative"], 1.0),
        ("negative", "very negative", ["negative", "very negative"], 0.0),
        ("Yes, it is", "yes", ["yes", "no"], 1.0),
        ("nothing", "no", ["yes", "no"], 0.0),  # no label ends inside a word
        ("I do not know", "no", ["yes", "no"], 0.0),
        ("B\nBecause it is", "B\nSince", [], 1.0),
        ("B.", "b", [], 1.0),
        ("C", "B", [], 0.0),
        ("C++ code", "C++", ["C", "C++"], 1.0),
    ],
)
def test_label_is_the_longest_choice_that_the_text_begins_with(prediction, reference, choices, right):
    assert label_match(prediction, [reference], choices) == right


def test_choices_by_likelihood_and_by_character():
    assert choice_score("acc", [-3.0, -2.0], ["long answer", "no"], 1) == 1.0
    assert choice_score("acc_norm", [-3.0, -2.0], ["long answer", "no"], 1) == 0.0
    assert choice_score("acc", [-2.0, -2.0], ["a", "b"], 0) == 1.0  # of equal ones the first


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
@pytest.mark.parametrize("right", [0, 1])
def test_a_model_that_has_diverged_knows_no_choice(metric, right):
    for likelihoods in ([math.nan, math.nan], [math.nan, -1.0], [-math.inf, -math.inf]):
        assert choice_score(metric, likelihoods, ["a", "b"], right) == 0.0
    assert choice_score(metric, [-math.inf, -1.0], ["a", "b"], 1) == 1.0


def test_classes_are_means_of_the_functions():
    predictions, references = ["a b", "x", "no"], [["a c", "a b d"], ["x"], ["yes"]]
    for metric, function in (
        (ExactMatch(), exact_match),
        (NormalizedMatch(), normalized_match),
        (RougeL(), rouge_l),
        (EditSimilarity(), edit_similarity),
    ):
        metric.update(predictions[:1], references[:1])
        metric.update(predictions[1:], references[1:])
        values = [function(p, r) for p, r in zip(predictions, references, strict=True)]
        assert float(metric.compute()) == pytest.approx(sum(values) / 3)
    metric = SARI()
    metric.update(["a b"], [["a c"]], ["a b c"])
    assert float(metric.compute()) == pytest.approx(sari("a b", ["a c"], "a b c"))
    assert torch.isnan(ExactMatch().compute())


def test_each_name_of_a_task_has_a_definition_and_a_score():
    assert set(METRICS) == set(DEFINITIONS)
    for metric in sorted(set(METRICS) - set(BY_LIKELIHOOD)):
        assert answer_score(metric, "no", ["no"], "is it?", ["yes", "no"]) == 1.0
