"""What a model wrote itself: which of it is kept, what is learnt of it, and what it goes on from."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from stand_in import CHATML, save_stand_in
from starting import puts_in_front
from transformers import AutoTokenizer

from lightning_cl.callbacks.replay.rehearsal import (
    Prompt,
    as_sample,
    choose,
    is_repetitive,
    near_duplicates,
    outliers,
)
from lightning_cl.callbacks.replay.rehearsal_prompts import UserTurn, beginning_of, read_prompts, start_of_text
from lightning_cl.data import TrainedBPE
from lightning_cl.data.text.answer_ends import ends_of_answers
from lightning_cl.data.text.sample_texts import SAMPLES
from lightning_cl.data.text.tokens import encode, tokenize
from lightning_cl.passes.generation import Written


def text(ids, ended=False, surprise=1.0):
    return Written(list(ids), ended, surprise)


def words(seed: int, length: int = 30, vocabulary: int = 1000) -> list[int]:
    return random.Random(seed).choices(range(vocabulary), k=length)


# ---------------------------------------------------------------------- repetition


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (range(300), False),
        ([7] * 40, True),
        ([1, 2, 3] * 10, True),
        ([7] * 3, False),  # no 4-gram at all
        ([7] * 4, False),  # one
        ([*range(200), *([1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 7)], True),  # falls into a loop at its end
        ([*([1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 7), *range(100, 300)], True),  # and out of one
        ([*range(200), *([1, 2, 3] * 5)], False),  # a short loop, as in a list
        ([*range(40)] * 7, True),  # a paragraph again and again: no window of 64 tokens shows it
        ([*range(60)] * 4, False),
        ([*range(40), *range(20)], False),
    ],
)
def test_what_goes_round_in_circles(ids, expected):
    assert is_repetitive(list(ids)) == expected


def test_the_bound_is_the_share_of_distinct_4_grams():
    """Of 61 4-grams, 0.35 are 21.35: 21 different ones are too few, and 22 are enough."""
    for period, expected in ((21, True), (22, False)):
        loop = [*range(period)] * 4
        grams = {tuple(loop[i : i + 4]) for i in range(61)}
        assert len(grams) == period
        assert is_repetitive(loop[:64]) == expected


def test_hardly_a_real_text_is_called_repetitive(tmp_path):
    tokenizer = TrainedBPE(1000, str(tmp_path)).train(SAMPLES["prose"]()[:40])
    for name in ("prose", "python"):
        blocks = [block for block in tokenize(SAMPLES[name]()[:30], tokenizer, 256) if len(block) == 256]
        assert len(blocks) > 100
        assert sum(map(is_repetitive, blocks)) <= 0.015 * len(blocks)


# ---------------------------------------------------------------------- outliers


def test_outliers_are_far_from_the_median_in_both_directions():
    values = [1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 1.05, 0.95, 3.0, -2.0, 1.3]
    # The median is 1.0, the median of the distances 0.1: a standard deviation is 0.148, and 3.5 of them 0.519.
    assert outliers(values) == [8, 9]
    assert outliers([*values, 1.51]) == [8, 9]
    assert outliers([*values, 1.9]) == [8, 9, 11]


def test_a_few_values_or_equal_ones_have_no_outliers():
    assert outliers([1.0] * 6 + [100.0]) == []
    assert outliers([1.0] * 7 + [100.0]) == []  # nobody can say how much they vary
    assert outliers([]) == []


def test_few_normal_values_are_outliers():
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).tolist()
    share = len(outliers([3 + 2 * value for value in values])) / len(values)
    assert share == pytest.approx(math.erfc(3.5 / math.sqrt(2)), abs=5e-4)


# ---------------------------------------------------------------------- duplicates


def by_comparing_all(texts, n, least):
    """Every text with every one that was kept before it."""
    kept, found = [], []
    for place, ids in enumerate(texts):
        grams = {tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)}
        if any(grams and len(grams & other) / len(grams | other) >= least for other in kept):
            found.append(place)
        else:
            kept.append(grams)
    return found


@pytest.mark.parametrize("least", [0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("n", [1, 3])
def test_near_duplicates_are_those_of_comparing_all(least, n):
    generator = random.Random(0)
    found = 0
    for _ in range(60):
        texts = [words(generator.randrange(9999), generator.randrange(12), 4) for _ in range(8)]
        for original in list(texts):  # copies with a few changes, around the bound
            copy = list(original)
            for _ in range(generator.randrange(4)):
                if copy:
                    copy[generator.randrange(len(copy))] = generator.randrange(6)
            texts.insert(generator.randrange(len(texts)), copy)
        expected = by_comparing_all(texts, n, least)
        assert near_duplicates(texts, n, least) == expected
        found += len(expected)
    assert found > 100


def test_a_similarity_that_is_just_enough():
    # Nine of ten trigrams are shared, 9/11 of all; then 7 of 10: 7/13.
    one = list(range(12))
    assert near_duplicates([one, [*range(11), 99]], 3, 9 / 11) == [1]
    assert near_duplicates([one, [*range(11), 99]], 3, 9 / 11 + 1e-9) == []
    assert near_duplicates([one, [*range(9), 97, 98, 99]], 3, 7 / 13) == [1]


# ---------------------------------------------------------------------- all filters


def test_each_text_is_rejected_for_its_first_reason():
    good = [text(words(i), surprise=1 + 0.01 * i) for i in range(12)]
    bad = {
        "short": text([5, 6, 7, 2], ended=True),  # three tokens and the end
        "noise": text(words(100), surprise=0.81 * math.log(1000)),
        "repetitive": text([7, 8] * 20),
        "outlier": text(words(101), surprise=3.0),
        "duplicate": text(words(0), surprise=1.05),
        "near duplicate": text([*words(1)[:-1], 999], surprise=1.05),
    }
    texts = [*good[:6], *bad.values(), *good[6:], text([5] * 2, surprise=99.0)]
    prompts = [Prompt((1,))] * len(texts)
    chosen, rejected = choose(prompts, texts, 4, 1000)
    assert chosen == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17]
    assert rejected == dict.fromkeys(bad, 1) | {"short": 2}
    assert len(chosen) + sum(rejected.values()) == len(texts)


def test_noise_is_what_a_model_without_knowledge_writes():
    texts = [text(words(i), surprise=math.log(1000)) for i in range(20)]
    assert choose([Prompt((1,))] * 20, texts, 1, 1000) == ([], {"noise": 20})
    just = [text(words(i), surprise=0.79 * math.log(1000)) for i in range(20)]
    assert choose([Prompt((1,))] * 20, just, 1, 1000)[1] == {}


def test_kinds_of_texts_are_compared_with_their_like():
    """Code surprises less than prose: neither are the outliers of the other."""
    texts = [text(words(i), surprise=(1.0 if i % 4 else 3.0) + 0.01 * i) for i in range(40)]
    prompts = [Prompt((1,), "code" if i % 4 else "prose") for i in range(40)]
    assert choose(prompts, texts, 1, 1000)[1] == {}
    assert choose([Prompt((1,))] * 40, texts, 1, 1000)[1]["outlier"] == 10


def test_a_task_may_know_a_few_answers_only():
    """One answer to different prompts is no duplicate, whatever all prompts have in front."""
    front, answer = tuple(range(500, 600)), text([5, 6, 7, 2], ended=True)
    prompts = [Prompt((*front, *words(i, 8))) for i in range(3)]
    assert choose(prompts, [answer] * 3, 1, 1000) == ([0, 1, 2], {})
    assert choose([prompts[0]] * 3, [answer] * 3, 1, 1000) == ([0], {"duplicate": 2})
    nearly = [Prompt((*front, *words(0, 8)[:-1], i)) for i in range(3)]
    assert choose(nearly, [text(words(1))] * 3, 1, 1000) == ([0], {"near duplicate": 2})
    short = [text([5]), text([5]), text([6])]  # without a 3-gram
    assert choose([prompts[0]] * 3, short, 1, 1000) == ([0, 2], {"duplicate": 1})


# ---------------------------------------------------------------------- samples


@pytest.mark.parametrize(
    ("prompt", "ids", "mask"),
    [
        (Prompt((1, 2, 3)), [1, 2, 3, 8, 9], [0, 0, 0, 1, 1]),  # an answer
        (Prompt((1,), learnt=True), [1, 8, 9], [1, 1, 1]),  # a text behind the start token
        (Prompt((1,), learnt=True, hidden=1), [8, 9], [1, 1]),  # behind the end token of another one
    ],
)
def test_what_of_a_sample_is_learnt(prompt, ids, mask):
    sample = as_sample(prompt, text([8, 9], ended=True))
    assert sample["input_ids"].tolist() == ids
    assert sample["loss_mask"].int().tolist() == mask
    assert (sample["input_ids"].dtype, sample["loss_mask"].dtype) == (torch.int32, torch.bool)


# ---------------------------------------------------------------------- prompts


def test_prompts_from_a_list_and_from_files(tmp_path):
    assert read_prompts(["Tell me.", " Why? "]) == ["Tell me.", "Why?"]
    (tmp_path / "p.txt").write_text("Tell me.\n\nWhy?\n")
    assert read_prompts(str(tmp_path / "p.txt")) == ["Tell me.", "Why?"]
    records = [
        {"prompt": "Tell me.", "completion": "No."},
        {"instruction": "Why?", "output": ""},
        {"instruction": "Add.", "input": "1, 2"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert read_prompts(tmp_path / "p.jsonl") == ["Tell me.", "Why?", "Add.\n\n1, 2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', r"p\.jsonl.*line 2: expected a record"),
        ("p.jsonl", '{"prompt": "a"}\n{oops', r"p\.jsonl.*line 2: not valid JSON"),
        ("p.jsonl", '{"prompt": 3}', r"line 1: expected a record"),
        ("p.txt", "\n \n", r"there is no prompt in it"),
        ("p.csv", "a", r"expected a \.txt file"),
    ],
)
def test_what_is_wrong_with_a_file_of_prompts_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name))


def test_no_file_and_no_texts_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt.*no such file"):
        read_prompts(str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="no prompt in it"):
        read_prompts([])
    with pytest.raises(TypeError, match="one is a dict"):
        read_prompts(["a", {"prompt": "b"}])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_stand_in(tmp_path_factory.mktemp("model")))


def ids_of(tokenizer, said):
    return tokenizer(said, add_special_tokens=False)["input_ids"]


def test_the_users_turn_of_a_template_with_special_tokens(tokenizer):
    turn = UserTurn.of(tokenizer)
    assert tokenizer.decode(turn.ids) == "<|im_start|>user\n"
    assert turn.ends == (tokenizer.eos_token_id,)
    said = text([*ids_of(tokenizer, " the quick fox "), tokenizer.eos_token_id], ended=True)
    assert turn.words(said, tokenizer) == "the quick fox"
    assert turn.words(text(said.ids[:-1]), tokenizer) is None  # it does not come to an end
    assert turn.words(text([tokenizer.eos_token_id], ended=True), tokenizer) == ""


def test_the_users_turn_of_a_template_without_special_tokens(tokenizer):
    """As Llama 2 has it."""
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, eos_token="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}<|endoftext|>{% endif %}{% endfor %}"
    )
    turn = UserTurn.of(tokenizer)
    assert tokenizer.decode(turn.ids) == "[INST]"  # without the space that belongs to the first word
    assert turn.ends == ()
    assert ends_of_answers(tokenizer) == [tokenizer.eos_token_id]
    assert turn.words(text(ids_of(tokenizer, " the fox [/INST] a dog")), tokenizer) == "the fox"
    assert turn.words(text(ids_of(tokenizer, " the fox")), tokenizer) is None


def test_what_the_template_says_first_stays_in_front(tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = "<|im_start|>system\nthe dog<|im_end|>\n" + CHATML
    turn = UserTurn.of(tokenizer)
    assert tokenizer.decode(turn.ids) == "<|im_start|>system\nthe dog<|im_end|>\n<|im_start|>user\n"


def test_the_end_of_an_answer_is_also_the_templates(tokenizer):
    """Many base models have a chat template, and another end token than it has."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path, eos_token="<|endoftext|>")
    both = [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")]
    assert ends_of_answers(tokenizer) == sorted(both)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert ends_of_answers(tokenizer) == both[:1]
    tokenizer.chat_template = None
    assert ends_of_answers(tokenizer) == both[:1]


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['content'][0].text }}", "{{ messages[0]['content'] }}", "{{ x.y.z }}"]
)
def test_a_template_that_does_not_tell_the_users_turn_is_named(tokenizer, template):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="give prompts"):
        UserTurn.of(tokenizer)


def test_what_a_free_text_begins_with(tmp_path):
    tokenizer = TrainedBPE(300, str(tmp_path)).train(["the cat"])
    # No start token of its own: behind the end of another text, and that is no part of the sample.
    assert start_of_text(tokenizer) == Prompt((tokenizer.eos_token_id,), learnt=True, hidden=1)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    puts_in_front(tokenizer, "<s>")
    start = start_of_text(tokenizer)
    assert start == Prompt((tokenizer.bos_token_id,), learnt=True, hidden=0)
    # A sample looks as that of a text that was trained on.
    (ids, mask), *_ = encode(["the cat"], tokenizer, 64)
    made = as_sample(start, text(ids[1:].tolist(), ended=True))
    assert torch.equal(made["input_ids"], ids)
    assert torch.equal(made["loss_mask"], mask)
    tokenizer = TrainedBPE(300, str(tmp_path)).train(["the cat"])
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no start and no end token"):
        start_of_text(tokenizer)


def test_the_beginning_of_a_sample_is_what_stands_before_its_last_answer():
    ids = torch.arange(100, 110)
    mask = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1, 1, 1], dtype=torch.bool)
    assert beginning_of({"input_ids": ids, "loss_mask": mask}) == list(range(100, 107))
    everything = torch.ones(100, dtype=torch.bool)
    assert beginning_of({"input_ids": torch.arange(100), "loss_mask": everything}) == list(range(32))
    assert beginning_of({"input_ids": torch.arange(10), "loss_mask": everything[:10]}) == list(range(5))
