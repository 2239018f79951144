"""Documents packed into one sequence: which tokens attend to which, and where each document begins.

Shapes: B sequences, T tokens of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Attention within documents: a mask of which tokens attend to which (B, 1, T, T), or the documents' lengths.
# With lengths, a CPU computes each document separately, which takes a fifth of the mask's time for documents
# of 100 tokens in sequences of 1,024; a GPU does so in one kernel.
Documents = Tensor | tuple[int, ...]


def has_varlen(x: Tensor) -> bool:
    """Whether FlashAttention supports documents of different lengths here: on GPUs from Ampere on, in 16
    bits.
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
