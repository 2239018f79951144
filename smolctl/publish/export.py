"""A model as the files that stock tools load, and the proof that they load the same model."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.errors import InputError, SmolError
from smolctl.model.network import Transformer
from smolctl.model.weights import load_network
from smolctl.sources.base import ModelSource, TokenizerFiles
from smolctl.sources.gguf.write import GGUFResult, require_gguf, write_gguf
from smolctl.sources.gguf.write_tokenizer import SAMPLES
from smolctl.sources.huggingface.config import to_huggingface_config

CODE = Path(__file__).parent / "transformers_code"
# Float32 sums in another order: the logits of a 135M model differ by 1e-4 of the largest one at most.
TOLERANCE = 2e-4
CHECKED_TOKENS = 96
# Files of a Hugging Face folder that say more than could be rebuilt.
CARRIED_OVER = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Export:
    """What was written, and how well it loads back."""

    network: Transformer
    tokenizer: Tokenizer
    dtype: str
    largest_difference: float  # of a logit, between transformers and smolctl
    ggufs: tuple[GGUFResult, ...]

    @property
    def needs_remote_code(self) -> bool:
        return not self.network.config.is_llama


def export_model(
    source: ModelSource, folder: Path, name: str, schemes: Sequence[str] = (), beside: Path | None = None
) -> Export:
    """Write a model as a Hugging Face folder, load it back with transformers and compare.

    Args:
        source: a model with weights and a tokenizer.
        folder: an empty folder.
        name: of the model, for GGUF files.
        schemes: of the GGUF files to add.
        beside: the Hugging Face folder that the source was read from, if it was.

    Raises:
        InputError: the source has no tokenizer, or cannot be a GGUF.
        SmolError: what was written does not load as the same model.
    """
    config = source.require_config()
    for scheme in schemes:
        require_gguf(config, scheme)
    files = source.read_tokenizer()
    if files is None:
        raise InputError(
            f"{source.id}: there is no tokenizer beside the weights", "Put tokenizer.json there."
        )
    tokenizer = Tokenizer.from_files(files, source.id)
    tokenizer.require_fit(config.vocab_size)
    network = load_network(source).requires_grad_(False)
    state = {key: tensor.detach().contiguous() for key, tensor in network.state_dict().items()}
    dtype = str(network.head_weight.dtype).removeprefix("torch.")
    try:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    except OSError as error:
        raise SmolError(
            f"{folder}: the weights cannot be written ({error})", "Free some space and try again."
        ) from None
    _write_json(folder / "config.json", to_huggingface_config(config, dtype))
    _write_json(folder / "generation_config.json", _generation_config(network, tokenizer))
    _write_tokenizer(folder, tokenizer, config.max_position_embeddings)
    for carried in CARRIED_OVER:
        if beside is not None and (beside / carried).is_file():
            shutil.copyfile(beside / carried, folder / carried)
    if not config.is_llama:
        for path in sorted(CODE.glob("*.py")):
            shutil.copyfile(path, folder / path.name)
    difference = check_with_transformers(folder, network, tokenizer)
    ggufs = tuple(_write_gguf(network, files, scheme, folder, name) for scheme in schemes)
    return Export(network, tokenizer, dtype, difference, ggufs)


def _write_gguf(
    network: Transformer, files: TokenizerFiles, scheme: str, folder: Path, name: str
) -> GGUFResult:
    path = folder / f"{name}-{scheme}.gguf"
    return write_gguf(network.config, network.state_dict().items(), files, scheme, path, name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _generation_config(network: Transformer, tokenizer: Tokenizer) -> dict[str, Any]:
    """Where text begins and ends. Sampling is left to the caller: nothing here was tuned."""
    ends = sorted({*network.config.eos_token_ids, *tokenizer.end_token_ids})
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else network.config.bos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else network.config.pad_token_id
    ids = {"bos_token_id": first, "eos_token_id": ends[0] if len(ends) == 1 else ends, "pad_token_id": pad}
    return {key: value for key, value in ids.items() if value not in (None, [])}


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, context: int) -> None:
    """The tokenizer with its chat template in a file of its own, where transformers 5 keeps it."""
    tokenizer.save(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    template = settings.pop("chat_template", None)
    _write_json(path, {**settings, "model_max_length": context})
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


def check_with_transformers(folder: Path, network: Transformer, tokenizer: Tokenizer) -> float:
    """Load a folder with transformers and compare logits, tokens and chat with ours.

    Returns:
        The largest difference of a logit.

    Raises:
        SmolError: it does not load, or is another model.
    """
    config = network.config
    try:
        with _quiet():
            from transformers import AutoModelForCausalLM, AutoTokenizer

            # The only code that this can run is our own, copied there a moment ago.
            trust = {"trust_remote_code": not config.is_llama}
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trust).eval()
            their_tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    except Exception as error:  # whatever it raises, users of the repository would see it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _not_the_same(f"transformers cannot load it ({reason})") from None
    generator = torch.Generator().manual_seed(0)
    length = min(CHECKED_TOKENS, config.max_position_embeddings)
    ids = torch.randint(config.vocab_size, (1, length), generator=generator)
    with torch.inference_mode():
        logits = network.float()(ids)
        difference = float((theirs(ids).logits - logits).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(logits.abs().max())):
        raise _not_the_same(f"logits in transformers are off by {difference:.3g}")
    for sample in SAMPLES:
        if their_tokenizer(sample, add_special_tokens=False)["input_ids"] != tokenizer.encode(sample):
            raise _not_the_same(f"transformers cuts {sample[:30]!r} into other tokens")
    if (tokenizer.chat_template or None) != (their_tokenizer.chat_template or None):
        raise _not_the_same("transformers finds another chat template")
    return difference


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its progress bars and notices."""
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


def _not_the_same(what: str) -> SmolError:
    return SmolError(f"the exported folder is not the same model: {what}", "Nothing was sent; report this.")
