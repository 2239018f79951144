"""Parses all untrusted data: configs, headers, tokenizers, records, responses of a Hub.

Such data may contain anything. So its size is limited before it is read, its depth and its numbers before
they are used, and a schema defines what is needed. Every problem becomes an `InputError` with the path of the
key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from smolctl.errors import InputError

T = TypeVar("T")

MAX_BYTES = 50_000_000  # of a JSON file; the index of a model of 100,000 tensors has ten million
MAX_YAML_BYTES = 1_000_000  # PyYAML takes seconds per megabyte
MAX_YAML_NODES = 20_000  # keys and values of a YAML file, including those inserted by aliases
MAX_DEPTH = 64  # of nested lists and mappings; known files have up to eight
# Of an integer: tokenizer_config.json has 10**30 for "no limit", and 10**100 still fits a float.
MAX_DIGITS = 100
SHOWN = 80  # characters of a value or a key in an error

CORRECT = "Correct the file, or download it again."
_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"
# In pydantic's path to a value, besides its keys: members of a union, and "[key]" for the key itself.
_NO_KEY = re.compile(r"int|float|bool|str|.*\W.*")


class YamlSyntaxError(InputError):
    """A text is not YAML at all."""


def read_file(path: Path, remedy: str = CORRECT, most: int = MAX_BYTES) -> bytes:
    """Read the bytes of a file.

    Args:
        path: of the file. Pipes and devices, which may never end, are refused.
        remedy: of the error.
        most: maximum size in bytes.

    Raises:
        InputError: it cannot be read, or is larger.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a file", remedy)
        with path.open("rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with NUL in it
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason})", remedy) from None
    if len(content) > most:
        raise InputError(f"{path}: has more than {most:,} bytes", remedy)
    refuse_pointer(content, str(path))
    return content


def refuse_pointer(start: bytes, origin: str) -> None:
    """Refuse a Git LFS pointer in place of a large file. Raises InputError: `start` begins like one."""
    if start.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{origin}: a Git LFS pointer, not the file itself", "Run `git lfs pull` in its repository."
        )


def read_json(path: Path, remedy: str = CORRECT, most: int = MAX_BYTES) -> dict[str, Any]:
    """Read the object in a JSON file. Raises as `read_file` and `parse_object`."""
    return parse_object(read_file(path, remedy, most), str(path), remedy)


def parse_object(text: bytes | str, origin: str, remedy: str = CORRECT) -> dict[str, Any]:
    """Parse the object in a JSON text.

    Args:
        text: the JSON.
        origin: its name in an error.
        remedy: of the error.

    Raises:
        InputError: it is not JSON or not an object, or exceeds the limits of this module.
    """
    try:
        content = parse_json(text)
    except ValueError as error:
        raise InputError(f"{origin}: {error}", remedy) from None
    if not isinstance(content, dict):
        raise InputError(f"{origin}: the top level must be a JSON object", remedy)
    return content


def parse_json(text: bytes | str, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Parse a JSON text, for callers with their own errors.

    Args:
        text: the JSON.
        parse_constant: as in `json.loads`: called with "NaN" and similar names, which are not JSON.

    Raises:
        ValueError: it is not JSON, or exceeds the limits of this module; with the path of the key.
    """
    long: list[_LongNumber] = []

    def whole(digits: str) -> int | _LongNumber:
        if len(digits) <= MAX_DIGITS:
            return int(digits)
        long.append(_LongNumber(digits))
        return long[-1]

    try:
        value = json.loads(text, parse_int=whole, parse_constant=parse_constant)
    except RecursionError:
        raise ValueError(f"not JSON ({_TOO_DEEP})") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if long:
        key = _path_to(value, lambda item, _: item is long[0])
        raise ValueError(f"{key}: a number of {len(long[0])} digits")
    if _depth(value) > MAX_DEPTH:
        key = _path_to(value, lambda item, depth: depth >= MAX_DEPTH and isinstance(item, dict | list))
        raise ValueError(f"{key}: {_TOO_DEEP}")
    return value


def json_or_text(text: str) -> Any:
    """The value of a JSON text; the text itself where it is not JSON."""
    try:
        return parse_json(text)
    except ValueError:
        return text


class _LongNumber(str):
    """The digits of a number that is not parsed."""


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while (level := [one for one in level if isinstance(one, dict | list)]) and depth <= MAX_DEPTH:
        depth += 1
        level = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
    return depth


def _path_to(value: Any, is_wanted: Callable[[Any, int], bool]) -> str:
    """The dotted path of the first value for which `is_wanted`, called with value and depth, is true."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while waiting:
        path, one = waiting.pop()
        if is_wanted(one, len(path)):
            return dotted(path)
        items = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        waiting += [((*path, str(key)), item) for key, item in items]
    return ""


def parse_yaml(text: str, origin: str, remedy: str = CORRECT) -> Any:
    """Parse a YAML text: mappings, lists, strings, numbers, booleans and null.

    A date is a string, as in JSON. Raises as `parse_object`, naming the line; text that is not YAML at all
    raises `YamlSyntaxError`.
    """
    if len(text) > MAX_YAML_BYTES:
        raise InputError(f"{origin}: has more than {MAX_YAML_BYTES:,} characters", remedy)
    try:
        return yaml.load(text, Loader=YamlLoader)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        kind = InputError if isinstance(error, _Refusal) else YamlSyntaxError
        raise kind(f"{origin}{line}: {getattr(error, 'problem', None) or 'not YAML'}", remedy) from None


class _Refusal(yaml.MarkedYAMLError):
    """The text is YAML, but a value is not acceptable."""

    def __init__(self, key: str, problem: str, at: Any) -> None:
        super().__init__(problem=f"{key}: {problem}" if key else problem, problem_mark=at.start_mark)


class YamlLoader(yaml.SafeLoader):
    """PyYAML's safe loader with limits and without dates; `3e-4` is a number.

    With aliases, a file of a few hundred bytes may expand to billions of values. Values are counted in their
    expanded form before any is created.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._keys: list[str] = []  # of the value being read, outermost first
        self._paths: dict[yaml.Node, str] = {}
        self._sizes: dict[yaml.Node, int] = {}  # number of nodes of each complete node, including itself
        self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event, before = self.peek_event(), self._nodes  # type: ignore[no-untyped-call]
        if parent is not None:
            self._keys.append("?" if index is None else str(getattr(index, "value", index)))
        key = dotted(self._keys)
        if len(self._keys) >= MAX_DEPTH:
            raise _Refusal(key, _TOO_DEEP, event)
        node = super().compose_node(parent, index)
        assert node is not None
        is_alias = isinstance(event, yaml.AliasEvent)
        if is_alias and node not in self._sizes:
            raise _Refusal(key, f"*{event.anchor} refers to a value that contains it", event)
        self._nodes += self._sizes[node] if is_alias else 1
        if self._nodes > MAX_YAML_NODES:
            raise _Refusal(key, f"expands to more than {MAX_YAML_NODES:,} values", event)
        self._sizes.setdefault(node, self._nodes - before)
        self._paths.setdefault(node, key)
        if parent is not None:
            self._keys.pop()
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _Refusal(dotted([*self._keys, key.value]), "the key is given twice", key)
                seen.add((key.tag, key.value))
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Insert the pairs of the mappings that `<<` names. The last pair of a key counts: the mapping's own
        ones follow those of the first mapping named, which follow those of the second. PyYAML 6.0.3 orders
        them differently.
        """
        own, merged = [], []
        for key, value in node.value:
            if key.tag != MERGE:
                own.append((key, value))
                continue
            for one in reversed(value.value if isinstance(value, yaml.SequenceNode) else [value]):
                if not isinstance(one, yaml.MappingNode):
                    raise _Refusal(self._paths.get(value, ""), "not a mapping or a list of mappings", one)
                self.flatten_mapping(one)
                merged += one.value
        node.value = merged + own

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        key, written = self._paths.get(node, ""), node.value
        if node.tag not in self.yaml_constructors:
            raise _Refusal(key, f"the tag {node.tag} is not supported", node)
        if node.tag in NUMBERS and len(written) > MAX_DIGITS:
            raise _Refusal(key, f"a number of {len(written):,} digits", node)
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, ArithmeticError):  # `!!int ""`, `!!bool x`
            raise _Refusal(
                key, f"{shown(written)} is not a valid {node.tag.rpartition(':')[2]}", node
            ) from None


NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
MERGE = "tag:yaml.org,2002:merge"
PLAIN = {*NUMBERS, *(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "str", "seq", "map"))}
YamlLoader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in PLAIN
}
YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in {*PLAIN, MERGE}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _number(loader: YamlLoader, node: yaml.ScalarNode) -> Any:
    """A number as YAML 1.2 reads it: to PyYAML 010 is 8, and 1:30 is 90."""
    if ":" in node.value:
        return node.value
    if re.fullmatch(r"[-+]?[0-9][0-9_]*", node.value):
        return int(node.value.replace("_", ""))
    return yaml.SafeLoader.yaml_constructors[node.tag](loader, node)


YamlLoader.yaml_constructors |= dict.fromkeys(NUMBERS, _number)


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def _adapter(schema: Any) -> TypeAdapter[Any]:
    """The validator of a schema, created when first needed."""
    if schema not in _ADAPTERS:
        _ADAPTERS[schema] = TypeAdapter(schema)
    return _ADAPTERS[schema]


def checked(schema: type[T], value: object, origin: str, remedy: str = CORRECT) -> T:
    """A value validated by a schema: a dataclass, a TypedDict or a pydantic model. Unknown keys are dropped,
    unless the schema forbids them.

    Raises:
        InputError: the value is not valid; names the key.
    """
    try:
        result: T = _adapter(schema).validate_python(value)
    except ValidationError as error:
        raise InputError(f"{origin}: {first_fault(error)}", remedy) from None
    return result


def checked_json(schema: type[T], text: str, origin: str, remedy: str = CORRECT) -> T:
    """A JSON text validated like `checked`, without creating values that the schema does not have: for a
    large file in half the time of `parse_object`. Raises as `checked`.
    """
    try:
        result: T = _adapter(schema).validate_json(text.encode("utf-8", "replace"))
    except ValidationError as error:
        raise InputError(f"{origin}: {first_fault(error)}", remedy) from None
    return result


def fitting(schema: type[T], value: object) -> T | None:
    """A value like `checked`; None if it is not valid."""
    try:
        result: T = _adapter(schema).validate_python(value)
    except ValidationError:
        return None
    return result


def fitting_json(schema: type[T], text: str) -> T | None:
    """The value of a JSON text like `checked`; None if it is not valid."""
    try:
        result: T = _adapter(schema).validate_json(text.encode("utf-8", "replace"))
    except ValidationError:
        return None
    return result


def first_fault(error: ValidationError) -> str:
    """The first validation error, as "key: reason, got value"."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return f"not JSON ({first['ctx']['error']})"
    key, reason, given = key_of(first), plain_reason(first["msg"]), first["input"]
    says_enough = not key or first["type"] == "missing" or isinstance(given, dict)
    return f"{key + ': ' if key else ''}{reason}{'' if says_enough else f', got {shown(given)}'}"


def plain_reason(said: str) -> str:
    """What pydantic says of a value, or Typer with its words, without what only programmers know."""
    said = said.replace("Value error, ", "").replace("Input should be", "must be")
    return re.sub(", unable to parse string as an? (integer|number)", "", said)


def key_of(problem: Any) -> str:
    """The dotted path of the value in a pydantic error."""
    parts = [str(part) for part in problem["loc"]]
    if problem["type"] != "extra_forbidden":  # an unknown key may look like anything
        parts = [part for part in parts if not _NO_KEY.fullmatch(part)]
    return dotted(parts)


def path_meant(path: Path) -> str:
    """The beginning of a hint to the file or folder of a similar name beside a missing one; else no text."""
    from difflib import get_close_matches  # imported for errors only

    try:
        beside = [one.name for one in path.parent.iterdir()]
    except OSError:
        return ""
    near = get_close_matches(path.name, beside, n=1, cutoff=0.8)
    return f"Did you mean {path.parent / near[0]}? " if near else ""


def dotted(parts: Iterator[str] | tuple[str, ...] | list[str]) -> str:
    """Keys as one path, shortened in the middle."""
    path = ".".join(parts)
    return path if len(path) <= SHOWN else f"{path[: SHOWN // 2]}…{path[-SHOWN // 4 :]}"


def shown(value: object) -> str:
    """A value in the form for an error message."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
