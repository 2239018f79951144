"""Meta's layout of a Llama, used by Meta's own downloads, Mistral's, and torchtune's checkpoints.

Names differ from Hugging Face's, and so does the order of rows in Q and K: Meta's RoPE rotates neighbours (0,
1), (2, 3), ... of a head, Hugging Face's rotates halves (0, D/2), (1, D/2 + 1), .... The config is
`params.json`, with the keys of `ModelArgs` in https://github.com/meta-llama/llama-models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Required, TypeVar

from pydantic import Field
from typing_extensions import TypedDict

from smolctl.config import ModelConfig
from smolctl.config.model import MAX_CONTEXT
from smolctl.outside import checked
from smolctl.sources.base import Weights
from smolctl.sources.shapes import HEAD, TABLE

if TYPE_CHECKING:
    import torch

    from smolctl.sources.arrays import Array
    from smolctl.sources.quantized.scaled import StoredTensor

    T = TypeVar("T", Array, torch.Tensor)

NAME = re.compile(r"(?:layers\.(?P<layer>\d+)\.)?(?P<part>[\w.]+?)\.(?:weight|scale|(?P<bias>bias))")
PARTS = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
# Parts of a layer under Meta's names, then under torchtune's.
LAYER_PARTS = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "sa_norm": "input_layernorm",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
ANCHORS = ("layers.0.attention.wq.weight", "layers.0.attn.output_proj.weight")
# Keys of params.json that are read, and keys that configure Meta's program without affecting its results.
READ = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "multiple_of"),
    *("ffn_dim_multiplier", "norm_eps", "rope_theta", "use_scaled_rope", "rope_scaling_factor"),
    *("high_freq_factor", "tied_embeddings", "max_seq_len", "max_position_embeddings", "sliding_window"),
)
NO_EFFECT = ("max_batch_size", "model_parallel_size", "use_biases")
CONTEXT, THETA = 2_048, 10_000.0  # `max_seq_len` and the base of RoPE, which old files omit

Size = Annotated[int, Field(strict=True, gt=0, le=MAX_CONTEXT)]
Factor = Annotated[float, Field(strict=True, gt=0, le=1e12)]
Flag = Annotated[bool, Field(strict=True)]


class _Params(TypedDict, total=False):
    """The values that a params.json may have; a null key counts as missing."""

    dim: Required[Size]
    n_layers: Required[Size]
    n_heads: Required[Size]
    n_kv_heads: Size
    head_dim: Size
    hidden_dim: Size
    multiple_of: Size
    ffn_dim_multiplier: Factor
    norm_eps: Factor
    rope_theta: Factor
    rope_scaling_factor: Factor
    high_freq_factor: Factor
    max_seq_len: Size
    max_position_embeddings: Size
    use_scaled_rope: Flag
    tied_embeddings: Flag


def is_meta(names: Iterable[str]) -> bool:
    """Whether tensors have Meta's or torchtune's names."""
    return bool(set(ANCHORS) & set(names))


def huggingface_name(name: str) -> str:
    """`layers.0.attention.wq.weight` -> `model.layers.0.self_attn.q_proj.weight`; others unchanged."""
    found = NAME.fullmatch(name)
    part = (LAYER_PARTS if found["layer"] else PARTS).get(found["part"]) if found else None
    if found is None or part is None:
        return name
    layer = f"model.layers.{found['layer']}." if found["layer"] else ""
    return f"{layer}{part}.{found['bias'] or 'weight'}"


def is_params(values: Mapping[str, Any]) -> bool:
    """Whether the content of a JSON file is a params.json; a config.json may have keys of the same names."""
    return {"dim", "n_layers"} <= values.keys() and not {"model_type", "architectures"} & values.keys()


def from_params(
    content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], origin: str
) -> tuple[dict[str, Any], tuple[str, ...], str]:
    """Convert a params.json to the keys of a config.json.

    Args:
        content: of the file.
        shapes: of the tensors next to it by their Hugging Face names, or empty. Llama 2's files do not
            contain the size of the vocabulary, and no file says whether the head is tied.
        origin: name of the file in an error.

    Returns:
        The config.json, its assumed values, and the key for an unsupported network ("": none).

    Raises:
        InputError: a value has the wrong type or is not valid.
    """
    values = {key: value for key, value in content.items() if value is not None}
    checked(_Params, values, origin)
    others = [key for key, value in values.items() if key not in READ + NO_EFFECT and value is not False]
    theta, scaled = values.get("rope_theta", THETA), values.get("use_scaled_rope")
    given = values.get("max_position_embeddings", values.get("max_seq_len"))
    size, table = values.get("vocab_size"), shapes.get(TABLE)
    kind = "mistral" if values.get("sliding_window") else "llama"
    found = {
        "model_type": None if others else kind,
        "vocab_size": table[0] if size in (None, -1) and table else size,
        "hidden_size": values["dim"],
        "intermediate_size": values["hidden_dim"] if "hidden_dim" in values else _intermediate_size(values),
        "num_hidden_layers": values["n_layers"],
        "num_attention_heads": values["n_heads"],
        "num_key_value_heads": values.get("n_kv_heads"),
        "head_dim": values.get("head_dim"),
        "rms_norm_eps": values.get("norm_eps", 1e-5),
        "rope_theta": theta,
        "max_position_embeddings": CONTEXT if given is None else given,
        "sliding_window": values.get("sliding_window"),
        "tie_word_embeddings": bool(values.get("tied_embeddings"))
        or (TABLE in shapes and HEAD not in shapes),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if scaled:
        found["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": values.get("rope_scaling_factor", 8.0),
            "low_freq_factor": 1.0,
            "high_freq_factor": values.get("high_freq_factor", 4.0),
            "original_max_position_embeddings": 8_192,
        }
    assumed = (
        () if given is not None else (f"a context of {CONTEXT:,} is assumed: params.json does not state it",)
    )
    reason = f"params.json with {', '.join(others)} is not supported, only Llama's" if others else ""
    return found, assumed, reason


def _intermediate_size(values: Mapping[str, Any]) -> Any:
    """Two thirds of four times the width, times a factor, rounded up (`FeedForward` in Meta's model.py)."""
    multiple, factor = values.get("multiple_of", 256), values.get("ffn_dim_multiplier", 1)
    size = int(factor * int(2 * 4 * values["dim"] / 3))
    return -(-size // multiple) * multiple


def halves(matrix: T, heads: int) -> T:
    """Rows of Q or K, (heads × D, width), reordered from neighbours to halves; unchanged if they do not
    divide.
    """
    rows, width = matrix.shape
    if rows % (2 * heads):
        return matrix
    pairs = matrix.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


class MetaWeights(Weights):
    """Tensors of Meta's layout under their Hugging Face names, with Q and K in Hugging Face's order.

    Args:
        weights: under their Hugging Face names.
        config: of the network. torchtune rotates Qwen's heads like Hugging Face.
    """

    def __init__(self, weights: Weights, config: ModelConfig) -> None:
        self.weights = weights
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        self.heads = heads if config.model_type == "llama" else {}

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        return ((name, self._reordered(name, item)) for name, item in self.weights.stored())

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, self._reordered(name, item)) for name, item in self.weights.tensors())

    def _reordered(self, name: str, item: Any) -> Any:
        heads = self.heads.get(name.removesuffix(".weight").rpartition(".")[2])
        return item if heads is None else halves(item, heads)
