"""The quantized model of a Space."""

from __future__ import annotations

from pathlib import Path

from smolctl.publish.build import Built
from smolctl.quantization.build import build_items, read_tensors, widened
from smolctl.quantization.folder import Origin, write_folder
from smolctl.quantization.schemes import SchemeOptions, plan_quantization
from smolctl.runs.layout import QUANTIZED
from smolctl.sources import open_source
from smolctl.sources.quantized_folder import read_description


def write_space_model(built: Built, scheme: str, folder: Path) -> None:
    """Quantize the published model into a new folder.

    Raises:
        SmolError: it cannot be quantized with this scheme, or cannot be written.
    """
    source = open_source(str(built.folder))
    config = source.require_config()
    tensors = read_tensors(source)
    plan, _ = widened(plan_quantization(config, scheme, SchemeOptions()), tensors)
    items = build_items(config, tensors, plan)
    origin = Origin(built.model.name, built.model.source.kind.value, step=built.model.source.step)
    write_folder(folder, config, plan, items, source.read_tokenizer(), origin)


def space_model(built: Built, scheme: str, work: Path) -> Path:
    """The folder of a scheme: the run's own, which may be calibrated, or a new one in `work`."""
    for name in built.quantized:
        folder = built.folder / QUANTIZED / name
        if read_description(folder)["scheme"] == scheme:
            return folder
    write_space_model(built, scheme, work / scheme)
    return work / scheme
