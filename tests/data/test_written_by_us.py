"""A tokenizer that we wrote is the same when it is loaded again, whatever model lies next to it."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from lightning_cl.data.text.tokenizer import load_tokenizer

TEXTS = ["Numbers 1 12 123 1234", "I'm sure they're HE'LL", "a\n\n  b\r\n\tc", "naïve — “quoted” 東京"]


@pytest.fixture(scope="module")
def written():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS * 9, trainers.BpeTrainer(vocab_size=330, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", chat_template="{{ messages }}")


@pytest.mark.parametrize("model", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_class_of_a_model_family_does_not_cut_otherwise(tmp_path, written, model):
    AutoConfig.for_model(model).save_pretrained(tmp_path)
    written.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert [again(text)["input_ids"] for text in TEXTS] == [written(text)["input_ids"] for text in TEXTS]
    assert (again.eos_token, again.chat_template) == (written.eos_token, written.chat_template)


def test_a_folder_that_another_class_wrote_is_read_by_it(tmp_path, written):
    AutoConfig.for_model("qwen2").save_pretrained(tmp_path)
    written.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "Qwen2Tokenizer"}))
    assert type(load_tokenizer(str(tmp_path))).__name__ == "Qwen2Tokenizer"
