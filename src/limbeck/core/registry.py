"""Open slots: a recipe's `kind: NAME` finds a class here, and other packages can add theirs.

A package registers by calling `register`, or by naming an entry point in the group
`limbeck.SLOT` (for example `limbeck.objective`), which is loaded when the name is first asked for.
"""

import difflib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TypeVar

Kind = TypeVar("Kind", bound=type)
_kinds: dict[str, dict[str, type]] = {}


def register(slot: str, name: str) -> Callable[[Kind], Kind]:
    """Class decorator: `@register("objective", "forward_kl")`."""

    def add(cls: Kind) -> Kind:
        taken = _kinds.setdefault(slot, {}).setdefault(name, cls)
        if taken is not cls:
            raise ValueError(f"{slot} kind {name!r} is already {taken.__qualname__}")
        cls.kind = name
        return cls

    return add


def kinds(slot: str) -> dict[str, type]:
    """All classes of a slot by name, those of installed plug-ins included."""
    found = _kinds.setdefault(slot, {})
    for point in entry_points(group=f"limbeck.{slot}"):
        if point.name not in found:
            found[point.name] = point.load()
    return dict(sorted(found.items()))


def did_you_mean(name: str, options: list[str], otherwise: str | None = None) -> str:
    """Which option may be meant; where none is near, `otherwise`, or by default all of them.

    >>> did_you_mean("forwrad_kl", ["forward_kl", "reverse_kl"])
    "did you mean 'forward_kl'?"
    >>> did_you_mean("x", ["forward_kl", "reverse_kl"])
    'one of: forward_kl, reverse_kl'
    """
    near = difflib.get_close_matches(name, options, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return "one of: " + ", ".join(sorted(options)) if otherwise is None else otherwise
