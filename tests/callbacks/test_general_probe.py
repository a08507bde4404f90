"""GeneralProbe and LMEvalProbe: right and balanced items, likelihoods and p-values by hand, and no trace left."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import math
import random
from collections import Counter
from contextlib import contextmanager
from difflib import SequenceMatcher

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toys import TINY_LLAMA, Classifier, classification, trainer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_cl import GeneralProbe, LMEvalProbe, TaskDataModule, TaskMatrix, TrainedBPE, fit_tasks
from lightning_cl.callbacks.monitoring.lm_eval_probe import rows_of
from lightning_cl.core.method import ContinualCallback
from lightning_cl.evaluation.paired import mcnemar, mean_and_error, paired_p, sign_flips
from lightning_cl.evaluation.probe_items import CATEGORIES, bundled_items
from lightning_cl.evaluation.probe_table import format_probe, probe_report, probe_sentences
from lightning_cl.passes.choices import choice_tokens, log_likelihoods

TEXTS = {
    "animals": [f"the {animal} sleeps in the barn" for animal in ("cat", "dog", "owl", "hen", "fox")] * 2,
    "code": [f"def {name}(x): return x + 1" for name in ("cat", "dog", "owl", "hen", "fox")] * 2,
}
ITEMS = bundled_items(CATEGORIES)
SOME = ["knowledge", "refusals"]


class SomebodysLM(L.LightningModule):
    """Knows nothing of this library: a Llama with dropout."""

    def __init__(self):
        super().__init__()
        self.model = LlamaForCausalLM(LlamaConfig(**TINY_LLAMA, vocab_size=270, attention_dropout=0.3))

    def training_step(self, batch, batch_idx):
        return self.model(**batch, use_cache=False).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch, use_cache=False).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def tokenizer(cache):
    return TrainedBPE(270, cache).train([text for texts in TEXTS.values() for text in texts])


def fit(root, cache, callbacks, names=tuple(TEXTS), ckpt_path=None, **settings):
    L.seed_everything(0, verbose=False)
    module = SomebodysLM()
    data = TaskDataModule(
        {name: TEXTS[name] for name in names}, tokenizer=TrainedBPE(270, cache), max_length=24, batch_size=4
    )
    start = {name: value.clone() for name, value in module.state_dict().items()}
    fit_tasks(trainer(root, callbacks, **{"max_steps": 2} | settings), module, data, ckpt_path)
    return module, start, data.tokenizer


# ---------------------------------------------------------------------- items


@pytest.mark.parametrize("name", CATEGORIES)
def test_items_are_complete_and_different(name):
    items = ITEMS[name]
    assert 36 <= len(items) <= 40
    asked = [item.prompt or item.right for item in items]
    assert len(set(asked)) == len(asked)
    assert all(item.chat == (name in ("instructions", "refusals", "answers")) for item in items)


def test_sums_are_right_and_the_other_choices_wrong():
    for item in ITEMS["arithmetic"]:
        left, sign, right, equals = item.prompt.split()
        assert sign in "+-*"
        assert equals == "="
        value = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign]
        assert int(item.right) == value
        assert value not in map(int, item.wrong)


def test_sentences_of_a_pair_differ_in_a_word_or_two():
    for item in ITEMS["language"]:
        (wrong,) = item.wrong
        assert SequenceMatcher(None, item.right, wrong).ratio() > 0.75


@pytest.mark.parametrize("names", [["knowledge"], ["arithmetic"], ["instructions"], ["refusals", "answers"]])
def test_who_ignores_the_question_is_right_by_chance(names):
    """Whatever a text's own probability is: exactly so, for the choices take turns."""
    items = [item for name in names for item in ITEMS[name]]
    right = Counter(item.right for item in items)
    wrong = Counter(text for item in items for text in item.wrong)
    assert all(wrong[text] == count * len(items[0].wrong) for text, count in right.items())
    for seed in range(5):
        own = {text: random.Random(f"{seed}{text}").random() for text in {*right, *wrong}}
        share = sum(own[item.right] > max(own[text] for text in item.wrong) for item in items) / len(items)
        assert share == items[0].chance


# ---------------------------------------------------------------------- likelihoods


def by_hand(model, context, continuation):
    """One row, no padding, all logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*context, *continuation]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(context) - 1 + i, token]) for i, token in enumerate(continuation))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_likelihoods_are_those_of_single_rows(kind):
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(LlamaConfig(**TINY_LLAMA, vocab_size=270))
        if kind == "llama"
        else GPT2LMHeadModel(GPT2Config(vocab_size=270, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    ).train()
    draw = random.Random(0)
    rows = [
        [[draw.randrange(270) for _ in range(n)] for n in (draw.randint(1, 9), draw.randint(1, 7))] for _ in range(9)
    ]
    model.eval()
    expected = [by_hand(model, *row) for row in rows]
    model.train()
    for batch_size in (1, 4, 16):
        assert log_likelihoods(model, rows, 3, batch_size) == pytest.approx(expected, abs=1e-4)
    assert model.training
    # What does not fit into 64 positions loses the beginning of its context.
    long = [draw.randrange(270) for _ in range(100)]
    found = log_likelihoods(model, [[long, [5, 6]]])
    assert found == pytest.approx([by_hand(model.eval(), long[-62:], [5, 6])], abs=1e-4)


def test_choices_are_split_at_one_position_of_the_whole_text(tokenizer):
    rows = choice_tokens(tokenizer, "the owl sleeps in the", [" barn", " bar", " river"])
    assert len({tuple(context) for context, _ in rows}) == 1
    for (context, choice), text in zip(rows, (" barn", " bar", " river"), strict=True):
        whole = tokenizer(f"the owl sleeps in the{text}", add_special_tokens=False)["input_ids"]
        assert (context + choice)[-len(whole) :] == whole
        assert choice
    # Without a context: an end token before, so that the first token counts too.
    (context, choice), _ = choice_tokens(tokenizer, "", ["the cat", "dog"])
    assert tokenizer.decode(choice) == "the cat"
    assert context == [tokenizer.eos_token_id]


# ---------------------------------------------------------------------- statistics


def test_mcnemar_by_hand():
    assert mcnemar([True] * 6, [False] * 6) == pytest.approx(2 / 64)
    assert mcnemar([True] * 5 + [False] * 3, [False] * 5 + [True] * 3) == pytest.approx(2 * (1 + 8 + 28 + 56) / 256)
    assert mcnemar([True, False] * 5, [True, False] * 5) == 1


def test_sign_flips_are_all_tried_or_drawn():
    values = [0.5, -0.25, 1.0, 0.75, 0.1]
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in itertools.product((1, -1), repeat=5)
    ]
    assert sign_flips([*values, 0.0]) == sum(total >= abs(sum(values)) - 1e-12 for total in sums) / 32
    assert sign_flips([0.3] * 40) == pytest.approx(1 / 10_001)
    draw = random.Random(1)
    ps = [sign_flips([draw.gauss(0, 1) for _ in range(30)], seed) for seed in range(40)]
    assert sum(p < 0.05 for p in ps) <= 6  # 2 expected; more than 6 has probability 0.3 %
    assert sign_flips([float("nan"), 1.0]) != sign_flips([float("nan"), 1.0])  # NaN
    assert paired_p([0.5, 0.25], [0.5, 0.25]) == 1


def test_mean_and_standard_error():
    assert mean_and_error([1.0, 0.0, 1.0, 0.0]) == (0.5, pytest.approx((4 * 0.25 / 3 / 4) ** 0.5))


def rows_with(lost, margin_loss):
    before = {"values": [1.0] * 32 + [0.0] * 8, "margins": [2.0] * 32 + [-2.0] * 8}
    after = {
        "values": [0.0] * lost + before["values"][lost:],
        "margins": [margin - margin_loss * (1 + i % 3) for i, margin in enumerate(before["margins"])],
    }
    return {0: {"arithmetic": before}, 2: {"arithmetic": after}}


@pytest.mark.parametrize(
    ("lost", "margin_loss", "said"),
    [
        (10, 0.5, "arithmetic fell from 0.80 to 0.55 (40 items, p = 0.002)."),
        (
            2,
            0.5,
            "arithmetic: the margin of the right choice fell from 1.200 to 0.212 nats (40 items, p = under 0.001);",
        ),
        (2, 0.0, "No sure change in arithmetic"),
    ],
)
def test_a_sentence_says_only_what_is_sure(lost, margin_loss, said):
    table = probe_report(rows_with(lost, margin_loss), ["arithmetic"])
    (sentence,) = probe_sentences(table)
    assert sentence.startswith(said)
    assert table["rows"] == [[0.8], [pytest.approx(0.8 - lost / 40)]]
    lines = format_probe("GeneralProbe", table | {"definition": "share"}, ["before training", "a", "b"])
    assert lines[-1].split() == ["b", f"{0.8 - lost / 40:.2f}", "±", f"{table['standard_errors'][1][0]:.2f}"]


# ---------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    root = tmp_path_factory.mktemp("run")
    probe, logger = GeneralProbe(SOME), CSVLogger(root, name="", version="")
    module, start, tokenizer = fit(root, cache, [probe, TaskMatrix()], logger=logger, enable_checkpointing=True)
    logger.save()
    end = {name: value.clone() for name, value in module.state_dict().items()}
    return root, probe, tokenizer, start, end


def test_rows_before_and_after_each_task_in_report_and_loggers(run):
    root, probe, *_ = run
    report = json.loads((root / "report.json").read_text())
    told = report["probe"]["GeneralProbe"]
    assert told["columns"] == SOME
    assert told["after"] == [0, 1, 2]
    assert told["n"] == [40, 36]
    assert told["chance"] == [0.25, 0.5]
    assert told["rows"] == [[sum(probe.rows[r][c]["values"]) / len(ITEMS[c]) for c in SOME] for r in range(3)]
    assert told["margins"] == [
        [pytest.approx(mean_and_error(probe.rows[r][c]["margins"])[0]) for c in SOME] for r in range(3)
    ]
    assert "probe" not in report["methods"]["GeneralProbe"]
    assert report["methods"]["GeneralProbe"]["sentences"]
    with (root / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for mark, values in (("probe", "rows"), ("probe_margin", "margins")):
        found = [float(row[f"continual/{mark}/knowledge"]) for row in rows if row.get(f"continual/{mark}/knowledge")]
        assert found == pytest.approx([row[0] for row in told[values]])


def test_margins_are_those_of_the_weights_at_the_boundary(run):
    _, probe, tokenizer, start, end = run
    module = SomebodysLM()
    for row, weights in ((0, start), (2, end)):
        module.load_state_dict(weights)
        module.eval()
        for i in (0, 5):
            knowledge, refusals = ITEMS["knowledge"][i], ITEMS["refusals"][i]
            for name, item, context in (
                ("knowledge", knowledge, knowledge.prompt),
                ("refusals", refusals, f"Question: {refusals.prompt}\nAnswer:"),
            ):
                pairs = choice_tokens(tokenizer, context, [f" {choice}" for choice in item.choices])
                right, *wrong = log_likelihoods(module.model, pairs, batch_size=1)
                assert probe.rows[row][name]["margins"][i] == pytest.approx(right - max(wrong), abs=1e-3)


def test_training_stays_the_same_bit_for_bit(run, tmp_path, cache):
    without, _, _ = fit(tmp_path, cache, [TaskMatrix()], enable_checkpointing=True)
    for name, value in without.state_dict().items():
        assert torch.equal(value, run[4][name]), name


def test_a_resumed_run_keeps_its_rows(run, tmp_path, cache):
    root, probe, *_ = run
    (checkpoint,) = (root / "tasks").glob("0-*.ckpt")
    again = GeneralProbe(SOME)
    fit(tmp_path, cache, [again, TaskMatrix()], ckpt_path=checkpoint)
    assert again.rows == probe.rows
    assert again.fingerprint == probe.fingerprint


def test_rows_of_other_questions_are_left_out_after_a_resume(run, tmp_path, cache):
    (checkpoint,) = (run[0] / "tasks").glob("0-*.ckpt")
    other = GeneralProbe(["arithmetic"])
    with pytest.warns(UserWarning, match="other questions are asked"):
        fit(tmp_path, cache, [other, TaskMatrix()], ckpt_path=checkpoint)
    assert list(other.rows) == [2]


class Deployed(ContinualCallback):
    """A user gets the model with another head."""

    @contextmanager
    def deployed(self, trainer, pl_module, task):
        weight = pl_module.model.lm_head.weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
        yield
        with torch.no_grad():
            weight.copy_(before)


def test_the_deployed_view_is_asked(tmp_path, cache):
    """Without a head all tokens are alike: −log p is log(270) for each."""
    probe = GeneralProbe(["language"])
    fit(tmp_path, cache, [probe, Deployed()], names=["code"])
    for row in probe.rows.values():
        counts = torch.tensor(row["language"]["margins"]).double() / torch.log(torch.tensor(270.0)).double()
        assert torch.allclose(counts, counts.round(), atol=1e-4)


# ---------------------------------------------------------------------- refusals


def test_no_language_model_is_refused_before_training(tmp_path):
    module = Classifier()
    start = module.net[0].weight.detach().clone()
    with pytest.raises(MisconfigurationException, match=r"GeneralProbe: nothing in Classifier is a causal language"):
        fit_tasks(trainer(tmp_path, [GeneralProbe()], max_epochs=1), module, {"a": classification(0)})
    assert torch.equal(module.net[0].weight, start)


def test_a_template_that_is_not_there_is_named(tmp_path, cache):
    with pytest.raises(MisconfigurationException, match=r"chat=True.*no chat template"):
        fit(tmp_path, cache, [GeneralProbe(SOME, chat=True)])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "right": "b"}', "line 1: expected prompt, right and wrong"),
        ('{"prompt": "a", "right": "b", "wrong": ["b"]}', "among the wrong ones"),
        ('{"prompt": "a", "right": "b", "wrong": []}', "at least one wrong choice"),
        ("", "it has no items"),
    ],
)
def test_lines_that_are_no_items_are_named(tmp_path, line, said):
    (tmp_path / "own.jsonl").write_text(line)
    with pytest.raises(ValueError, match=said):
        GeneralProbe(items={"own": tmp_path / "own.jsonl"})


def test_arguments_are_checked(tmp_path):
    for given in ("knowledge", ["nonsense"]):
        with pytest.raises(ValueError, match="categories="):
            GeneralProbe(given)
    with pytest.raises(ValueError, match="nothing to ask"):
        GeneralProbe([])
    with pytest.raises(ValueError, match=r"own\.jsonl.*no such file"):
        GeneralProbe(items={"own": tmp_path / "own.jsonl"})
    with pytest.raises(ValueError, match="tasks="):
        LMEvalProbe("hellaswag")
    with pytest.raises(ValueError, match="include_path="):
        LMEvalProbe(["a"], include_path=tmp_path / "nowhere")


# ---------------------------------------------------------------------- lm-evaluation-harness


def test_the_missing_extra_is_named(tmp_path, cache, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    with pytest.raises(MisconfigurationException, match=r"pip install 'lightning-cl\[lm-eval\]'"):
        fit(tmp_path, cache, [LMEvalProbe(["anything"])])


def test_columns_of_what_the_harness_returns():
    samples = [{"doc_id": 1, "filter": "none", "acc": 1.0}, {"doc_id": 0, "filter": "none", "acc": 0.0}]
    scores = {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.5, "f1,none": 0.7, "acc,strict": 0.25}
    found = rows_of({"results": {"t": scores, "group": {"acc,none": 0.1}}, "samples": {"t": samples}})
    assert found == {
        "t/acc": {"values": [0.0, 1.0]},
        "t/f1": {"values": [0.7], "n": [2.0]},
        "t/acc/strict": {"values": [0.25], "n": [2.0]},
    }


def test_a_local_task_of_the_harness(tmp_path, cache, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness (the extra lm-eval) is not installed")
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    documents = [
        {"q": f"the {a} sleeps in the", "o": [" barn", " x x x"], "a": i % 2}
        for i, a in enumerate(["cat", "dog", "owl"])
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "own.yaml").write_text(
        f"task: own_barn\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path / 'own.jsonl'}}}\n"
        f"test_split: train\noutput_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\ndoc_to_choice: '{{{{o}}}}'\n"
        "doc_to_target: a\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    probe = LMEvalProbe(["own_barn"], include_path=tmp_path)
    module, start, tokenizer = fit(tmp_path / "with", cache, [probe], names=["animals"])
    end = module.state_dict()
    for row, weights in ((0, start), (1, dict(end))):
        model = SomebodysLM().eval()
        model.load_state_dict(weights)
        pairs = [choice_tokens(tokenizer, document["q"], document["o"], special=False) for document in documents]
        scores = [log_likelihoods(model.model, pair) for pair in pairs]
        expected = [float(max((0, 1), key=s.__getitem__) == d["a"]) for s, d in zip(scores, documents, strict=True)]
        assert probe.rows[row]["own_barn/acc"]["values"] == expected
    without, _, _ = fit(tmp_path / "without", cache, [], names=["animals"])
    assert all(torch.equal(value, end[name]) for name, value in without.state_dict().items())
    with pytest.raises(MisconfigurationException, match=r"knows no task 'nonsense'"):
        fit(tmp_path / "unknown", cache, [LMEvalProbe(["nonsense"])])


def test_a_score_that_is_known_as_a_mean_alone_is_told_and_not_tested():
    """It takes no part in the correction for many columns either."""
    rows = {
        row: {"perplexity": {"values": [value], "n": [50.0]}, "acc": {"values": [float(i >= lost) for i in range(40)]}}
        for row, value, lost in ((0, 12.0, 0), (1, 900.0, 30))
    }
    table = probe_report(rows, ["perplexity", "acc"])
    mean, tested = table["changes"]
    assert math.isnan(mean["p"])
    assert mean["sure"] is None
    assert tested["sure"] == "score"
    assert probe_sentences(table)[0] == "perplexity went from 12.00 to 900.00 (50 items; a mean alone is not tested)."
    assert not any("No sure change" in words for words in probe_sentences(table))
