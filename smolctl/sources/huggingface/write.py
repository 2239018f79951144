"""Writes a model as a folder for transformers: weights, configs, tokenizer, and code if it needs some."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolctl.config import ModelConfig
from smolctl.durable import write_json
from smolctl.sources.base import TokenizerFiles
from smolctl.sources.huggingface.config import to_huggingface_config
from smolctl.sources.huggingface.folder import SINGLE
from smolctl.sources.huggingface.tokenizer import CARRIED, token_ids

if TYPE_CHECKING:
    import torch

CODE = Path(__file__).parent / "transformers_code"
CONFIG, GENERATION, TEMPLATE = "config.json", "generation_config.json", "chat_template.jinja"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def write_model(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, torch.Tensor],
    dtype: str,
    tokenizer: TokenizerFiles | None,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write a model into an existing folder.

    Args:
        folder: files with the same names are replaced.
        config: of the network.
        tensors: under their Hugging Face names, without a tied head.
        dtype: for config.json.
        tokenizer: written with its chat template and the files that it carries.
        quantization: for config.json, if the tensors are packed; transformers cannot read such a model.

    Raises:
        OSError, SafetensorError: the files cannot be written.
    """
    from safetensors.torch import save_file

    save_file(dict(tensors), folder / SINGLE, metadata={"format": "pt"})
    values = to_huggingface_config(config, dtype)
    if quantization is not None:
        values.pop("auto_map", None)
        values["quantization_config"] = dict(quantization)
    elif config.needs_own_code:
        for path in CODE.glob("*.py"):
            shutil.copyfile(path, folder / path.name)
    write_json(folder / CONFIG, values)
    (folder / SINGLE).chmod((folder / CONFIG).stat().st_mode)  # safetensors makes it private
    write_json(folder / GENERATION, generation_config(config, tokenizer))
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, config.max_position_embeddings)


def write_tokenizer(folder: Path, files: TokenizerFiles, context: int | None = None) -> None:
    """Write the files that transformers' AutoTokenizer loads: carried files unchanged, or else smolctl's own
    settings, with the chat template in a separate file.

    Args:
        folder: created if it does not exist.
        files: the tokenizer.
        context: the model's context length; None if not known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER).write_text(files.tokenizer_json, encoding="utf-8", newline="\n")
    for name in CARRIED:  # other names that a checkpoint may contain are ignored
        if name in files.carried:
            (folder / name).write_text(files.carried[name], encoding="utf-8", newline="")
    if TOKENIZER_CONFIG in files.carried:
        return
    spelled = {token_id: token for token, token_id in token_ids(files.tokenizer_json, TOKENIZER).items()}
    ids = {"bos_token": files.bos_token_id, "eos_token": files.eos_token_id, "pad_token": files.pad_token_id}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: spelled[token_id] for name, token_id in ids.items() if token_id in spelled},
        **({} if context is None else {"model_max_length": context}),
    }
    write_json(folder / TOKENIZER_CONFIG, settings)
    if files.chat_template is not None:
        (folder / TEMPLATE).write_text(files.chat_template, encoding="utf-8", newline="")


def generation_config(config: ModelConfig | None, tokenizer: TokenizerFiles | None) -> dict[str, Any]:
    """The tokens that begin and end text. Without sampling settings, because none were tuned here.

    Args:
        config: of the model; None: only the tokenizer's information is used.
        tokenizer: the model's own, if it has one.
    """
    first, ends, pad = None, set[int](), None
    if config is not None:
        first, ends, pad = config.bos_token_id, {*config.eos_token_ids}, config.pad_token_id
    if tokenizer is not None:
        first = first if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ends |= {*tokenizer.end_token_ids}
        ends |= set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
        pad = pad if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    last = sorted(ends)
    ids = {"bos_token_id": first, "eos_token_id": last[0] if len(last) == 1 else last, "pad_token_id": pad}
    return {key: value for key, value in ids.items() if value not in (None, [])}
