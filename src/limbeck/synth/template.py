"""Texts with `{named}` places: requests of steps, ours or a user's, and how they are filled."""

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from limbeck.core.errors import RecipeError
from limbeck.core.registry import did_you_mean

PLACE = re.compile(r"\{([a-z]+)\}")


def filled(template: str, **texts: str) -> str:
    """A template with a text at each place; what stands in a text is never taken for a place.

    >>> filled("{a} and {b}", a="{b}", b="two")
    '{b} and two'
    """
    return PLACE.sub(lambda match: texts.get(match[1], match[0]), template)


def ours(name: str) -> str:
    """The text of a template that comes with the package.

    >>> "{instruction}" in ours("evolve_deepen")
    True
    """
    place = files("limbeck.synth").joinpath("templates", f"{name}.txt")
    return place.read_text(encoding="utf-8")


def template(
    path: str | None, name: str, folder: Path, places: Sequence[str], field: str = "template"
) -> str:
    """`template_text` of a user's file, or of ours with this name."""
    return template_text(path, ours(name), folder, places, field)


def template_text(
    path: str | None, default: str, folder: Path, places: Sequence[str], field: str = "template"
) -> str:
    """A template's text: a user's file, or the default; each place must be in it, and no other.

    Args:
        path: of the user's file, from `folder` where it is relative; None takes the default.
        default: a text of ours, which is not checked.
        folder: where the recipe's relative paths start.
        places: the names between braces.
        field: of the recipe, for messages.

    Raises:
        RecipeError: the file cannot be read, lacks a place, or has an unknown one.
    """
    if path is None:
        return default
    try:
        text = (folder / path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(field, f"{path}: {reason}") from None
    found = set(PLACE.findall(text))
    if missing := [name for name in places if name not in found]:
        raise RecipeError(field, f"{path}: has no place {{{missing[0]}}}")
    if unknown := sorted(found - set(places)):
        hint = did_you_mean(unknown[0], list(places))
        raise RecipeError(field, f"{path}: unknown place {{{unknown[0]}}}; {hint}")
    return text
