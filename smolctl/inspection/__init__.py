"""What can be said about a model without its weights: counts, costs, problems, differences."""

from smolctl.inspection.differences import Difference, Differences, compare
from smolctl.inspection.parameters import ParameterReport, count_source
from smolctl.inspection.report import ModelReport, inspect, training_config
from smolctl.inspection.tree import ModuleNode, module_tree

__all__ = [
    "Difference",
    "Differences",
    "ModelReport",
    "ModuleNode",
    "ParameterReport",
    "compare",
    "count_source",
    "inspect",
    "module_tree",
    "training_config",
]
