"""Tensor names of other tools: a Llama's names with other prefixes are read, others are recognized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from smolctl.sources.base import Weights
from smolctl.sources.meta import huggingface_name, is_meta
from smolctl.sources.shapes import HEAD, TABLE

if TYPE_CHECKING:
    import torch

    from smolctl.sources.quantized.scaled import StoredTensor

ANCHOR = "layers.0.input_layernorm.weight"  # a name that only such layers have
ADAPTER = "a LoRA adapter, which holds no model: merge it into its base model with peft first"
LITGPT = "a litgpt checkpoint: convert it with `litgpt convert_from_litgpt`"
# Suffixes of names that only one tool writes, the tool, and how to convert its files to a readable folder.
FORMATS = (
    ("lora_A.weight", ADAPTER),
    ("lora_A.default.weight", ADAPTER),
    ("attn.qkv.weight", LITGPT),
    ("attn.attn.weight", LITGPT),
    ("attn.c_attn.weight", "a network of GPT-2's kind (nanoGPT, GPT-2), which is not a Llama"),
    ("attention.wq.weight", "Meta's format: convert it with transformers' convert_llama_weights_to_hf"),
    ("attn.output_proj.weight", "a torchtune checkpoint: save it with its FullModelHFCheckpointer"),
)


def huggingface_names(names: Iterable[str], tied: bool) -> dict[str, str]:
    """The names of `LlamaForCausalLM` by the names in the file.

    A wrapper's prefix (`net.model.`, `module.model.`, `language_model.model.`) becomes `model.`, and so does
    a missing one. Meta's and torchtune's names are translated. Names that do not lie in the network stay as
    they are.

    Args:
        names: in the file.
        tied: whether a head without a table is the table of both, as safetensors' `save_model` writes it.
    """
    names = tuple(names)
    if is_meta(names):
        return {name: huggingface_name(name) for name in names}
    prefixes = {name.removesuffix(ANCHOR) for name in names if name.endswith(ANCHOR)}
    prefix = prefixes.pop() if len(prefixes) == 1 else "model."
    found = {name: _name(name, prefix) for name in names}
    if tied and TABLE not in found.values():
        found = {name: TABLE if new == HEAD else new for name, new in found.items()}
    return found if len(set(found.values())) == len(names) else dict(zip(names, names, strict=True))


def _name(name: str, prefix: str) -> str:
    if name.endswith(HEAD):
        return HEAD
    return f"model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name


def format_of(names: Iterable[str]) -> str:
    """The tool that wrote a file, and what to do with it; "" if the names do not show it."""
    ends = {".".join(name.rsplit(".", 3)[-count:]) for name in names for count in (2, 3)}
    return next((what for end, what in FORMATS if end in ends), "")


class RenamedWeights(Weights):
    """Tensors under other names.

    Args:
        weights: with the file's names.
        names: new names by the file's names; tensors without a new name are left out.
    """

    def __init__(self, weights: Weights, names: Mapping[str, str]) -> None:
        self.weights, self.names = weights, names

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        return ((self.names[name], item) for name, item in self.weights.stored() if name in self.names)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((self.names[name], item) for name, item in self.weights.tensors() if name in self.names)
