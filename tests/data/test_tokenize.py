"""Documents as token samples: masks of completions, length, streams, the data set they are kept in, and splits."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from starting import puts_in_front

from lightning_cl.data.text.formats import Chat, Completion, Instruction, Text
from lightning_cl.data.text.record_counts import Tally
from lightning_cl.data.text.tokenizer import TrainedBPE
from lightning_cl.data.text.tokens import TokenDataset, encode, split_documents, tokenize

UNICODE = ["Größe 10 µm\r\n\tfoo( x ) , bar .", "日本語 🐍🏽‍🔬 \u200b\ufeff", "\x00 don't  do   that !", "é e\u0301"]


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory):
    """257 tokens: each byte is one, so that lengths are known."""
    return TrainedBPE(257, str(tmp_path_factory.mktemp("bytes"))).train(["any"])


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """Has tokens of several letters, such as " four"."""
    texts = ["The answer is four. The question is forty-four."] * 20
    return TrainedBPE(320, str(tmp_path_factory.mktemp("merges"))).train(texts)


def with_start(tokenizer, token="A"):
    tokenizer = copy.deepcopy(tokenizer)
    puts_in_front(tokenizer, token)  # any token of the vocabulary
    return tokenizer


def ids_of(text, tokenizer):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def single(document, tokenizer, length=512):
    ((ids, mask),) = encode([document], tokenizer, length)
    assert (ids.dtype, mask.dtype) == (torch.int32, torch.bool)
    return ids.tolist(), mask.tolist()


# ---------------------------------------------------------------------- text


def test_text_gives_the_blocks_of_tokenize_all_of_them_learnt(merging):
    texts = ["The answer is four. " * n for n in range(12)] + UNICODE
    for length in (2, 7, 30):
        samples = list(encode([Text(text) for text in texts], merging, length))
        assert [ids.tolist() for ids, _ in samples] == [
            block for block in tokenize(texts, merging, length) if block[1:]
        ]
        assert all(mask.all() for _, mask in samples)


# ---------------------------------------------------------------------- completions


@pytest.mark.parametrize("text", UNICODE)
def test_prompt_bears_no_loss_and_the_end_does(bytewise, text):
    ids, mask = single(Completion(text, text[::-1]), bytewise)
    asked, answered = len(text.encode()), len(text[::-1].encode())
    assert ids == [*ids_of(text, bytewise), *ids_of(text[::-1], bytewise), bytewise.eos_token_id]
    assert mask == [False] * asked + [True] * (answered + 1)


def test_start_token_is_in_front_once_without_loss(bytewise):
    tokenizer = with_start(bytewise)
    start = tokenizer.bos_token_id
    for prompt in ("xy", "Axy"):  # a prompt that brings its own
        ids, mask = single(Completion(prompt, "z"), tokenizer)
        assert ids == [start, *ids_of("xyz", tokenizer), tokenizer.eos_token_id]
        assert mask == [False, False, False, True, True]


def test_end_token_under_the_name_of_a_start_token_is_not_put_in_front(bytewise):
    document, same = Completion("xy", "z"), copy.deepcopy(bytewise)
    same.bos_token = TrainedBPE.END
    assert single(document, same) == single(document, bytewise)


def test_end_token_is_added_once(bytewise):
    expected = single(Completion("xy", "z"), bytewise)
    assert single(Completion("xy", "z" + TrainedBPE.END), bytewise) == expected
    # One that ends the prompt is no end of the completion.
    ids, mask = single(Completion("xy" + TrainedBPE.END, ""), bytewise)
    assert ids[-2:] == [bytewise.eos_token_id] * 2
    assert mask == [False, False, False, True]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("The answer is", " four."),  # the seam is a token's
        ("The answer is ", "four."),  # " four" would reach across it
        ("The question is for", "ty-four."),
        ("", "four."),
        ("The answer", ""),
    ],
)
def test_prompt_has_the_tokens_it_has_alone(merging, prompt, completion):
    ids, mask = single(Completion(prompt, completion), merging)
    alone = ids_of(prompt, merging)
    assert ids[: len(alone)] == alone
    assert mask == [False] * len(alone) + [True] * (len(ids) - len(alone))
    assert merging.decode(ids) == prompt + completion + TrainedBPE.END


def test_tokens_over_the_seam_are_there_in_this_vocabulary(merging):
    # Else the test above would not test what it says.
    joined, alone = ids_of("The answer is four.", merging), ids_of("The answer is ", merging)
    assert joined[: len(alone)] != alone


def test_completion_is_cut_on_the_right(bytewise):
    tally = Tally()
    ((ids, mask),) = encode([Completion("abc", "defgh")], bytewise, 5, tally)
    assert bytewise.decode(ids) == "abcde"
    assert mask.tolist() == [False, False, False, True, True]
    assert (tally.truncated, tally.dropped) == (1, 0)


def test_completion_that_is_cut_off_whole_is_dropped(bytewise):
    tally = Tally()
    documents = [Completion("abcde", "f"), Completion("a", "b"), Completion("abcd", "e"), Completion("abc", "d")]
    samples = list(encode(documents, bytewise, 5, tally))
    assert [bytewise.decode(ids) for ids, _ in samples] == ["ab" + TrainedBPE.END, "abcde", "abcd" + TrainedBPE.END]
    assert (tally.dropped, tally.truncated) == (1, 1)


def test_sample_whose_only_learnt_token_is_the_first_is_dropped(bytewise):
    tokenizer = copy.deepcopy(bytewise)
    tokenizer.eos_token = None
    tally = Tally()
    assert list(encode([Completion("", "a"), Completion("a", "")], tokenizer, 8, tally)) == []
    assert tally.dropped == 2


def test_instruction_without_a_template_learns_the_output_alone(bytewise):
    ids, mask = single(Instruction("Add.", "1 2", "3"), bytewise)
    asked = "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert bytewise.decode(ids) == asked + "3" + TrainedBPE.END
    assert mask == [False] * len(asked) + [True, True]


# ---------------------------------------------------------------------- many documents


TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"


def test_order_is_kept_over_formats_and_batches(bytewise):
    tokenizer = copy.deepcopy(bytewise)
    tokenizer.chat_template = TEMPLATE
    kinds = [
        lambda text: Text(text),
        lambda text: Completion(text, ""),
        lambda text: Instruction(text, "", "x"),
        lambda text: Chat(({"role": "user", "content": text}, {"role": "assistant", "content": "x"})),
    ]
    documents = [kinds[i * i % 7 % 4](f"number {i}.") for i in range(700)]
    numbers = [tokenizer.decode(ids).split("number ")[1].split(".")[0] for ids, _ in encode(documents, tokenizer, 64)]
    assert numbers == [str(i) for i in range(700)]


def test_stream_is_encoded_as_it_comes(bytewise):
    taken = itertools.count()
    samples = encode((Text(f"{next(taken)} {i}") for i in itertools.count()), bytewise, 64)
    for i in range(5):
        assert bytewise.decode(next(samples)[0]).startswith(f"{i} {i}")
    assert next(taken) <= 256  # some are tokenised together
    samples = encode(("x" * 500_000 for _ in itertools.count()), bytewise, 64)
    next(samples)


def test_nothing_gives_nothing(bytewise):
    assert list(encode([], bytewise, 8)) == []
    assert len(TokenDataset.from_samples(encode([], bytewise, 8))) == 0


# ---------------------------------------------------------------------- the data set


def samples_of(*pairs):
    return [(torch.tensor(ids, dtype=torch.int32), torch.tensor(mask, dtype=torch.bool)) for ids, mask in pairs]


PAIRS = [([1, 2, 3], [1, 0, 1]), ([4, 5], [0, 1]), ([6, 7, 8, 9], [1, 1, 1, 1]), ([3, 2], [1, 0]), ([5], [1])]


def test_data_set_gives_the_samples_back():
    data = TokenDataset.from_samples(samples_of(*PAIRS))
    assert len(data) == len(PAIRS)
    for i, (ids, mask) in enumerate(PAIRS):
        assert data[i]["input_ids"].tolist() == ids
        assert data[i]["loss_mask"].tolist() == list(map(bool, mask))
    assert data[0]["input_ids"].dtype == torch.int32
    assert data[0]["loss_mask"].dtype == torch.bool


def test_data_set_counts_tokens_and_loss_without_the_first():
    data = TokenDataset.from_samples(samples_of(*PAIRS))
    assert [data.length(i) for i in range(len(data))] == [3, 2, 4, 2, 1]
    assert [data.loss_tokens(i) for i in range(len(data))] == [1, 1, 3, 0, 0]
    for method in (data.length, data.loss_tokens, data.__getitem__):
        with pytest.raises(IndexError):
            method(5)
        with pytest.raises(IndexError):
            method(-1)


def test_three_tensors_are_all_there_is():
    data = TokenDataset.from_samples(samples_of(*PAIRS), Tally(dropped=3, truncated=2, bad=1))
    assert (data.tally.dropped, data.tally.truncated, data.tally.bad) == (3, 2, 1)
    stored = {name: tensor.clone() for name, tensor in data.tensors.items()}
    again = TokenDataset.from_tensors(**stored)
    assert all(torch.equal(again.tensors[name], data.tensors[name]) for name in ("ids", "loss_mask", "ends"))
    assert [again.loss_tokens(i) for i in range(5)] == [data.loss_tokens(i) for i in range(5)]
    assert (again.tally.dropped, again.tally.truncated, again.tally.bad) == (0, 0, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"ids": torch.arange(11, dtype=torch.int32)},
        {"ids": torch.arange(12)},
        {"loss_mask": torch.ones(13, dtype=torch.bool)},
        {"loss_mask": torch.ones(12, dtype=torch.int32)},
        {"ends": torch.tensor([3, 5, 5, 11, 12])},
        {"ends": torch.tensor([3, 5, 4, 11, 12])},
        {"ends": torch.tensor([], dtype=torch.int64)},
        {"ends": torch.tensor([3.0, 12.0])},
    ],
)
def test_tensors_that_do_not_fit_are_refused(change):
    tensors = TokenDataset.from_samples(samples_of(*PAIRS)).tensors
    assert len(tensors["ids"]) == 12
    with pytest.raises(ValueError, match="expected int32 and bool of one length"):
        TokenDataset.from_tensors(**(tensors | change))


def test_plain_blocks_are_all_learnt():
    data = TokenDataset([[1, 2, 3], [4], [5, 6], []])
    assert data.loss_mask.tolist() == [True] * 5
    assert (data.tally.dropped, data.tally.truncated, data.tally.bad) == (2, 0, 0)
    assert [data.loss_tokens(i) for i in range(2)] == [2, 1]


# ---------------------------------------------------------------------- splits


PLACES = itertools.count(1)


def chat(text):
    # Each from a line of its own: the place tells no documents apart.
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": text})
    return Chat(turns, where=f"line {next(PLACES)}")


LENGTHS = [40 + 13 * i % 90 for i in range(60)]


@pytest.mark.parametrize("kind", [Text, lambda text: Completion(text[:10], text[10:]), chat])
def test_documents_of_any_format_are_split_whole_and_by_characters(kind):
    documents = [kind(f"{i:04}" + "x" * length) for i, length in enumerate(LENGTHS)]
    train, val = split_documents(documents, 0.2, seed=3)
    assert [document for document in documents if document in train] == train
    assert [document for document in documents if document in val] == val
    assert len(train) + len(val) == len(documents)
    share = sum(len(document.plain) for document in val) / sum(len(document.plain) for document in documents)
    assert share == pytest.approx(0.2, abs=0.03)


def test_split_of_plain_strings_is_that_of_texts():
    strings = [f"{i:04}" + "x" * length for i, length in enumerate(LENGTHS)]
    train, val = split_documents([Text(text) for text in strings], 0.2, seed=1)
    assert ([text.text for text in train], [text.text for text in val]) == split_documents(strings, 0.2, seed=1)


@pytest.mark.parametrize("kind", [str, Text, lambda text: Completion(text[:3], text[3:]), chat])
def test_copies_of_a_document_stay_on_one_side(kind):
    documents = [kind(f"document {i % 20} " + "x" * (i % 20)) for i in range(100)]
    for seed in range(20):
        train, val = split_documents(documents, 0.3, seed)
        assert len(train) + len(val) == 100
        assert val
        assert not [document for document in val if document in train]


def test_copies_count_with_all_their_characters():
    # Nine tenths are copies of one document: it cannot be the tenth that is held out.
    documents = ["x" * 100] * 90 + [f"{i:0100}" for i in range(10)]
    for seed in range(20):
        assert "x" * 100 not in split_documents(documents, 0.1, seed)[1]


def test_copies_of_a_single_text_give_its_end_once():
    assert split_documents(["abcdefghij"] * 3, 0.2, seed=0) == (["abcdefgh"] * 3, ["ij"])
    assert split_documents([Text("abcdefghij")], 0.2, seed=0) == ([Text("abcdefgh")], [Text("ij")])


def test_single_record_that_is_no_text_is_not_split():
    assert split_documents([chat("a")], 0.2, seed=0) == ([chat("a")], [])
