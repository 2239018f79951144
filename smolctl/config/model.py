"""The shape of the network: Hugging Face's field names plus two of our own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Larger sizes are damage or an attack, and are refused before anything is computed or allocated. The largest
# published: 262,144 tokens (Gemma 3), rows of 53,248 (Llama 3.1 405B), a context of 10,485,760 (Llama 4).
MAX_VOCABULARY, MAX_WIDTH, MAX_CONTEXT = 2**24, 2**20, 2**30
TokenId = Annotated[int, Field(strict=True, ge=0, lt=MAX_VOCABULARY)]
# -1 is how old configs spell that there is no such token.
SpecialId = Annotated[int, Field(strict=True, ge=-1, lt=MAX_VOCABULARY)]


class ModelConfig(BaseModel):
    """A Llama-shaped decoder.

    The defaults are `smollm2-135m`, the from-scratch variant: learned positions and
    residual branches scaled by 1/sqrt(2). With `position_embedding="rope"` and
    `residual_scale=1` the network is, tensor for tensor, a `LlamaForCausalLM`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    vocab_size: int = Field(49_152, gt=0, le=MAX_VOCABULARY, description="tokens that the model knows")
    hidden_size: int = Field(576, gt=0, le=MAX_WIDTH, description="width of the residual stream")
    intermediate_size: int = Field(1_536, gt=0, le=MAX_WIDTH, description="width of the SwiGLU MLP")
    num_hidden_layers: int = Field(30, gt=0, le=10_000, description="blocks of attention and MLP")
    num_attention_heads: int = Field(9, gt=0, le=MAX_WIDTH, description="query heads")
    num_key_value_heads: int = Field(
        3, gt=0, le=MAX_WIDTH, description="key/value heads, shared by groups of query heads"
    )
    head_dim: int = Field(
        0, ge=0, le=MAX_WIDTH, description="width of a head; 0 is hidden_size / num_attention_heads"
    )
    max_position_embeddings: int = Field(1_024, gt=0, le=MAX_CONTEXT, description="context length in tokens")
    position_embedding: Literal["rope", "learned"] = Field("learned", description="rope, or a learned table")
    rope_theta: float = Field(
        10_000.0, gt=0, description="base of the wavelengths of rope; unused when learned"
    )
    residual_scale: float = Field(2**-0.5, gt=0, description="factor of every residual branch")
    rms_norm_eps: float = Field(1e-5, gt=0, description="added to the mean square in a norm")
    hidden_act: Literal["silu"] = Field("silu", description="activation of the gate")
    tie_word_embeddings: bool = Field(True, description="the head reuses the token table")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="share of attention weights dropped")
    initializer_range: float = Field(
        1 / 24, gt=0, description="standard deviation of new weights; 1/24 is SmolLM2's"
    )
    bos_token_id: SpecialId | None = Field(0, description="token that begins a text")
    eos_token_id: SpecialId | tuple[SpecialId, ...] | None = Field(
        0, description="token or tokens that end a text"
    )
    pad_token_id: SpecialId | None = Field(None, description="token that fills up short texts")

    @model_validator(mode="before")
    @classmethod
    def _derive_head_dim(cls, values: object) -> object:
        if not isinstance(values, dict) or values.get("head_dim"):
            return values
        hidden = values.get("hidden_size", cls.model_fields["hidden_size"].default)
        heads = values.get("num_attention_heads", cls.model_fields["num_attention_heads"].default)
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            if hidden % heads:
                raise ValueError(
                    f"hidden_size {hidden} does not divide by num_attention_heads {heads}; set head_dim"
                )
            return {**values, "head_dim": hidden // heads}
        return values

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide by "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.position_embedding == "rope" and self.head_dim % 2:
            raise ValueError(f"rope rotates pairs: head_dim {self.head_dim} is odd")
        return self

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text; empty when the model declares none."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    @property
    def is_llama(self) -> bool:
        """Whether the network is exactly a `LlamaForCausalLM`."""
        return self.position_embedding == "rope" and self.residual_scale == 1.0
