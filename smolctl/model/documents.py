"""Which tokens of a sequence attend to which, if documents are packed into it and each is separate.

Shapes: B sequences, T tokens of each.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Which tokens attend to which: a mask (B, 1, T, T), the documents' lengths, or FlexAttention's blocks.
# With lengths, a CPU computes each document separately, which takes a fifth of the mask's time for documents
# of 100 tokens in sequences of 1,024; a GPU does so in one kernel. Blocks are for compiled networks, which
# lengths that differ from batch to batch would compile again and again.
Attended: TypeAlias = "Tensor | tuple[int, ...] | BlockMask"


def has_kernels(x: Tensor) -> bool:
    """Whether FlashAttention for documents of different lengths and FlexAttention are fast here: on GPUs from
    Ampere on, in 16 bits.
    """
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    is_half = dtype in (torch.float16, torch.bfloat16)
    return x.is_cuda and is_half and torch.cuda.get_device_capability(x.device) >= (8, 0)


def document_mask(documents: Tensor) -> Tensor:
    """Attention mask: each token attends to those up to itself in the same document, (B, 1, T, T) from (B,
    T).
    """
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril()[:, None]


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # training may use blocks created by a validation
def causal_blocks(length: int, device: torch.device) -> BlockMask:
    """FlexAttention's mask for T = `length` tokens that attend to all tokens up to themselves."""
    from torch.nn.attention.flex_attention import create_block_mask  # takes a second to import

    def is_attended(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(is_attended, None, None, length, length, device)


def document_blocks(documents: Tensor) -> BlockMask:
    """FlexAttention's mask with the same meaning as `document_mask`, from documents' numbers (B, T)."""
    from torch.nn.attention.flex_attention import create_block_mask

    def is_attended(b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[b, query] == documents[b, key])

    B, T = documents.shape
    return create_block_mask(is_attended, B, None, T, T, documents.device)


def document_lengths(documents: Tensor) -> tuple[int, ...]:
    """Tokens per document, for one sequence after another, from the documents' numbers (B, T)."""
    places = _begins(documents).flatten().nonzero()[:, 0]
    return tuple(places.diff(append=places.new_tensor([documents.numel()])).tolist())


def positions_in_documents(documents: Tensor) -> Tensor:
    """Position (B, T) of every token in its document, from the documents' ascending numbers (B, T)."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    return places - torch.where(_begins(documents), places, 0).cummax(1).values


def _begins(documents: Tensor) -> Tensor:
    """Which tokens (B, T) are the first of a document, from the documents' ascending numbers (B, T)."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return begins
