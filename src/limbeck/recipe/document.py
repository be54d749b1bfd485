"""YAML that a person wrote, read so that every error can name its line.

Only plain YAML is accepted: no tags (they could build objects), no anchors (they could unfold to
gigabytes), no key twice (the second would win in silence).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from limbeck.core.errors import RecipeError
from limbeck.core.text import one_line

LARGEST_BYTES = 2**20
DEEPEST = 20
PLAIN = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Document:
    """Plain values, and the line of each dotted path such as `terms.0.weight`.

    A path that was given on the command line has no line.
    """

    values: Mapping[str, Any]
    lines: Mapping[str, int]
    file: str | None = None

    def error(self, field: str, reason: str) -> RecipeError:
        """An error at a field: its own line, or that of the nearest field around it."""
        path = field
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        if self.lines.get(path) == 0:
            return RecipeError(field, f"{reason} (given on the command line)")
        return RecipeError(field, reason, self.file, self.lines.get(path))


def read(path: Path) -> Document:
    """Read a recipe's file.

    Raises:
        RecipeError: it cannot be read or is not plain YAML.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError("", error.strerror or "cannot be read", str(path)) from error
    if len(data) > LARGEST_BYTES:
        raise RecipeError("", f"{len(data):,} bytes are too many for a recipe", str(path))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise RecipeError("", "not UTF-8 text", str(path)) from None
    return parse(text, str(path))


def parse(text: str, file: str | None = None) -> Document:
    """Parse YAML text; the errors are those of `read`."""
    try:
        node = yaml.compose(text, Loader=_NoAliases)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise RecipeError("", f"not YAML: {error.problem or error.context}", file, line) from None
    except yaml.YAMLError as error:
        raise RecipeError("", f"not YAML: {one_line(error)}", file) from None
    except RecursionError:
        raise RecipeError("", f"nested deeper than {DEEPEST} levels", file) from None
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError("", "a recipe is a mapping of `student:`, `terms:` and so on", file)
    lines: dict[str, int] = {}
    return Document(_build(node, "", file, lines), lines, file)


def override(document: Document, settings: Iterable[str]) -> Document:
    """The document with `key.sub=value` settings from the command line.

    Values are YAML, so `train.steps=10` is a number and `evals=[agreement]` a list.

    Raises:
        RecipeError: a setting has no `=`, or its path leads through something without parts.
    """
    values, lines = _copy(document.values), dict(document.lines)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise RecipeError("", f"{setting!r} is not a setting such as train.steps=10")
        value = _setting(path, text)
        *parents, last = path.split(".")
        inner: Any = values
        for depth, key in enumerate(parents):
            if isinstance(inner, dict):
                inner = _opened(inner, key)
            elif isinstance(inner, list) and (index := _index(key, inner)) is not None:
                inner = _opened(inner, index)
            else:
                raise RecipeError(path, f"there is no {'.'.join(parents[: depth + 1])} to set")
        if isinstance(inner, dict):
            inner[last] = value
        elif isinstance(inner, list) and (index := _index(last, inner)) is not None:
            inner[index] = value
        else:
            raise RecipeError(path, "there is no such place to set")
        # What stood below this place in the file is gone, and so are its lines.
        lines = {at: line for at, line in lines.items() if not at.startswith(f"{path}.")}
        lines[path] = 0
    return Document(values, lines, document.file)


def _opened(outer: Any, key: Any) -> Any:
    """The part under a key or an index, in which something is to be set."""
    inner = outer.get(key) if isinstance(key, str) else outer[key]
    if inner is None:  # absent, or left empty
        outer[key] = {}
    elif isinstance(inner, str) and (key == "objective" or isinstance(key, int)):  # a bare kind
        outer[key] = {"kind": inner}
    return outer[key]


def _setting(path: str, text: str) -> Any:
    """The value of one setting; its errors name the field that it would set."""
    try:
        values = parse(f"value: {text}").values
    except RecipeError as error:
        field = path + error.field.removeprefix("value")
        raise RecipeError(field, f"{error.reason} (given on the command line)") from None
    if len(values) > 1:
        raise RecipeError(path, "one value is wanted (given on the command line)")
    return values["value"]


def _index(key: str, items: list[Any]) -> int | None:
    """The place in a list that a part of a path names; only plain digits do."""
    known = {str(index): index for index in range(len(items))}
    return known.get(key)


class _NoAliases(yaml.SafeLoader):
    """Refuses anchors and aliases while composing, before anything can unfold."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not allowed; write the value out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


def _build(node: Any, path: str, file: str | None, lines: dict[str, int]) -> Any:
    line = node.start_mark.line + 1
    lines[path] = line
    if path.count(".") >= DEEPEST:
        raise RecipeError(path, f"nested deeper than {DEEPEST} levels", file, line)
    kinds = ("str", "int", "float", "bool", "null", "map", "seq")
    if node.tag not in {PLAIN + kind for kind in kinds}:
        kind = node.tag.removeprefix(PLAIN)
        raise RecipeError(path, f"{kind!r} is not a plain value; quote it", file, line)
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != PLAIN + "str":
                raise RecipeError(path, "keys must be plain words", file, place)
            key = key_node.value
            inner = f"{path}.{key}" if path else key
            if key in result:
                raise RecipeError(inner, "is given twice", file, place)
            result[key] = _build(value_node, inner, file, lines)
            lines[inner] = place
        return result
    if isinstance(node, yaml.SequenceNode):
        return [
            _build(item, f"{path}.{index}" if path else str(index), file, lines)
            for index, item in enumerate(node.value)
        ]
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (ValueError, KeyError, yaml.YAMLError):  # KeyError: `!!bool maybe`
        raise RecipeError(path, f"{node.value!r:.40} cannot be read", file, line) from None


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
