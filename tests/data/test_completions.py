"""Where prompt and completion meet, with tokenizers that put a space in front of every text."""

from __future__ import annotations

import pytest
from sentencepiece_like import KINDS, sentencepiece_like

from lightning_cl.data.text.completions import encode_completions
from lightning_cl.data.text.formats import Completion

WORDS = "Question x Answer b Verwendung Verwen dung Kommando"
PAIRS = [
    ("Question: x\nAnswer: ", "b"),
    ("Verwen", "dung"),
    ("Verwen", "dung: Kommando b"),
    ("Question:\n\n", "Kommando"),
    ("x ", " b"),
    ("x  ", "  \n\nb"),
    ("x", " Kommando"),
    ("x\n", "\nb"),
    ("", "Kommando"),
    ("x: ", "日本語 b"),
    ("Answer:", ""),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_nothing_stands_between_prompt_and_completion(kind, prompt, completion):
    tokenizer = sentencepiece_like(kind, WORDS)
    (tokens,) = encode_completions([Completion(prompt, completion)], tokenizer)
    alone = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    assert tokenizer.decode(tokens.ids, skip_special_tokens=True) == prompt + completion
    assert tokens.ids[: len(alone)].tolist() == alone
    assert tokens.mask.tolist() == [False] * len(alone) + [True] * (len(tokens.ids) - len(alone))
    assert tokens.ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_these_tokenizers_do_put_a_space_in_front(kind):
    # Else the test above would not test what it says.
    tokenizer = sentencepiece_like(kind, WORDS)
    assert tokenizer.convert_ids_to_tokens(tokenizer("dung", add_special_tokens=False)["input_ids"]) == ["▁dung"]


def test_vocabulary_that_knows_insides_of_words_only_behind_a_beginning():
    """As BERT's. The words are those of the joined text then, and the one across the seam is learnt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["?", "ver", "##wen", "##wendung", "dung", "a", "[E]"])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="?"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", eos_token="[E]")
    (tokens,) = encode_completions([Completion("a verwen", "dung")], tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens.ids) == ["a", "ver", "##wendung", "[E]"]
    assert tokens.mask.tolist() == [False, False, True, True]
