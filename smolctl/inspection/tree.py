"""Parameter rows as a tree of modules, in which identical layers are merged into one node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from smolctl.arithmetic import ParameterRow


@dataclass(frozen=True)
class ModuleNode:
    """A module, a parameter, or several identical ones that differ only in their number.

    The formula gives `parameters`: with the config's names for a parameter, as a sum of the children for a
    module.
    """

    name: str  # the last part of the module's name: "q_proj", "layers"
    module: str  # the full name, with * for the numbers of identical modules
    shape: tuple[int, ...] | None  # None for a module with children
    copies: int  # number of identical ones; shape is that of one copy
    formula: str
    parameters: int  # in all copies
    tied: bool  # every parameter below is already counted elsewhere
    children: tuple[ModuleNode, ...] = ()

    def at_depth(self, depth: int) -> Iterator[ModuleNode]:
        """Nodes with `depth` parts in their name, and parameters at a smaller depth.

        They partition the model: the untied ones add up to the total.
        """
        if depth <= 1 or not self.children:
            yield self
        else:
            for child in self.children:
                yield from child.at_depth(depth - 1)


def module_tree(rows: tuple[ParameterRow, ...], layers: str = "") -> tuple[ModuleNode, ...]:
    """Top-level modules of a list of parameters.

    Args:
        rows: every parameter of the model.
        layers: name of the number of identical layers in formulas; "": the number itself.
    """
    return _nodes("", [(tuple(row.module.split(".")), row) for row in rows], layers)


_Entries = list[tuple[tuple[str, ...], ParameterRow]]


def _nodes(prefix: str, entries: _Entries, layers: str) -> tuple[ModuleNode, ...]:
    groups: dict[str, _Entries] = {}
    for (name, *rest), row in entries:
        groups.setdefault(name, []).append((tuple(rest), row))
    return tuple(_node(name, f"{prefix}{name}", below, layers) for name, below in groups.items())


def _node(name: str, module: str, below: _Entries, layers: str) -> ModuleNode:
    if below == [((), below[0][1])]:
        row = below[0][1]
        return ModuleNode(name, module, row.shape, 1, row.formula, row.parameters, row.tied)
    # A parameter with the name of a module ("proj" and "proj.bias") is that module's weight.
    parts = [(rest or ("weight",), row) for rest, row in below]
    numbered = all(rest[0].isdigit() for rest, _ in parts)
    children = _nodes(f"{module}.", parts, layers)
    if numbered:
        return _merged(name, module, children, layers)
    return _parent(name, module, children)


def _parent(name: str, module: str, children: tuple[ModuleNode, ...]) -> ModuleNode:
    return ModuleNode(
        name=name,
        module=module,
        copies=1,
        shape=None,
        formula=" + ".join(child.name for child in children),
        parameters=sum(child.parameters for child in children),
        tied=all(child.tied for child in children),
        children=children,
    )


def _merged(name: str, module: str, numbered: tuple[ModuleNode, ...], layers: str) -> ModuleNode:
    """A list of modules: the children of one of them, times the number of identical ones."""
    kinds: dict[object, list[ModuleNode]] = {}
    for node in numbered:
        kinds.setdefault(_content(node), []).append(node)
    if len(kinds) == 1:
        count = len(numbered)
        return replace(
            _repeat(numbered[0], count, layers or f"{count}", f"{module}.*"), name=name, module=module
        )
    groups = []
    for nodes in kinds.values():
        label = _ranges([int(node.name) for node in nodes])
        count = len(nodes)
        groups.append(replace(_repeat(nodes[0], count, f"{count}", f"{module}.{label}"), name=label))
    return _parent(name, module, tuple(groups))


def _content(node: ModuleNode) -> object:
    """The properties that make two numbered modules identical: everything except their numbers."""
    return (
        node.shape,
        node.copies,
        node.tied,
        tuple((child.name, _content(child)) for child in node.children),
    )


def _repeat(node: ModuleNode, count: int, word: str, label: str, first: str = "") -> ModuleNode:
    """A node for `count` identical ones, named `label` together; `first` is one of them.

    `word` is the count in formulas.
    """
    first = first or node.module
    one = f"{node.parameters:,}" if node.children and node.copies == 1 else node.formula
    return replace(
        node,
        module=label + node.module.removeprefix(first),
        copies=node.copies * count,
        formula=f"{word} × {one}" if count > 1 or node.copies == 1 else node.formula,
        parameters=node.parameters * count,
        children=tuple(_repeat(child, count, word, label, first) for child in node.children),
    )


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(start) if start == end else f"{start}-{end}" for start, end in runs)
