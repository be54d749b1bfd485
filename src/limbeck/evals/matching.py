"""Does a completion give the expected answer? Three ways to tell."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction

from limbeck.core.errors import RecipeError

PATTERN_SECONDS = 10.0
"""How long a pattern may take over all completions of a task, besides 10 ms for each."""

_NUMBER = re.compile(
    r"""
    (?<![A-Za-z0-9_])(?<![0-9]\.)              # not inside of a word or of another number
    (?:(?<![\w)\]%])(?P<sign>[-\u2212+]))?    # after a digit or bracket a minus subtracts
    [$\u20ac\u00a3\u00a5]?
    (?(sign)|(?P<late>(?<=[$\u20ac\u00a3\u00a5])[-\u2212+])?)          # $-5
    (?:
      (?P<whole>[0-9]+)[ ](?P<top>[0-9]+)/(?P<bottom>[0-9]+)           # 1 1/2
    | (?P<over>[0-9]+)[ ]?/[ ]?(?P<under>[0-9]+)                       # 3/4
    | (?P<plain>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)
      (?P<power>[eE][+-]?[0-9]{1,3}(?![0-9A-Za-z]))?
    )
    """,
    re.VERBOSE,
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{\s*([0-9]+)\s*\}\{\s*([0-9]+)\s*\}")
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
    (`H2O`) are part of a word.

    >>> last_number("She pays 3 x $400 = $1,200.00.")
    Fraction(1200, 1)
    >>> last_number("from 5 to -0.75%")
    Fraction(-3, 4)
    """
    text = _LATEX_FRACTION.sub(r" \1/\2", text)
    found: Fraction | None = None
    for match in _NUMBER.finditer(text):
        value = _value(match)
        found = value if value is not None else found
    return found


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
pattern, texts = json.load(sys.stdin)
found = (re.search(pattern, text) for text in texts)
json.dump([match and match[1] for match in found], sys.stdout)
"""


def captures(
    pattern: str, completions: Sequence[str], *, limit_seconds: float = PATTERN_SECONDS
) -> list[str | None]:
    """What the pattern's group catches at its first match in each text; None without a match.

    It runs in a Python process of its own, because a pattern that backtracks without end cannot
    be stopped from within: `re` has no time limit.

    Raises:
        RecipeError: the time is up.
    """
    limit_seconds += 0.01 * len(completions)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([pattern, list(completions)]),  # ASCII, lone surrogates too
            capture_output=True,
            encoding="ascii",
            timeout=limit_seconds,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise RecipeError(
            "pattern",
            f"{pattern!r} needs more than {limit_seconds:.0f} s on the completions; repeats "
            "inside of repeats, such as (a+)+, backtrack without end",
        ) from None
    return json.loads(done.stdout)
