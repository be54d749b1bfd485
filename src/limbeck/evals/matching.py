"""What an answer is in a text, and when two are the same: numbers, patterns, JSON."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from limbeck.core.errors import RecipeError
from limbeck.evals.child import bare_environment

PATTERN_SECONDS = 10.0
"""How long a pattern may take over all completions of a task, besides 10 ms for each."""

_NUMBER = re.compile(
    r"""
    (?<![A-Za-z0-9_])(?<![0-9]\.)              # not inside of a word or of another number
    (?:(?<![\w)\]%])(?P<sign>[-\u2212\u2013+]))?  # after a digit or bracket a minus subtracts
    [$\u20ac\u00a3\u00a5]?
    (?(sign)|(?P<late>(?<=[$\u20ac\u00a3\u00a5])[-\u2212\u2013+])?)    # $-5
    (?:
      (?P<whole>[0-9]+)[ ](?P<top>[0-9]+)/(?P<bottom>[0-9]+)           # 1 1/2
    | (?P<over>[0-9]+)[ ]?/[ ]?(?P<under>[0-9]+)                       # 3/4
    | (?P<plain>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)
      (?P<power>[eE][+-]?[0-9]{1,3}(?![0-9A-Za-z]))?
    )
    """,
    re.VERBOSE,
)
_LATEX_FRACTION = re.compile(
    r"\\[cdt]?frac\s*(?:\{\s*([-\u2212]?[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9])(?![0-9]))"
)
_LATEX_COMMA = re.compile(r"(?<=[0-9])(?:\{,\}|\\,|,?\\!)\s?(?=[0-9]{3}(?![0-9]))")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z}])\^\{?[-\u2212]?[0-9]+\}?")
_DIGITS = 1000
"""A longer number is taken for noise: exact arithmetic on it would cost more than it tells."""


def same_text(completion: str, answer: str) -> bool:
    """Equal but for white space: runs of it count as one space, and none at the ends.

    >>> same_text(" Paris\\n", "Paris")
    True
    """
    return completion.split() == answer.split()


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly; None where there is none.

    Understands thousands' commas, a currency sign before the digits, a full stop or a unit behind
    them, decimals, fractions (`3/4`, `1 1/2`, LaTeX's `frac`), powers of ten (`1e6`) and signs. A
    minus behind a digit or a bracket is a subtraction or a range. Digits that follow a letter
    (`H2O`) are part of a word, and so is the power of a unit (`cm^2`).

    >>> last_number("She pays 3 x $400 = $1,200.00.")
    Fraction(1200, 1)
    >>> last_number("from 5 to -0.75%")
    Fraction(-3, 4)
    """
    text = _LATEX_COMMA.sub("", _UNIT_POWER.sub("", text))
    text = _LATEX_FRACTION.sub(_slashed, text)
    found: Fraction | None = None
    for match in _NUMBER.finditer(text):
        value = _value(match)
        found = value if value is not None else found
    return found


def _slashed(match: re.Match[str]) -> str:
    """A fraction of LaTeX as `1/2`, apart from a number before it but not from its sign."""
    before = match.string[max(0, match.start() - 1) : match.start()]
    apart = "" if before in ("-", "+", "\u2212", "\u2013") else " "
    return f"{apart}{match[1] or match[2]}/{match[3] or match[4]}"


def _value(match: re.Match[str]) -> Fraction | None:
    part = match.groupdict()
    if len(match[0]) > _DIGITS:
        return None
    negative = (part["sign"] or part["late"] or "+") != "+"
    if part["whole"] is not None:
        top, bottom = int(part["top"]), int(part["bottom"])
        if bottom == 0 or top >= bottom:  # "2 3/1" is no mixed number; what stands last counts
            return Fraction(top, bottom) if bottom else None
        value = int(part["whole"]) + Fraction(top, bottom)
    elif part["over"] is not None:
        if int(part["under"]) == 0:
            return None
        value = Fraction(int(part["over"]), int(part["under"]))
    else:
        value = Fraction(part["plain"].replace(",", "") + (part["power"] or ""))
    return -value if negative else value


def check_pattern(pattern: str) -> None:
    """Refuse a pattern that is not one or has not exactly one group.

    Raises:
        RecipeError: with what is wrong.
    """
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise RecipeError("pattern", f"not a regular expression: {error}") from None
    if groups != 1:
        raise RecipeError(
            "pattern",
            f"has {groups} groups; mark the answer with one, such as '####\\s*(-?\\d+)', "
            "and write others as (?:...)",
        )


_CHILD = """
import json, re, sys
pattern, last, texts = json.load(sys.stdin)
def one(text):
    match = None
    for match in re.finditer(pattern, text):
        if not last:
            break
    return match and [*match.span(), *match.span(1)]
json.dump([one(text) for text in texts], sys.stdout)
"""

Place = tuple[int, int, int, int]
"""Where a match begins and ends, and where its group does; -1 for a group that took no part."""


def places(
    pattern: str,
    completions: Sequence[str],
    *,
    last: bool = False,
    limit_seconds: float = PATTERN_SECONDS,
) -> list[Place | None]:
    """Where the pattern first (or `last`) matches in each text; None without a match.

    It runs in a Python process of its own, because a pattern that backtracks without end cannot
    be stopped from within: `re` has no time limit.

    Raises:
        RecipeError: the time is up.
    """
    limit_seconds += 0.01 * len(completions)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([pattern, last, list(completions)]),  # ASCII, lone surrogates too
            capture_output=True,
            encoding="ascii",
            timeout=limit_seconds,
            check=True,
            env=bare_environment(),
        )
    except subprocess.TimeoutExpired:
        raise RecipeError(
            "pattern",
            f"{pattern!r} needs more than {limit_seconds:.0f} s on the completions; repeats "
            "inside of repeats, such as (a+)+, backtrack without end",
        ) from None
    return [None if found is None else tuple(found) for found in json.loads(done.stdout)]


def captures(
    pattern: str, completions: Sequence[str], *, limit_seconds: float = PATTERN_SECONDS
) -> list[str | None]:
    """What the pattern's group catches at its first match in each text; None without a match.

    Raises:
        RecipeError: the time is up.
    """
    found = places(pattern, completions, limit_seconds=limit_seconds)
    return [
        None if place is None or place[2] < 0 else text[place[2] : place[3]]
        for text, place in zip(completions, found, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Json:
    """A value as JSON has it, compared strictly.

    The order of keys does not count. 1 and 1.0 are the same number; `true` and "1" are none. Lists
    keep their order. Objects must have the same keys.

    >>> Json({"a": 1, "b": [True]}) == Json({"b": [True], "a": Decimal("1.0")})
    True
    >>> Json({"a": "1"}) == Json({"a": 1})
    False
    """

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Json) and _same_json(self.value, other.value)

    __hash__ = None  # type: ignore[assignment]  # values hold lists

    def __str__(self) -> str:
        return json.dumps(self.value, ensure_ascii=False, sort_keys=True, default=_plain_number)


def _plain_number(value: Decimal) -> float:
    return float(value)


def _same_json(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same_json, a, b))
    numbers = [isinstance(v, int | Decimal) and not isinstance(v, bool) for v in (a, b)]
    return a == b if all(numbers) or type(a) is type(b) else False


def read_json(text: str) -> Json | None:
    """A text that is one JSON value; None where it is not, or where an object has a key twice.

    NaN and infinity are no JSON, nor what is nested more than `DEEPEST` deep. Numbers are exact.
    """
    text = text.strip()
    try:
        value, end = _decoded(text, 0)
    except (ValueError, RecursionError):
        return None
    return Json(value) if end == len(text) else None


def json_in(text: str) -> tuple[Json, ...]:
    """The JSON of a completion: all of it, or its fenced blocks, or objects and lists within it.

    What stands within broken JSON, such as a call that was cut off, is not taken for the whole.

    >>> [str(found) for found in json_in('I call {"city": "Bonn"} now.')]
    ['{"city": "Bonn"}']
    """
    whole = read_json(text)
    if whole is not None:
        return (whole,)
    blocks = re.findall(r"```[a-zA-Z]*[ \t]*\n(.*?)```", text, re.DOTALL)
    fenced = [value for block in blocks if (value := read_json(block)) is not None]
    return tuple(fenced) if fenced else tuple(_scattered(text))


def _scattered(text: str) -> Iterator[Json]:
    place, attempts = 0, 0
    while (found := _OPENING.search(text, place)) is not None and attempts < _ATTEMPTS:
        try:
            value, place = _decoded(text, found.start())
        except (ValueError, RecursionError):
            place, attempts = _behind(text, found.start()), attempts + 1
            continue
        yield Json(value)


def _behind(text: str, start: int) -> int:
    """Where to go on behind a bracket that opens no JSON: at its end if JSON was meant."""
    if _MEANT.match(text, start) is None:
        return start + 1
    depth = 0
    for part in _BRACKET_OR_STRING.finditer(text, start):
        depth += (part[0] in "{[") - (part[0] in "}]")
        if depth == 0:
            return part.end()
    return len(text)


def _decoded(text: str, start: int) -> tuple[Any, int]:
    """The value that starts there, and its end."""
    value, end = _DECODER.raw_decode(text, start)
    if not _within(value, DEEPEST):
        raise ValueError("it is too deep to be compared")
    return value, end


def _within(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_within(one, depth - 1) for one in inner)


_OPENING = re.compile(r"[{\[]")
_MEANT = re.compile(r"""\{\s*(?:["']|\w+\s*:)|\[\s*[\[{"']""")
_BRACKET_OR_STRING = re.compile(r'[{}\[\]]|"(?:[^"\\]|\\.)*+"?', re.DOTALL)
DEEPEST = 100
"""Lists and objects within each other; comparing deeper ones could exhaust Python's stack."""
_ATTEMPTS = 50
"""Brackets that open no JSON; each costs a look at the rest of the text."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key stands twice")
    return made


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _exact(number: str) -> Decimal:
    try:
        return Decimal(number)
    except InvalidOperation:
        raise ValueError("its exponent is too large") from None


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_float=_exact, parse_constant=_refused)
