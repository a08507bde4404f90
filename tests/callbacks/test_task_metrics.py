"""Task(metrics=…): what is asked, its scores, matrices, report, refusals, and that a resumed run has the same."""

from __future__ import annotations

import csv
import json

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from toys import TINY_LLAMA, Classifier, classification, trainer

from lightning_cl import CausalLM, TaskAdapters, TaskDataModule, TaskMatrix, TrainedBPE, fit_tasks
from lightning_cl.data.exercises import exercises_of
from lightning_cl.evaluation.sentences import cut_off_sentences
from lightning_cl.passes.choices import log_likelihoods
from lightning_cl.passes.exam import hold_exam
from lightning_cl.sequence.evaluate import evaluate_tasks
from lightning_cl.tasks import Task

COLOURS = ["red", "blue", "dark blue"]
ASKED = [
    {"prompt": f"sky {i}:", "answer": COLOURS[i % 3], "choices": COLOURS, "references": ["azure"]} for i in range(9)
]
SUMS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(12)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("vocabulary"))


def tasks(**settings):
    return [
        Task("colours", ASKED, val=ASKED[:6], metrics=["acc", "accuracy", "rouge_l"]),
        Task("sums", SUMS, val=SUMS[:4], test=SUMS[4:7], metrics=["exact_match"], **settings),
        Task("prose", [f"the {word} sleeps in the barn" for word in ("cat", "dog", "owl")] * 4, max_steps=1),
    ]


def data(cache, given=None, **settings):
    return TaskDataModule(
        given or tasks(), tokenizer=TrainedBPE(280, cache), **{"max_length": 32, "batch_size": 4} | settings
    )


def module(**settings):
    L.seed_everything(0, verbose=False)
    return CausalLM(TINY_LLAMA, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01), schedule=None, **settings)


def fit(root, cache, matrix, given=None, callbacks=(), model=None, ckpt_path=None, **settings):
    made = model or module()
    saver = ModelCheckpoint(save_top_k=0)
    run = trainer(root, [matrix, saver, *callbacks], **{"max_steps": 2} | settings)
    fit_tasks(run, made, data(cache, given), ckpt_path=ckpt_path)
    return made, run


@pytest.fixture(scope="module")
def done(tmp_path_factory, cache):
    root = tmp_path_factory.mktemp("run")
    matrix = TaskMatrix()
    made, run = fit(root, cache, matrix)
    return root, matrix, made, run


def plain_choice(made, tokenizer, record):
    """The choice with the highest probability, by one forward pass for each and all logits."""
    values = []
    for choice in record["choices"]:
        prompt = tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]
        whole = tokenizer(record["prompt"] + choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_p = made.lm.eval()(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        values.append(sum(float(log_p[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
    return max(range(len(values)), key=values.__getitem__), values


# ---------------------------------------------------------------------- numbers


def test_choices_are_compared_as_one_by_one(done, cache):
    _, matrix, made, run = done
    tokenizer = run.datamodule.tokenizer
    chosen = [plain_choice(made, tokenizer, record) for record in ASKED[:6]]
    right = [
        float(record["choices"][best] == record["answer"]) for record, (best, _) in zip(ASKED, chosen, strict=False)
    ]
    scores = matrix.summary()["metrics"]["scores"]["acc"]
    assert scores["matrix"][3][0] == pytest.approx(sum(right) / 6)
    exercises = exercises_of(run.datamodule, run.datamodule.tasks[0])
    asked = [(row[:at], row[at:]) for row, at in zip(exercises[2].rows, exercises[2].starts, strict=True)]
    found = log_likelihoods(made.lm, asked)
    assert found == pytest.approx(chosen[2][1], abs=1e-4)


def test_answers_are_those_of_generate_and_scored_by_the_functions(done):
    _, matrix, made, _run = done
    report = matrix.summary()["metrics"]
    exam = matrix._task_metrics.exams["sums"][3]
    longest = report["tasks"]["sums"]["max_new_tokens"]
    for record, answer, score in zip(SUMS, exam["answers"], exam["scores"]["exact_match"], strict=False):
        assert answer == made.generate(record["prompt"], longest)
        assert score == float(answer.strip() == record["answer"])
    assert report["scores"]["exact_match"]["matrix"][3][1] == sum(exam["scores"]["exact_match"]) / 4


def test_an_oracle_gets_full_marks(done, monkeypatch):
    """A model that writes each reference has every score; the end token ends an answer."""
    _, _, made, run = done
    module_data = run.datamodule
    by_prompt = {}
    for task in module_data.tasks[:2]:
        for one in exercises_of(module_data, task):
            reference = module_data.tokenizer(one.references[0], add_special_tokens=False)["input_ids"]
            by_prompt[tuple(one.prompt)] = reference

    def generate(input_ids, attention_mask, **settings):
        end = settings["eos_token_id"][0]
        rows = [
            by_prompt[tuple(row[mask.bool()].tolist())] for row, mask in zip(input_ids, attention_mask, strict=True)
        ]
        longest = max(map(len, rows)) + 3
        new = torch.tensor([[*row, end, *[5] * (longest - len(row))] for row in rows])
        return torch.cat([input_ids, new], 1)

    monkeypatch.setattr(made.lm, "generate", generate)
    for task in module_data.tasks[:2]:
        exam = hold_exam(run, made, module_data, task, exercises_of(module_data, task), 20)
        written = [scores for name, scores in exam.scores.items() if name != "acc"]
        assert all(set(scores) == {1.0} for scores in written)
        assert exam.cut_off == 0


def test_answers_without_an_end_are_counted_and_told(done, monkeypatch):
    """Two of four have none: what a model would write after the last token that it may write is in no score."""
    _, matrix, made, run = done
    end = {}

    def generate(input_ids, attention_mask, **settings):
        end["id"] = settings["eos_token_id"][0]
        new = torch.full((len(input_ids), settings["max_new_tokens"]), 5)
        new[::2, -1] = end["id"]
        return torch.cat([input_ids, new], 1)

    monkeypatch.setattr(made.lm, "generate", generate)
    task = run.datamodule.tasks[1]
    exam = hold_exam(run, made, run.datamodule, task, exercises_of(run.datamodule, task), 6)
    assert exam.cut_off == 2
    summary = {"metrics": {"tasks": {"sums": {"samples": 4, "max_new_tokens": 6, "cut_off": {"2": 9, "10": 2}}}}}
    assert cut_off_sentences(summary) == [
        "sums: 2 of 4 answers after the last task had no end after 6 tokens and were cut off there;"
        " Task(max_new_tokens=…) allows more."
    ]
    counts = matrix.summary()["metrics"]["tasks"]["sums"]["cut_off"]
    assert set(counts) == {"0", "1", "2", "3"}
    longest = matrix.summary()["metrics"]["tasks"]["sums"]["max_new_tokens"]
    tokenizer = run.datamodule.tokenizer
    answers = matrix._task_metrics.exams["sums"][3]["answers"]
    whole = [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) >= longest for answer in answers]
    assert counts["3"] >= sum(whole)


def test_report_files_and_scores(done):
    root, matrix, _, _ = done
    report = json.loads((root / "report.json").read_text())
    metrics = report["metrics"]
    assert list(metrics["scores"]) == ["exact_match", "accuracy", "acc", "rouge_l", "main"]
    assert metrics["tasks"]["colours"]["chance"] == pytest.approx(1 / 3)
    assert [metrics["tasks"][name]["samples"] for name in ("colours", "sums")] == [6, 4]
    assert "prose" not in metrics["tasks"]
    scores = metrics["scores"]
    main, columns = scores["main"], list(zip(*scores["main"]["matrix"], strict=True))
    assert list(columns[0]) == [row[0] for row in scores["acc"]["matrix"]]
    assert list(columns[1]) == [row[1] for row in scores["exact_match"]["matrix"]]
    assert columns[2] == (None,) * 4
    assert main["average"] == pytest.approx((columns[0][3] + columns[1][3]) / 2)
    assert main["forgetting"] is not None
    assert main["mode"] == "max"
    costs = metrics["costs"]
    assert len(costs["boundaries"]) == 4
    assert costs["generated_tokens"] > 0
    assert costs["scored_tokens"] > 0
    assert report["costs"]["evaluation_seconds"] >= costs["seconds"]
    shown = metrics["answers"]["sums"][0]
    assert shown["references"] in [[record["answer"]] for record in SUMS]
    assert len(shown["answers"]) == 4
    assert sorted(path.name for path in root.glob("matrix_*.csv")) == sorted(f"matrix_{name}.csv" for name in scores)
    with (root / "matrix_exact_match.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["colours"] for row in rows] == [""] * 4
    assert [float(row["sums"]) for row in rows] == [
        row[1] for row in matrix.summary()["metrics"]["scores"]["exact_match"]["matrix"]
    ]


def test_resumed_run_has_the_same_rows_and_other_exercises_are_told(tmp_path, done, cache):
    root, whole, _, _ = done
    boundary, again = root / "tasks" / "1-sums.ckpt", TaskMatrix()
    fit(tmp_path / "again", cache, again, ckpt_path=boundary)
    ours, theirs = whole.summary()["metrics"], again.summary()["metrics"]
    assert ours["tasks"] == theirs["tasks"]
    for name in ours["scores"]:
        rows = [torch.tensor(one["scores"][name]["matrix"]).nan_to_num(9) for one in (ours, theirs)]
        assert torch.equal(*rows)
    limited = TaskMatrix(metric_samples=2)
    with pytest.warns(UserWarning, match="metrics of colours are measured on other data.*the exercises"):
        fit(tmp_path / "limited", cache, limited, ckpt_path=boundary)
    about = limited.summary()["metrics"]
    assert about["tasks"]["colours"]["samples"] == about["tasks"]["sums"]["samples"] == 2
    assert [row[0] == row[0] for row in about["scores"]["acc"]["matrix"]] == [False, False, True, True]
    assert {(change["task"], change["row"]) for change in about["changes"]} == {("colours", 2), ("sums", 2)}


def test_an_evaluation_gives_the_same_scores(done, cache, tmp_path):
    root, matrix, _, _ = done
    run, scores = trainer(tmp_path), matrix.summary()["metrics"]["scores"]
    found = evaluate_tasks(run, module(), data(cache), ckpt_path=root / "tasks" / "2-prose.ckpt")
    assert {name: found["colours"][name] for name in ("acc", "accuracy", "rouge_l")} == {
        name: scores[name]["matrix"][3][0] for name in ("acc", "accuracy", "rouge_l")
    }
    assert found["sums"]["exact_match"] == scores["exact_match"]["matrix"][3][1]
    assert "exact_match" not in found["prose"]


def test_the_deployed_view_answers(tmp_path, cache):
    """Each task is asked with its own adapter: other tasks' training changes none of its answers."""
    matrix = TaskMatrix()
    lora = {"r": 4, "target_modules": "all-linear"}
    fit(tmp_path, cache, matrix, tasks()[:2], [TaskAdapters()], module(lora=lora))
    exams = matrix._task_metrics.exams["colours"]
    assert exams[2] == exams[1]
    assert matrix.summary()["metrics"]["scores"]["acc"]["forgetting"] == 0.0


# ---------------------------------------------------------------------- what is asked


def test_exercises_of_each_form(cache):
    turns = [("user", "q"), ("assistant", "a")]
    chats = [{"messages": [{"role": role, "content": f"{text}{i}"} for role, text in turns]} for i in range(9)]
    texts = [f"one two three four five {i}" for i in range(9)]
    inputs = [{"instruction": "add", "input": f"{i}", "output": f" {i}"} for i in range(9)]
    numbered = [{"prompt": "which? ", "choices": ["ape", "bee"], "answer": i % 2} for i in range(9)]
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    made = data(
        cache,
        [
            Task("chat", chats, metrics=["rouge_l"]),
            Task("numbers", numbered, metrics=["acc"]),
            Task("inputs", inputs, metrics=["sari"]),
            Task("text", texts, metrics=["edit_similarity"]),
        ],
        chat_template=template,
    )
    made.prepare_data()
    made.setup()
    tokenizer = made.tokenizer
    asked = {task.name: exercises_of(made, task) for task in made.tasks}
    first = asked["chat"][0]
    assert first.text.startswith("q")
    assert first.references == [first.text.replace("q", "a")]
    assert tokenizer.decode(first.prompt) == f"<user>{first.text}</s><assistant>"
    first = asked["numbers"][0]
    assert first.choices[first.right] == first.references[0]
    assert [tokenizer.decode(row[at:]) for row, at in zip(first.rows, first.starts, strict=True)] == ["ape", "bee"]
    first = asked["inputs"][0]
    assert first.text == f"add\n\n{first.references[0].strip()}"
    assert all(tokenizer.decode(one.prompt) + one.references[0] in texts for one in asked["text"])


def test_prompts_are_those_of_training_and_the_held_out_ones(cache):
    made = data(cache, [Task("sums", SUMS, metrics=["exact_match"])], val_fraction=0.3)
    made.prepare_data()
    made.setup()
    held_out = made._data(made.tasks[0]).val
    asked = exercises_of(made, made.tasks[0])
    assert len(asked) == len(held_out) > 1
    assert [one.prompt for one in asked] == [
        sample["input_ids"][~sample["loss_mask"]].tolist() for sample in (held_out[i] for i in range(len(held_out)))
    ]
    assert asked == exercises_of(made, made.tasks[0])
    assert len(exercises_of(made, made.tasks[0], most=1)) == 1


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["bleu"]}, "got 'bleu'; expected some of"),
        ({"metrics": []}, "an empty list"),
        ({"metrics": ["acc", "acc"]}, "named twice"),
        ({"choices": ["a"]}, "at least two different texts"),
        ({"choices": "ab"}, "at least two different texts"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_wrong_arguments_of_a_task(arguments, message):
    with pytest.raises(ValueError, match=message):
        Task("a", SUMS, **arguments)


def test_what_cannot_be_asked_is_refused_before_training(tmp_path, cache):
    with pytest.raises(ValueError, match="its data is no text"):
        TaskDataModule([Task("a", classification(0), metrics=["acc"])])
    with pytest.raises(ValueError, match="acc needs the possible answers"):
        fit(tmp_path, cache, TaskMatrix(), [Task("a", SUMS, metrics=["acc"])])
    with pytest.raises(ValueError, match=r"item 0: the answer '0' is none of its choices \['x', 'y'\]"):
        fit(tmp_path, cache, TaskMatrix(), [Task("a", SUMS, val=SUMS, metrics=["acc"], choices=["x", "y"])])
    with pytest.raises(ValueError, match="there is no test data in it"):
        fit(tmp_path, cache, TaskMatrix(metric_split="test"), tasks())
    with pytest.raises(ValueError, match="metric_samples=0"):
        TaskMatrix(metric_samples=0)

    class NoWriter(Classifier):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(300, 300)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(
                self.table(batch["input_ids"]).flatten(0, 1), batch["input_ids"].flatten()
            )

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))

    with pytest.raises(MisconfigurationException, match="nothing in NoWriter can write answers"):
        fit(tmp_path, cache, TaskMatrix(), tasks(), model=NoWriter())
