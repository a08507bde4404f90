"""Texts: read from where people have them, split, tokenised into blocks, joined to batches."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from starting import puts_in_front

from lightning_cl.data.text.records import is_text_source, read_texts
from lightning_cl.data.text.tokenizer import TrainedBPE
from lightning_cl.data.text.tokens import TokenCollator, TokenDataset, encode, split_documents, tokenize

UNICODE = [
    "Größe 10 µm\r\n\tfoo( x ) , bar .",
    "日本語 🐍🏽‍🔬 \u200b\ufeff",
    "\x00\x01 don't  do   that !",
    "é e\u0301",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """257 tokens: each byte is one, so that lengths are known."""
    return TrainedBPE(257, cache_dir=str(tmp_path_factory.mktemp("vocabularies"))).train(["any text"])


# ---------------------------------------------------------------------- reading


def test_txt_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt", "a", "train") == ["one\n\ntwo\n"]


def test_jsonl_has_a_document_per_line(tmp_path):
    # U+2028 breaks lines for str.splitlines, and is legal inside JSON strings.
    texts = ["one", "tw\u2028o", "thr\nee", "größe"]
    lines = "\n\n".join(json.dumps({"text": text, "more": 1}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_text(lines + "\n", encoding="utf-8")
    assert read_texts(str(tmp_path / "a.jsonl"), "a", "train") == texts


def test_jsonl_with_windows_line_ends(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\r\n{"text": "two"}\r\n')
    assert read_texts(tmp_path / "a.jsonl", "a", "train") == ["one", "two"]


def test_json_is_a_list_of_records(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text": "two"}]')
    assert read_texts(tmp_path / "a.json", "a", "train") == ["one", "two"]


def test_list_of_texts_and_records():
    assert read_texts(["one", {"text": "two"}], "a", "train") == ["one", "two"]


def test_datasets_dataset_with_a_text_column():
    source = datasets.Dataset.from_dict({"text": ["one", "two"], "id": [1, 2]})
    assert is_text_source(source)
    assert read_texts(source, "a", "train") == ["one", "two"]


@pytest.mark.parametrize("name", ["prose", "python", "cpp"])
def test_samples_are_on_every_machine(name):
    texts = read_texts(f"sample:{name}", "a", "train")
    assert len(texts) > 10
    assert sum(map(len, texts)) > 300_000


GOOD = '{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", GOOD * 2 + '{"text": "broken\n', ["line 3", "JSON"]),
        ("a.jsonl", GOOD + "\n" + '{"txt": "other key"}\n', ["line 3", "txt", "text"]),
        ("a.jsonl", GOOD + '{"text": 5}\n', ["line 2", "string"]),
        ("a.jsonl", GOOD + "[1, 2]\n", ["line 2", "list"]),
        ("a.json", '{"text": "no list"}', ["list", "dict"]),
        ("a.json", '[{"text": "fine"}, {"text": null}]', ["record 1"]),
        ("a.json", '[{"text": "fine"},]', ["JSON"]),
        ("a.txt", b"fine \xff not", ["UTF-8", "byte 5"]),
        ("a.jsonl", b'{"text": "fine \xff"}', ["UTF-8"]),
        ("a.txt", "", ["empty"]),
        ("a.txt", "  \n ", ["no text"]),
        ("a.jsonl", '{"text": ""}\n', ["no text"]),
        ("a.pdf", "text", [".txt", ".jsonl", ".json"]),
    ],
)
def test_malformed_file_is_named_with_the_place(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="task 'chat'") as error:
        read_texts(path, "chat", "val")
    assert all(word in str(error.value) for word in [str(path), "val", *words])


def test_missing_file_is_named_with_where_it_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"task 'chat', train=.*nowhere\.txt"):
        read_texts(tmp_path / "nowhere.txt", "chat", "train")


def test_folder_says_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match=r"folder.*\.jsonl"):
        read_texts(tmp_path, "chat", "train")


def test_unknown_sample_says_which_there_are():
    with pytest.raises(ValueError, match="sample:prose"):
        read_texts("sample:poems", "chat", "train")


@pytest.mark.parametrize("source", [["fine", {"txt": 1}], [{"text": None}, {"text": None}]])
def test_malformed_item_of_a_list_is_named_by_number(source):
    with pytest.raises(ValueError, match=r"task 'chat', train, item [01]"):
        read_texts(source, "chat", "train")


def test_missing_text_in_a_dataset_is_named_by_row():
    with pytest.raises(ValueError, match="row 1"):
        read_texts(datasets.Dataset.from_dict({"text": ["fine", None]}), "chat", "train")


# ---------------------------------------------------------------------- splitting

DOCUMENTS = [f"document {i} " + "x" * (40 + 13 * i % 90) for i in range(120)]


def test_split_is_the_same_in_every_run():
    torch.manual_seed(1)
    first = split_documents(DOCUMENTS, 0.1, seed=4)
    torch.manual_seed(2)
    assert split_documents(DOCUMENTS, 0.1, seed=4) == first


def test_split_depends_on_the_seed():
    assert split_documents(DOCUMENTS, 0.1, seed=4) != split_documents(DOCUMENTS, 0.1, seed=5)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.9])
def test_split_is_disjoint_and_complete_and_of_whole_documents(fraction):
    train, val = split_documents(DOCUMENTS, fraction, seed=0)
    assert sorted(train + val) == sorted(DOCUMENTS)


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_split_holds_out_about_the_fraction_of_the_characters(fraction):
    total, longest = sum(map(len, DOCUMENTS)), max(map(len, DOCUMENTS))
    for seed in range(20):
        _, val = split_documents(DOCUMENTS, fraction, seed)
        assert abs(sum(map(len, val)) - fraction * total) <= longest


def test_one_huge_document_is_not_held_out():
    # It would take half of the training data away, in one run out of a hundred, by chance.
    documents = ["x" * 100_000] + [f"{i:4}" * 250 for i in range(100)]
    shares = [sum(map(len, split_documents(documents, 0.05, seed)[1])) / 200_000 for seed in range(300)]
    assert max(shares) < 0.1


def test_two_documents_give_one_to_each_side():
    for seed in range(5):
        train, val = split_documents(["a" * 10, "b" * 10], 0.05, seed)
        assert len(train) == len(val) == 1


def test_single_document_gives_its_end():
    text = "".join(map(str, range(1000)))
    train, val = split_documents([text], 0.1, seed=0)
    assert train[0] + val[0] == text
    assert len(val[0]) / len(text) == pytest.approx(0.1, abs=0.001)


# ---------------------------------------------------------------------- blocks


@pytest.mark.parametrize("max_length", [2, 7, 64])
def test_blocks_have_at_most_max_length_tokens(tokenizer, max_length):
    assert max(map(len, tokenize(DOCUMENTS, tokenizer, max_length))) == max_length


@pytest.mark.parametrize("text", [*UNICODE, "short", "x" * 64, "y" * 63, "z" * 200])
def test_no_token_is_lost(tokenizer, text):
    blocks = tokenize([text], tokenizer, 16)
    ids = [token for block in blocks for token in block]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == text
    # Full ones, but for a token at the end, which is not left alone.
    assert [len(block) for block in blocks[:-2]] == [16] * (len(blocks) - 2)
    assert all(len(block) in (15, 16) for block in blocks[:-1])
    assert len(blocks[-1]) > 1


@pytest.mark.parametrize(("length", "sizes"), [(8, [7, 2]), (3, [3, 3, 2]), (2, [2, 2, 2, 2, 2]), (9, [9])])
def test_the_last_token_is_predicted(tokenizer, length, sizes):
    """Eight letters and the end token, cut where one token would be left over."""
    blocks = tokenize(["abcdefgh"[: 7 if length == 3 else 8]], tokenizer, length)
    assert [len(block) for block in blocks] == sizes
    assert blocks[-1][-1] == tokenizer.eos_token_id
    (sample,) = list(encode(["abcdefgh"], tokenizer, 8))[1:]
    assert tokenizer.decode(sample[0]) == "h" + TrainedBPE.END


def test_no_block_crosses_documents(tokenizer):
    blocks = tokenize(["a" * n for n in range(1, 30)] + ["b" * 5] * 3, tokenizer, 8)
    for block in blocks:
        assert tokenizer.eos_token_id not in block[:-1]
        assert len(set(block) - {tokenizer.eos_token_id}) <= 1


def with_special(tokenizer, **tokens):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    if "bos_token" in tokens:
        puts_in_front(tokenizer, tokens["bos_token"])
    return tokenizer


def test_document_starts_with_one_start_token(tokenizer):
    with_bos = with_special(tokenizer, bos_token="A")  # any token of the vocabulary
    blocks = tokenize(["x" * 20, "y"], with_bos, 8)
    firsts = [block[0] == with_bos.bos_token_id for block in blocks]
    assert firsts == [True, False, False, True]
    assert sum(token == with_bos.bos_token_id for block in blocks for token in block) == 2


def test_end_token_under_the_name_of_a_start_token_is_not_put_in_front(tokenizer):
    same = with_special(tokenizer)
    same.bos_token = TrainedBPE.END
    assert tokenize(["xyz"], same, 8) == tokenize(["xyz"], tokenizer, 8)


def test_a_start_token_that_the_tokenizer_does_not_put_in_front_is_not_there(tokenizer):
    import copy

    named = copy.deepcopy(tokenizer)
    named.bos_token = "A"  # as SmolLM2, whose plain text has none
    assert tokenize(["xyz"], named, 8) == tokenize(["xyz"], tokenizer, 8)


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("xyz", [0, 1]),
        ("Axyz", [1]),  # begins with the start token
        ("Axyz<|endoftext|>", []),
        ("Axyz<|endoftext|>\n", []),  # templates write a line feed behind it
        ("xyz<|endoftext|> and more", [0, 1]),
    ],
)
def test_start_and_end_are_not_there_twice(tokenizer, text, more):
    with_bos = with_special(tokenizer, bos_token="A")
    own = with_bos(text, add_special_tokens=False)["input_ids"]
    (block,) = tokenize([text], with_bos, 99)
    assert block == ([with_bos.bos_token_id] if 0 in more else []) + own + (
        [with_bos.eos_token_id] if 1 in more else []
    )


def test_blocks_without_anything_to_predict_are_dropped_and_counted():
    data = TokenDataset([[1, 2, 3], [4], [5, 6], []])
    assert (len(data), data.tally.dropped) == (2, 2)
    assert [sample["input_ids"].tolist() for sample in data] == [[1, 2, 3], [5, 6]]


def test_data_set_says_how_many_tokens_bear_loss():
    data = TokenDataset([[1, 2, 3], [5, 6]])
    assert [data.loss_tokens(i) for i in range(2)] == [2, 1]


@pytest.mark.parametrize("index", [-1, 2])
def test_index_out_of_range_is_an_error(index):
    with pytest.raises(IndexError):
        TokenDataset([[1, 2, 3], [5, 6]])[index]


# ---------------------------------------------------------------------- batches


def sample(ids, mask=None):
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int32),
        "loss_mask": torch.tensor(mask if mask is not None else [1] * len(ids), dtype=torch.bool),
    }


def test_batch_is_padded_on_the_right_without_loss_and_attention():
    batch = TokenCollator(9)([sample([1, 2, 3]), sample([4])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]


def test_tokens_equal_to_the_padding_keep_their_loss():
    # Many models pad with their end token: ids != pad would teach them never to stop.
    batch = TokenCollator(0)([sample([0, 5, 0]), sample([0])])
    assert batch["labels"].tolist() == [[0, 5, 0], [0, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_labels_come_from_the_loss_mask():
    batch = TokenCollator(0)([sample([1, 2, 3, 4], [0, 0, 1, 1])])
    assert batch["labels"].tolist() == [[-100, -100, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1]]


def test_batch_is_in_the_types_of_hugging_face():
    assert {value.dtype for value in TokenCollator(0)([sample([1, 2])]).values()} == {torch.int64}
