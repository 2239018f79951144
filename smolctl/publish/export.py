"""Exports a model for stock tools, and checks that they load the same model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.errors import SmolError
from smolctl.evaluation import require_recorded_loss
from smolctl.hub.errors import first_line
from smolctl.model.network import Transformer
from smolctl.model.weights import finite_tensors, from_state
from smolctl.sources.base import ModelSource
from smolctl.sources.gguf.write import GGUFResult, require_gguf, write_gguf
from smolctl.sources.gguf.write_tokenizer import SAMPLES
from smolctl.sources.huggingface.write import write_model
from smolctl.sources.provenance import provenance_of

# float32 sums in a different order: the logits of a 135M model differ by at most 1e-4 of the largest one.
TOLERANCE = 2e-4
CHECKED_TOKENS = 96


@dataclass(frozen=True)
class Export:
    """The result of an export and of loading it back."""

    network: Transformer
    tokenizer: Tokenizer
    dtype: str
    largest_difference: float  # of the logits, between transformers and smolctl
    ggufs: tuple[GGUFResult, ...]


def export_model(source: ModelSource, folder: Path, name: str, schemes: Sequence[str] = ()) -> Export:
    """Write a model as a Hugging Face folder, load it back with transformers and compare.

    Args:
        source: a model with weights and a tokenizer.
        folder: an empty folder.
        name: of the model in GGUF files.
        schemes: of additional GGUF files.

    Raises:
        InputError: the source has no tokenizer, cannot be written as a GGUF, contains NaN or infinite values,
            or does not reproduce the loss that its run recorded.
        SmolError: the export does not load as the same model.
    """
    config = source.require_config()
    for scheme in schemes:
        require_gguf(config, scheme)
    files = source.require_tokenizer()
    tokenizer = Tokenizer.from_files(files, source.id)
    tokenizer.require_fit(config.vocab_size)
    network = from_state(config, dict(finite_tensors(source)), source.id).requires_grad_(False).eval()
    state = {key: tensor.detach().contiguous() for key, tensor in network.state_dict().items()}
    dtype = str(network.head_weight.dtype).removeprefix("torch.")
    try:
        whole = replace(tokenizer.files(), carried=files.carried)
        write_model(folder, config, state, dtype, whole)
    except (OSError, SafetensorError) as error:
        raise SmolError(
            f"{folder}: the model cannot be written ({error})", "Free some space and try again."
        ) from None
    difference = check_with_transformers(folder, network, tokenizer)
    if source.recorded_loss is not None:
        require_recorded_loss(network, source.recorded_loss, source.id)
    origin = provenance_of(source)
    ggufs = tuple(
        write_gguf(config, state.items(), files, scheme, folder / f"{name}-{scheme}.gguf", name, origin)
        for scheme in schemes
    )
    return Export(network, tokenizer, dtype, difference, ggufs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and notices."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@_quiet()
def check_with_transformers(folder: Path, network: Transformer, tokenizer: Tokenizer) -> float:
    """Load a folder with transformers and compare logits, tokens and chat with smolctl's.

    Returns:
        The largest difference of the logits.

    Raises:
        SmolError: it does not load, or loads as a different model.
    """
    config = network.config
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        # The only code that this can run is smolctl's, which was just copied there.
        trust = {"trust_remote_code": config.needs_own_code}
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trust).eval()
        their_tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    except Exception as error:  # users of the repository would see the same exception
        raise _not_the_same(f"transformers cannot load it ({first_line(error)})") from None
    generator = torch.Generator().manual_seed(0)
    length = min(CHECKED_TOKENS, config.max_position_embeddings)
    ids = torch.randint(config.vocab_size, (1, length), generator=generator)
    with torch.inference_mode():
        logits = network.float()(ids)
        difference = float((theirs(ids).logits - logits).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(logits.abs().max())):
        raise _not_the_same(f"logits in transformers are off by {difference:.3g}")
    for sample in SAMPLES:
        if their_tokenizer(sample)["input_ids"] != tokenizer.encode(sample):
            if config.model_type == "qwen2":  # even if tokenizer_config.json says otherwise
                raise SmolError(
                    "transformers tokenizes texts for every model of the type qwen2 as Qwen does, "
                    "but this model has another tokenizer",
                    "Train with the tokenizer of Qwen2.5, or without qkv_bias.",
                )
            raise _not_the_same(f"transformers splits {sample[:30]!r} into different tokens")
    ours = (tokenizer.chat_template or "").replace("\r\n", "\n")  # as Python and Jinja read a text file
    if ours != (their_tokenizer.chat_template or ""):
        raise _not_the_same("transformers finds a different chat template")
    return difference


def _not_the_same(what: str) -> SmolError:
    return SmolError(f"the exported folder is not the same model: {what}", "Nothing was sent; report this.")
