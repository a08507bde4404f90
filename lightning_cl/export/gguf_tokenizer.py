"""A byte-level BPE tokenizer in a GGUF file, as the model was trained with it.

llama.cpp knows the ways to cut a text into words by name. The name is found by what a tokenizer does: its words are
compared with those of each known way on thousands of short texts. A tokenizer that cuts in a way of its own is refused.
llama.cpp composes no characters (Unicode's NFC), as Qwen's tokenizer does: text that is not composed gets other tokens.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lightning_cl.data.text.tokenizer import load_tokenizer, start_tokens
from lightning_cl.export.gguf_types import gguf

_ENGLISH_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA_3 = _ENGLISH_ENDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN_2 = _LLAMA_3.replace("{1,3}", "")

# What texts are made of that tells one way from another: each kind of character that a rule names.
_PIECES = (
    *("a", "bc", "B", "Zebra", "é", "ß", "ñ", "щ", "世", "界", "あ", "한", "ا", "ก", "क", "ि", "\u0301", "ª", "ǅ"),
    *("1", "23", "4567", "٣", "½", "Ⅳ", "²", "९"),
    *(" ", " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\r", "\u00a0", "\u3000", "\u2028", "\x0b", "\x85"),
    *(".", ",", "!?", "'", "’", '"', "(", ")]", "{", "_", "-", "—", "/", "\\", "#", "$", "€", "+", "=", "^", "~", "|"),
    *("'s", "'S", "'t", "'ll", "'LL", "'re", "'Ve", "'d", "'m", "'x", "😀", "👩‍💻", "\u200b", "\x00", "\x7f", "�"),
)
HARD_TEXTS = (
    "",
    " ",
    "Hello world",
    "  leading, and trailing  ",
    "I'm sure they're here; we'll see, it's HE'LL and don't. 'tis ’s",
    "Numbers 1 12 123 1234 12345678 3.14159 1,000,000 0x7F ½ ٣٤ Ⅷ x² 2²³",
    "def f(x):\n    if x > 0:\n\t\treturn x**2  # square\n\n\n    return -x\r\n",
    "Ärger über naïve Straßenbahnen, señor — “quoted” … №5 €10",
    "東京で日本語を話します。한국어 텍스트 Привет мир שלום عالم ไทย हिन्दी",
    "😀👩‍👩‍👧🏳️‍🌈 emoji\u200b zero width\u00a0no-break\u3000wide",
    "a\n b\n  c\n\n   d\n\n\n\n     e \t f\t\tg \n \n",
    "https://example.org/path?q=1&r=%20#frag user@example.com C:\\dir\\file.txt",
    "~~~ !!! ??? --- ... ((())) [[]] {{}} <<>> $$ %% ^^ && ** __ == ++ || ``",
    "x" * 70 + " " * 40 + "\n" * 20 + "=" * 70,
)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as the file describes it.

    Attributes:
        tokens: their texts, by id.
        kinds: their types in llama.cpp, by id.
        merges: pairs of texts, the first merged first.
        pre: llama.cpp's name for how a text is cut into words.
        add_bos: a text begins with the start token.
        add_eos: a text ends with the end token.
        special: ids of ``bos``, ``eos``, ``eot``, ``unknown`` and ``padding``, where there are such.
        template: the chat template.
    """

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    pre: str
    add_bos: bool
    add_eos: bool
    special: dict[str, int]
    template: str | None


def live_tokenizer(folder: Path) -> Any:
    """Loads a folder's tokenizer, and compares it with its file.

    For some kinds of models ``AutoTokenizer`` takes a class of its own, which cuts texts in its own way, whatever the
    file says.

    Raises:
        ValueError: if there is no tokenizer, or its file does not say what it does.
    """
    from tokenizers import Tokenizer

    tokenizer = load_tokenizer(str(folder))
    file = folder / "tokenizer.json"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not file.is_file() or backend is None:
        return tokenizer
    written = Tokenizer.from_file(str(file))
    other = next((text for text in HARD_TEXTS if _ids(written, text) != _ids(backend, text)), None)
    if other is None:
        return tokenizer
    raise ValueError(
        f"{file.name}: AutoTokenizer loads {type(tokenizer).__name__}, which does not cut {other[:40]!r} as the file"
        " says; give the one that the model was trained with as `tokenizer`: AutoTokenizer.from_pretrained(folder), or"
        " PreTrainedTokenizerFast(tokenizer_file=…, eos_token=…, …)"
    )


def _ids(backend: Any, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)


def read_vocabulary(tokenizer: Any, size: int, ends: Sequence[int] = (), pre: str | None = None) -> Vocabulary:
    """Reads what the file must say from a tokenizer in memory.

    Args:
        tokenizer: of ``transformers``.
        size: rows of the model's embedding; ids without a token are marked as unused.
        ends: the model's end tokens (``eos_token_id`` of its ``generation_config.json``).
        pre: llama.cpp's name for the way to cut texts, where it is not found by itself.

    Raises:
        ValueError: for a tokenizer that llama.cpp would not follow, with the reason and what to do.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"tokenizer: {type(tokenizer).__name__} has no tokenizer.json; save it with a fast tokenizer")
    settings = json.loads(backend.to_str())
    _check_model(settings)
    _check_added(settings["added_tokens"])
    name = pre or pre_of(backend, settings)
    first = start_tokens(tokenizer)
    if len(first) > 1:
        raise ValueError(
            f"tokenizer: puts {tokenizer.convert_ids_to_tokens(first)} before a text, and llama.cpp only a start token;"
            " put the others into the chat template"
        )
    ids = tokenizer("a")["input_ids"][len(first) :]
    after = ids[len(tokenizer("a", add_special_tokens=False)["input_ids"]) :]
    if after not in ([], [tokenizer.eos_token_id]):
        raise ValueError(
            f"tokenizer: puts {tokenizer.convert_ids_to_tokens(after)} after a text, and llama.cpp only the end token;"
            " take it out of the tokenizer's post-processor"
        )
    tokens, kinds = _tokens(tokenizer, settings, size)
    special = {
        "bos": first[0] if first else tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
        "eot": next((i for i in ends if i != tokenizer.eos_token_id and tokens[i : i + 1] != ["<|eom_id|>"]), None),
    }
    if special["eos"] is None and ends:
        special["eos"] = ends[0]
    return Vocabulary(
        tokens,
        kinds,
        [merge if isinstance(merge, str) else " ".join(merge) for merge in settings["model"]["merges"]],
        name,
        bool(first),
        bool(after),
        {key: int(value) for key, value in special.items() if value is not None and 0 <= value < size},
        _template(tokenizer),
    )


def _check_model(settings: Mapping[str, Any]) -> None:
    """Refuses what is not byte-level BPE."""
    model = settings["model"]
    other = "; llama.cpp's own convert_hf_to_gguf.py writes them where tokenizer.model is in the folder"
    if model["type"] == "Unigram" or model.get("byte_fallback"):
        raise ValueError(f"tokenizer: SentencePiece tokenizers are not written here{other}")
    if model["type"] != "BPE":
        raise ValueError(f"tokenizer: a {model['type']} model; expected byte-level BPE, as TrainedBPE makes")
    odd = {
        name: model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    }  # transformers writes "" or null
    if any(odd.values()):
        raise ValueError(f"tokenizer: llama.cpp knows no {odd}; train a vocabulary without them, as TrainedBPE does")


def _check_added(added: Sequence[Mapping[str, Any]]) -> None:
    """Refuses added tokens that take the spaces next to them, or stand as words alone."""
    for token in added:
        odd = [name for name in ("lstrip", "rstrip", "single_word") if token[name]]
        if odd:
            raise ValueError(
                f"tokenizer: the token {token['content']!r} has {odd[0]}=True, which llama.cpp does not know; add it"
                f" again with AddedToken(…, {odd[0]}=False) and save the tokenizer"
            )


def _tokens(tokenizer: Any, settings: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Texts and types of all tokens."""
    kinds = gguf.TokenType
    texts = {i: text for text, i in tokenizer.get_vocab().items()}
    if max(texts) >= size:
        raise ValueError(
            f"tokenizer: has tokens up to id {max(texts)}, and the model's embedding {size} rows; give the model's own"
            " tokenizer, or resize the embedding (model.resize_token_embeddings) before saving"
        )
    tokens, types = [], []
    added = {token["id"]: token for token in settings["added_tokens"]}
    taken = set(texts.values())
    for i in range(size):
        if i not in texts:
            name = f"[PAD{i}]"
            while name in taken:  # llama.cpp ends the process where two tokens have the same text
                name = f"[{name}]"
            taken.add(name)
            tokens.append(name)
            types.append(int(kinds.UNUSED))
        else:
            tokens.append(texts[i])
            special = kinds.CONTROL if i in added and added[i]["special"] else kinds.USER_DEFINED
            types.append(int(special if i in added else kinds.NORMAL))
    return tokens, types


def _template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def pre_of(backend: Any, settings: Mapping[str, Any] | None = None) -> str:
    """Finds llama.cpp's name for the way in which a tokenizer cuts texts into words.

    Args:
        backend: the tokenizer of the package ``tokenizers``.
        settings: its content, if it was read already.

    Raises:
        ValueError: if it cuts as none of the known ways does, or changes the text before.
    """
    settings = settings or json.loads(backend.to_str())
    if backend.normalizer is not None:
        for text in _probes():
            if backend.normalizer.normalize_str(text) != text:
                raise ValueError(
                    f"tokenizer: changes {text!r} into {backend.normalizer.normalize_str(text)!r} before it cuts it,"
                    " which llama.cpp does not; train a vocabulary without a normalizer, as TrainedBPE does"
                )
    words = None if backend.pre_tokenizer is None else _words(backend.pre_tokenizer)
    fitting = [name for name in _WAYS if _words_of(name) == words]
    whole_words = bool(settings["model"].get("ignore_merges"))
    for name in fitting:
        if whole_words == (name == "llama-bpe"):
            return name
    if fitting and not _merges_matter(settings):
        return fitting[0]
    reason = (
        f"it cuts as {fitting[0]!r} does, but takes whole words from the vocabulary"
        f" {'before' if whole_words else 'only after'} merging"
        if fitting
        else f"it cuts texts in none of the ways {list(_WAYS)}"
    )
    raise ValueError(
        f"tokenizer: {reason}; if llama.cpp knows its way under another name, give that name as `pre`"
        " (tokenizer.ggml.pre in llama.cpp's list)"
    )


_WAYS = ("gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe")  # the last two differ in what follows the cutting


def _words(way: Any) -> list[Any]:
    return [way.pre_tokenize_str(text) for text in _probes()]


@cache
def _words_of(name: str) -> list[Any]:
    """The words that a known way cuts the probes into, by llama.cpp's name for it."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if name == "smaug-bpe":
        return _words_of("llama-bpe")
    if name == "gpt-2":
        return _words(ByteLevel(add_prefix_space=False))
    if name == "smollm":
        return _words(Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]))
    pattern = Regex(_QWEN_2 if name == "qwen2" else _LLAMA_3)
    return _words(Sequence([Split(pattern, "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]))


@cache
def _probes() -> list[str]:
    """Short texts of pieces in random order, composed (NFC)."""
    draw = random.Random(0)
    made = ["".join(draw.choices(_PIECES, k=draw.randint(2, 9))) for _ in range(1500)]
    runs = [piece * n for piece in ("1", " ", "\n", "a", "!", "\t") for n in (4, 7, 40, 600)]
    return [unicodedata.normalize("NFC", text) for text in (*HARD_TEXTS, *made, *runs)]


def _merges_matter(settings: Mapping[str, Any]) -> bool:
    """True if a word of the vocabulary is not what its letters are merged to."""
    from tokenizers import models

    model = settings["model"]
    merges: Any = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    merging = models.BPE(model["vocab"], merges, ignore_merges=False)
    added = {token["content"] for token in settings["added_tokens"]}
    return not all(len(merging.tokenize(word)) == 1 for word in model["vocab"] if word not in added)


def write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Adds a tokenizer to a file.

    Args:
        writer: ``gguf.GGUFWriter``.
        vocabulary: the tokenizer.
    """
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    names = {"bos": "bos", "eos": "eos", "eot": "eot", "unknown": "unk", "padding": "pad"}
    for kind, i in vocabulary.special.items():
        getattr(writer, f"add_{names[kind]}_token_id")(i)
    # Both are always written: without them llama.cpp takes what it knows of other models.
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(False)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)


def hard_texts(tokenizer: Any) -> list[str]:
    """Returns texts that tokenizers differ on: :data:`HARD_TEXTS`, the tokenizer's special tokens, and random ones."""
    special = sorted(set(tokenizer.get_added_vocab()))[:40]
    return [
        *HARD_TEXTS[1:],
        *(f"a{token}b {token} c\n{token}" for token in special),
        *_probes()[len(HARD_TEXTS) :][:60],
    ]
