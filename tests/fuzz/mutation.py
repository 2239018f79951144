"""Changes that keep most of an input valid, so that what is wrong gets far."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

# Texts that are replaced in the finished JSON or YAML by what no value of Python spells.
DIGITS, DEEP, OPEN = "@digits@", "@deep@", "@open@"
SPELLED = {DIGITS: "9" * 5_000, DEEP: "[" * 5_000 + "]" * 5_000, OPEN: "[" * 300}
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 2**31, 2**32, 2**62, 2**63, 2**64, 10**9, 10**30, 10**400),
    *(0.0, -0.5, 0.3, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "x",
        "1",
        "true",
        "null",
        " ",
        "a.b.c",
        "\0",
        "\ud800",
        "\x1b]0;owned\x07\x1b[2J",
        "\u2028",
        "ß" * 200,
    ),
    *(
        "../../../etc/passwd",
        "/etc/passwd",
        "~",
        "a/b",
        "a" * 300,
        "x" * 100_000,
        "{{ 1 }}",
        "%s",
        "org/name",
    ),
    *([], {}, [[]], [1], ["x"], [None], {"a": 1}, {"": None}, [1, [2, [3]]], [0] * 10_000),
    *(DIGITS, DEEP, OPEN),
)


def spelled(text: str) -> str:
    """The finished text of a mutated value."""
    for mark, meaning in SPELLED.items():
        text = text.replace(f'"{mark}"', meaning).replace(mark, meaning)
    return text


def as_json(value: Any) -> bytes:
    """A mutated value as JSON, or as what looks like it."""
    return spelled(json.dumps(value)).encode("utf-8", "surrogatepass")


def mutated(chance: random.Random, value: Any, times: int = 2) -> Any:
    """A copy of nested values with one to `times` changes in it."""
    box = [copy.deepcopy(value)]
    for _ in range(chance.randint(1, times)):
        places = list(_places(box))
        if places:
            holder, key = chance.choice(places)
            chance.choice(CHANGES)(chance, holder, key)
    return box[0] if box else None


def _places(holder: Any) -> list[tuple[Any, Any]]:
    """Every place of nested values; of long lists the first and the last."""
    keys = list(holder) if isinstance(holder, dict) else range(len(holder))
    keys = [*keys[:20], *keys[-3:]] if len(keys) > 23 else keys
    below = [place for key in keys if isinstance(holder[key], dict | list) for place in _places(holder[key])]
    return [(holder, key) for key in keys] + below


def _replace(chance: random.Random, holder: Any, key: Any) -> None:
    holder[key] = copy.deepcopy(chance.choice(HOSTILE))


def _delete(chance: random.Random, holder: Any, key: Any) -> None:
    del holder[key]


def _rename(chance: random.Random, holder: Any, key: Any) -> None:
    if isinstance(holder, dict):
        holder[chance.choice(("", "later", "\x1b[2J", "a" * 300, f"{key}_"))] = holder.pop(key)


def _add(chance: random.Random, holder: Any, key: Any) -> None:
    value = copy.deepcopy(chance.choice(HOSTILE))
    if isinstance(holder, dict):
        holder[chance.choice(("later", "added", "name"))] = value
    else:
        holder.insert(chance.randint(0, len(holder)), value)


def _wrap(chance: random.Random, holder: Any, key: Any) -> None:
    holder[key] = chance.choice(([holder[key]], {"value": holder[key]}, [holder[key]] * 2, str(holder[key])))


def _swap(chance: random.Random, holder: Any, key: Any) -> None:
    other = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key], holder[other] = holder[other], holder[key]


def _bend(chance: random.Random, holder: Any, key: Any) -> None:
    value = holder[key]
    if isinstance(value, str):
        holder[key] = chance.choice((value * 2, value[:-1], value.upper(), value + "\0", value[::-1]))
    elif isinstance(value, int | float):
        holder[key] = chance.choice((value + 1, value - 1, -value, value * 2, value * 1_000_003, str(value)))
    elif isinstance(value, list):
        holder[key] = chance.choice((value[:-1], value * 2, value[::-1], dict(enumerate(map(str, value)))))
    else:
        holder[key] = list(value.items()) if isinstance(value, dict) else 0


CHANGES: tuple[Callable[[random.Random, Any, Any], None], ...] = (
    *(_replace, _replace, _replace, _delete, _rename, _add, _wrap, _swap, _bend, _bend),
)


def broken(chance: random.Random, content: bytes) -> bytes:
    """Bytes with bits flipped, a part cut out, doubled or overwritten; most of it as it was."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at = (
            chance.randrange(len(data) + 1)
            if chance.random() < 0.5
            else chance.randrange(min(len(data), 400) + 1)
        )
        size = chance.choice((1, 2, 4, 8, 8, 100))
        match chance.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = data[at : at + size]
            case 4:
                data[at : at + size] = bytes([chance.choice((0, 1, 0x7F, 0x80, 0xFF))]) * size
            case _:
                data[at:at] = chance.choice(
                    (b"\0", b"\xff\xfe", b"[" * 2_000, b'"', b"{", b"\xed\xa0\x80", b"\n")
                )
    return bytes(data)
