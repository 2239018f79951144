"""A Llama with learned positions and scaled residual branches, for transformers.

Everything else is transformers' own Llama: attention, masks, cache and generation. Three things differ:

- `model.embed_positions`, a table of max_position_embeddings vectors; its row t is added to token t;
- no rotation of queries and keys: their angle is always zero;
- what attention and MLP add to the residual stream is multiplied by `residual_scale`.
"""

import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel

from .configuration_smolctl import SmolctlConfig


class ScaledLinear(nn.Linear):
    """A product with a matrix, times a constant."""

    def __init__(self, inputs: int, outputs: int, scale: float):
        super().__init__(inputs, outputs, bias=False)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


class NoRotation(nn.Module):
    """cos and sin of angle zero, in place of the rotary embedding."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim = head_dim

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (*position_ids.shape, self.head_dim)
        return x.new_ones(shape), x.new_zeros(shape)


class SmolctlModel(LlamaModel):
    """The decoder: tokens to hidden states."""

    config_class = SmolctlConfig

    def __init__(self, config: SmolctlConfig):
        super().__init__(config)
        self.learned = config.position_embedding == "learned"
        if self.learned:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
            self.rotary_emb = NoRotation(config.head_dim)
        scale, width = config.residual_scale, config.hidden_size
        for layer in self.layers:  # the two matrices that write to the residual stream
            heads = layer.self_attn.o_proj.in_features
            layer.self_attn.o_proj = ScaledLinear(heads, width, scale)
            layer.mlp.down_proj = ScaledLinear(config.intermediate_size, width, scale)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **others):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        # Versions of transformers differ in the name of this argument, which is passed on as it came.
        cache = others.get("cache", others.get("past_key_values"))
        seen = cache.get_seq_length() if cache is not None else 0
        end, context = seen + inputs_embeds.shape[1], self.config.max_position_embeddings
        if position_ids is None:
            position_ids = torch.arange(seen, end, device=inputs_embeds.device)[None]
        if self.learned:
            if end > context and int(position_ids.max()) >= context:
                raise ValueError(f"{end} tokens do not fit the model's context of {context}")
            inputs_embeds = inputs_embeds + self.embed_positions(position_ids)
        return super().forward(
            attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **others
        )


class SmolctlForCausalLM(LlamaForCausalLM):
    """The language model: the decoder and a head that may share its token table."""

    config_class = SmolctlConfig

    def __init__(self, config: SmolctlConfig):
        super().__init__(config)
        self.model = SmolctlModel(config)
        self.post_init()
