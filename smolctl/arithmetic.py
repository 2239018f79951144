"""Parameters, FLOPs and memory of a model, as exact integers with their formulas.

Everything here is a function of a config and a few sizes. Nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

from smolctl.config.model import ModelConfig
from smolctl.config.run import RunConfig

BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2}

# Training data types (weights and optimizer, activations). "bf16-mixed" is Lightning's name for float32
# weights with matmuls in bfloat16.
TRAINING_DTYPES = {
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "float16": ("float16", "float16"),
    "bf16-mixed": ("float32", "bfloat16"),
    "16-mixed": ("float32", "float16"),
}
# Lightning's names for a run's precision. "auto" is float32 until it is chosen for a device.
DTYPE_OF_PRECISION = {
    "auto": "float32",
    "32-true": "float32",
    "bf16-mixed": "bf16-mixed",
    "bf16-true": "bfloat16",
    "16-mixed": "16-mixed",
}

# Rows of logits that exist at the same time in the loss: 256 × 49,152 in float32 are 48 MiB. Larger chunks
# are not faster (the matmul is as wide as the vocabulary), smaller ones lose some speed.
LOSS_CHUNK_ROWS = 256
# On a GPU, such chunks take less time than launching their kernels, and each adds to a gradient as large as
# the head: 4,096 rows take 805 MB twice. This is an estimate, not yet measured.
GPU_LOSS_CHUNK_ROWS = 4_096

# Modules that `non_embedding` excludes.
EMBEDDINGS = ("model.embed_tokens", "model.embed_positions", "lm_head")


@dataclass(frozen=True)
class ParameterRow:
    """One weight matrix or vector of the network."""

    module: str  # the tensor's name without ".weight"; a bias keeps its suffix
    shape: tuple[int, ...]
    formula: str  # the shape with the config's names
    parameters: int
    tied: bool = False  # shares its storage with another row and adds nothing to `unique`

    @property
    def tensor(self) -> str:
        """The tensor's Hugging Face name."""
        return self.module if self.module.endswith(".bias") else f"{self.module}.weight"


@dataclass(frozen=True)
class ParameterCount:
    """The three totals that are called "the number of parameters"."""

    unique: int  # every stored number once
    naive: int  # a tied lm_head counted again
    non_embedding: int  # without token table, learned positions and head
    rows: tuple[ParameterRow, ...]


def parameter_rows(config: ModelConfig) -> tuple[ParameterRow, ...]:
    """Every parameter tensor of the network, in the order of the forward pass."""
    hidden, ffn, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim

    def matrix(module: str, rows: int, columns: int, formula: str, tied: bool = False) -> ParameterRow:
        return ParameterRow(module, (rows, columns), formula, rows * columns, tied)

    def vector(module: str, size: int, formula: str) -> ParameterRow:
        return ParameterRow(module, (size,), formula, size)

    def norm(module: str) -> ParameterRow:
        return vector(module, hidden, "hidden_size")

    def biases(attention: str) -> list[ParameterRow]:
        sizes = {"q": (queries, heads), "k": (keys, kv_heads), "v": (keys, kv_heads)}
        return [vector(f"{attention}.{name}_proj.bias", *size) for name, size in sizes.items()]

    def head_norms(attention: str) -> list[ParameterRow]:
        return [vector(f"{attention}.{name}_norm", config.head_dim, "head_dim") for name in "qk"]

    rows = [matrix("model.embed_tokens", vocab, hidden, "vocab_size × hidden_size")]
    if config.position_embedding == "learned":
        positions = config.max_position_embeddings
        rows.append(
            matrix("model.embed_positions", positions, hidden, "max_position_embeddings × hidden_size")
        )
    heads = "num_attention_heads × head_dim"
    kv_heads = "num_key_value_heads × head_dim"
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        rows += [
            norm(f"{layer}.input_layernorm"),
            matrix(f"{layer}.self_attn.q_proj", queries, hidden, f"{heads} × hidden_size"),
            matrix(f"{layer}.self_attn.k_proj", keys, hidden, f"{kv_heads} × hidden_size"),
            matrix(f"{layer}.self_attn.v_proj", keys, hidden, f"{kv_heads} × hidden_size"),
            *(biases(f"{layer}.self_attn") if config.qkv_bias else ()),
            *(head_norms(f"{layer}.self_attn") if config.use_qk_norm else ()),
            matrix(f"{layer}.self_attn.o_proj", hidden, queries, f"hidden_size × {heads}"),
            norm(f"{layer}.post_attention_layernorm"),
            matrix(f"{layer}.mlp.gate_proj", ffn, hidden, "intermediate_size × hidden_size"),
            matrix(f"{layer}.mlp.up_proj", ffn, hidden, "intermediate_size × hidden_size"),
            matrix(f"{layer}.mlp.down_proj", hidden, ffn, "hidden_size × intermediate_size"),
        ]
    rows.append(norm("model.norm"))
    rows.append(matrix("lm_head", vocab, hidden, "vocab_size × hidden_size", config.tie_word_embeddings))
    return tuple(rows)


def tensor_rows(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[ParameterRow, ...]:
    """Rows for named shapes of any architecture; their formulas can only repeat the shapes."""
    return tuple(
        ParameterRow(
            name.removesuffix(".weight"), shape, " × ".join(f"{size:,}" for size in shape) or "1", prod(shape)
        )
        for name, shape in tensors
    )


def count_rows(rows: tuple[ParameterRow, ...]) -> ParameterCount:
    """The three totals of the rows of this network."""
    return ParameterCount(
        unique=sum(row.parameters for row in rows if not row.tied),
        naive=sum(row.parameters for row in rows),
        non_embedding=sum(row.parameters for row in rows if row.module not in EMBEDDINGS),
        rows=rows,
    )


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count the network that a config describes."""
    return count_rows(parameter_rows(config))


def layer_matrices(config: ModelConfig) -> int:
    """Parameters of the layers' matrices: all but embeddings, head, norms and biases."""
    rows = parameter_rows(config)
    return count_rows(tuple(row for row in rows if len(row.shape) == 2)).non_embedding


def forward_flops_per_token(config: ModelConfig, context: int) -> int:
    """Floating-point operations of the forward pass for one token, two per multiply-add.

    The head's matmul is counted also when its weights are tied: it is computed all the same.
    Attention is counted causally, over half of `context` on average. Norms, biases, RoPE and the
    softmax are left out (below 1 %).
    """
    matrices = layer_matrices(config) + config.vocab_size * config.hidden_size
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * context // 2
    return 2 * (matrices + attention)


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Forward plus backward pass: the backward pass costs as much as two forward passes."""
    return 3 * forward_flops_per_token(config, sequence_length)


def kv_cache_bytes_per_token(config: ModelConfig, dtype: str = "float32") -> int:
    """Keys and values of one position over all layers; with "int8", each head's float32 scales too."""
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    return heads * (config.head_dim + 4 if dtype == "int8" else config.head_dim * BYTES_PER_VALUE[dtype])


@dataclass(frozen=True)
class TrainingMemory:
    """The peak memory of a training step, in bytes."""

    weights: int
    gradients: int  # on a GPU, a tied table has two: from the lookup and from the head, before they are added
    optimizer: int  # AdamW's two moments, or Muon's one for the matrices of the layers
    activations: int  # saved by the forward pass for the backward pass
    logits: int  # the chunk of logits and its gradient that exist at the same time in the loss
    formulas: Mapping[str, str] = field(compare=False)  # of each number, with the values inserted

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def activation_values_per_token(
    config: ModelConfig, checkpointed: bool = False, recomputed: bool = False
) -> int:
    """Numbers per token that autograd saves between the forward and the backward pass.

    A layer saves, for each of its two norms, the input and 1/rms (2 hidden + 2); the queries and the
    attention's output (2 queries), keys and values (2 keys), the attention's log-sum-exp (heads); and the
    SwiGLU's gate and up (2 FFN). Norms of queries and keys save their inputs and one 1/rms per head. After
    the layers come the final norm's input, output and 1/rms, and the gradient of the last hidden state, which
    the chunked loss computes in the forward pass.

    On a Zen 5, `model/attention.py` saves no queries, keys and values either, which is not counted here.

    Args:
        config: the network.
        checkpointed: whether a layer saves only its input, except the layer whose gradients are being
            computed.
        recomputed: whether gate and up are computed again instead (`functional.recomputes_swiglu`).
    """
    hidden = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    heads = config.num_attention_heads
    layer = 2 * hidden + 2 * queries + 2 * keys + heads + 2
    if not recomputed:
        layer += 2 * config.intermediate_size
    if config.use_qk_norm:
        layer += queries + keys + heads + config.num_key_value_heads
    layers = config.num_hidden_layers * hidden + layer if checkpointed else config.num_hidden_layers * layer
    return layers + 3 * hidden + 1


def run_memory(
    run: RunConfig,
    sequences: int | None = None,
    sequence_length: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    recomputed: bool = False,
) -> TrainingMemory:
    """The peak memory of a training step, without the framework's own memory.

    Every argument except the run overrides its config.

    Args:
        run: the model, the batch, the precision, the optimizer, and whether activations are saved.
        sequences: in memory at the same time on one device.
        sequence_length: tokens per sequence.
        dtype: a key of `TRAINING_DTYPES`.
        device: "cpu" or "cuda", if "auto" has been decided.
        recomputed: as in `activation_values_per_token`.
    """
    config, float32 = run.model, BYTES_PER_VALUE["float32"]
    dtype = dtype or DTYPE_OF_PRECISION[run.train.precision]
    stored, computed = (BYTES_PER_VALUE[name] for name in TRAINING_DTYPES[dtype])
    tokens = (sequences or run.micro_batch_size) * (sequence_length or run.data.sequence_length)
    values = activation_values_per_token(config, run.train.checkpoint_activations, recomputed)
    on_gpu = (device or run.trainer.accelerator) in ("cuda", "gpu")
    rows = min(GPU_LOSS_CHUNK_ROWS if on_gpu else LOSS_CHUNK_ROWS, tokens)
    # float32 logits are overwritten with their gradient; others have a float32 copy between the two.
    logit = float32 if computed == float32 else float32 + 2 * computed
    count = count_parameters(config)
    gradients = count.naive if on_gpu else count.unique
    saved = layer_matrices(config) if run.optimizer.name == "muon" else 0  # one moment instead of two
    return TrainingMemory(
        weights=count.unique * stored,
        gradients=gradients * stored,
        optimizer=(2 * count.unique - saved) * stored,
        activations=tokens * values * computed,
        logits=rows * config.vocab_size * logit,
        formulas={
            "weights": f"{count.unique:,} × {stored} bytes",
            "gradients": f"{gradients:,} × {stored} bytes",
            "optimizer": (f"(2 × {count.unique:,} - {saved:,})" if saved else f"2 × {count.unique:,}")
            + f" × {stored} bytes",
            "activations": f"{tokens:,} tokens × {values:,} values × {computed} bytes",
            "logits": f"{rows:,} tokens × {config.vocab_size:,} × {logit} bytes",
        },
    )
