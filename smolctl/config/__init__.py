"""The settings of a model and of a run: plain, validated data; without importing torch."""

from smolctl.config.load import load_run_config, preset_names, presets_folder, resolve_run_config
from smolctl.config.model import ModelConfig, RopeScaling
from smolctl.config.provenance import Provenance
from smolctl.config.run import RunConfig

__all__ = [
    "ModelConfig",
    "Provenance",
    "RopeScaling",
    "RunConfig",
    "load_run_config",
    "preset_names",
    "presets_folder",
    "resolve_run_config",
]
