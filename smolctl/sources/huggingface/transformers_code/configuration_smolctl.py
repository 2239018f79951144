"""Config of a Llama with learned positions or scaled residual branches, for transformers."""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig


@strict
class SmolctlConfig(LlamaConfig):
    """Llama's fields and two more.

    Args:
        position_embedding: "learned" adds a vector of a table to every token, "rope" rotates as Llama does.
        residual_scale: factor of what attention and MLP add to the residual stream.
    """

    model_type = "smolctl"

    position_embedding: str = "learned"
    residual_scale: float = 1.0
