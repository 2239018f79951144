"""The shape of the network: Hugging Face's field names, plus two of smolctl's."""

from __future__ import annotations

from math import pi
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

# Larger sizes mean damage or an attack, and are refused before anything is computed or allocated. The largest
# published sizes: 262,144 tokens (Gemma 3), rows of 53,248 (Llama 3.1 405B), a context of 10,485,760 (Llama
# 4).
MAX_VOCABULARY, MAX_WIDTH, MAX_CONTEXT = 2**24, 2**20, 2**30
TokenId = Annotated[int, Field(strict=True, ge=0, lt=MAX_VOCABULARY)]
# In old configs, -1 means that there is no such token.
SpecialId = Annotated[int, Field(strict=True, ge=-1, lt=MAX_VOCABULARY)]


Name = Annotated[str, Field(min_length=1)]
ModelType = Literal["llama", "smollm3", "qwen2", "qwen3", "smolctl"]


class Section(BaseModel):
    """A frozen part of a config. Unknown keys, NaN, infinity, and booleans in place of numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
            raise ValueError("must be a number")
        return value


class RopeScaling(Section):
    """Llama 3's context extension: slow rotations are slowed down by `factor`, fast ones are unchanged.

    A rotation is slow if fewer than `low_freq_factor` of its wavelengths fit the original context, and fast
    if more than `high_freq_factor` do. Llama 3.2 has the factors 32, 1 and 4 and a context of 8,192.
    """

    rope_type: Literal["llama3"] = "llama3"
    factor: float = Field(ge=1)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(gt=0, le=MAX_CONTEXT)

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor:g} is not above "
                f"low_freq_factor {self.low_freq_factor:g}"
            )
        return self

    def __str__(self) -> str:
        bounds = f"{self.low_freq_factor:g} to {self.high_freq_factor:g}"
        return f"{self.rope_type} × {self.factor:g}, {bounds}, from {self.original_max_position_embeddings:,}"

    def slowed(self, frequency: float) -> float:
        """A RoPE frequency, in radians per token, after the scaling; in the precision of the argument."""
        fitting = self.original_max_position_embeddings / (2 * pi / frequency)
        span = self.high_freq_factor - self.low_freq_factor
        kept = min(max((fitting - self.low_freq_factor) / span, 0), 1)
        return (1 - kept) * frequency / self.factor + kept * frequency


class ModelConfig(Section):
    """A Llama-like decoder.

    The defaults are `smollm2-135m`, the from-scratch variant: learned positions and residual branches scaled
    by 1/sqrt(2). With `position_embedding="rope"` and `residual_scale=1` the network is, tensor for tensor, a
    `LlamaForCausalLM`. With one of `no_rope_layers`, `qkv_bias` and `use_qk_norm` it is SmolLM3's, Qwen2's or
    Qwen3's.
    """

    vocab_size: int = Field(49_152, gt=0, le=MAX_VOCABULARY, description="tokens in the vocabulary")
    hidden_size: int = Field(576, gt=0, le=MAX_WIDTH, description="width of the residual stream")
    intermediate_size: int = Field(1_536, gt=0, le=MAX_WIDTH, description="width of the SwiGLU MLP")
    num_hidden_layers: int = Field(30, gt=0, le=10_000, description="blocks of attention and MLP")
    num_attention_heads: int = Field(9, gt=0, le=MAX_WIDTH, description="query heads")
    num_key_value_heads: int = Field(
        3, gt=0, le=MAX_WIDTH, description="key/value heads, shared by groups of query heads"
    )
    head_dim: int = Field(
        0, ge=0, le=MAX_WIDTH, description="width of a head; 0: hidden_size / num_attention_heads"
    )
    max_position_embeddings: int = Field(1_024, gt=0, le=MAX_CONTEXT, description="context length in tokens")
    position_embedding: Literal["rope", "learned"] = Field("learned", description="rope or a learned table")
    rope_theta: float = Field(
        10_000.0, gt=0, description="base of rope's wavelengths; unused with learned positions"
    )
    rope_scaling: RopeScaling | None = Field(None, description="Llama 3's scaling of rope; null: none")
    no_rope_layers: tuple[Literal[0, 1], ...] | None = Field(
        None, description="1 or 0 for each layer with or without rope, as in SmolLM3; null: rope in all"
    )
    qkv_bias: bool = Field(False, description="biases for queries, keys and values, as in Qwen2")
    use_qk_norm: bool = Field(
        False, description="RMSNorm of each head's queries and keys before rope, as in Qwen3"
    )
    residual_scale: float = Field(2**-0.5, gt=0, description="factor of every residual branch")
    rms_norm_eps: float = Field(1e-5, gt=0, description="added to the mean square in each norm")
    hidden_act: Literal["silu"] = Field("silu", description="activation of the gate")
    tie_word_embeddings: bool = Field(True, description="the head reuses the token table")
    attention_dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout probability of the attention weights"
    )
    initializer_range: float = Field(
        1 / 24, gt=0, description="standard deviation of new weights; 1/24 is SmolLM2's"
    )
    bos_token_id: SpecialId | None = Field(0, description="token that begins a text")
    eos_token_id: SpecialId | tuple[SpecialId, ...] | None = Field(
        0, description="token or tokens that end a text"
    )
    pad_token_id: SpecialId | None = Field(None, description="token that pads short texts")

    @model_validator(mode="before")
    @classmethod
    def _derive_head_dim(cls, values: object) -> object:
        if not isinstance(values, dict) or values.get("head_dim") not in (None, 0):
            return values
        hidden = values.get("hidden_size", cls.model_fields["hidden_size"].default)
        heads = values.get("num_attention_heads", cls.model_fields["num_attention_heads"].default)
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            if hidden % heads:
                raise ValueError(
                    f"hidden_size {hidden} is not divisible by num_attention_heads {heads}; set head_dim"
                )
            return {**values, "head_dim": hidden // heads}
        return values

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.position_embedding == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, but rope needs an even one")
        if self.no_rope_layers and len(self.no_rope_layers) != self.num_hidden_layers:
            raise ValueError(
                f"no_rope_layers has {len(self.no_rope_layers)} entries, but num_hidden_layers is "
                f"{self.num_hidden_layers}"
            )
        self._check_kin()
        return self

    def _check_kin(self) -> None:
        """No library has a class for two of these at once, so such a model would run nowhere else."""
        kin = [name for name in ("no_rope_layers", "qkv_bias", "use_qk_norm") if getattr(self, name)]
        if len(kin) > 1:
            raise ValueError(f"{kin[0]} and {kin[1]} in one model are not supported")
        rotated = [*kin, *(["rope_scaling"] if self.rope_scaling else [])]
        if rotated and (self.position_embedding == "learned" or self.residual_scale != 1.0):
            raise ValueError(f"{rotated[0]} needs position_embedding rope and residual_scale 1")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text; empty if the model declares none."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    @property
    def model_type(self) -> ModelType:
        """transformers' name of the class that computes exactly this network; "smolctl" for smolctl's own
        code.
        """
        if self.position_embedding == "learned" or self.residual_scale != 1.0:
            return "smolctl"
        if self.no_rope_layers:
            return "smollm3"
        if self.qkv_bias:
            return "qwen2"
        return "qwen3" if self.use_qk_norm else "llama"

    @property
    def needs_own_code(self) -> bool:
        """Whether transformers has no class for the network."""
        return self.model_type == "smolctl"

    def rotates(self, layer: int) -> bool:
        """Whether RoPE rotates the queries and keys of a layer, counted from 0."""
        return self.position_embedding == "rope" and not (
            self.no_rope_layers and self.no_rope_layers[layer] == 0
        )
