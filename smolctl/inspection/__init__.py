"""Facts about a model without reading its weights: counts, costs, problems, differences."""

from smolctl.inspection.differences import compare
from smolctl.inspection.parameters import count_source
from smolctl.inspection.report import inspect, training_config
from smolctl.inspection.tree import ModuleNode, module_tree

__all__ = ["ModuleNode", "compare", "count_source", "inspect", "module_tree", "training_config"]
