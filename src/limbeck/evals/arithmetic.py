"""Sums as people write them into their reasoning: what comes out, and whether it is true.

Nothing is evaluated by Python: an expression is numbers, `+ - * /` and brackets, and exact.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

LONGEST = 500
"""Characters of an expression; a longer one is noise."""

DEEPEST = 50
"""Brackets within brackets."""

_CURRENCY = "$\u20ac\u00a3\u00a5"
_NUMBER = rf"[{_CURRENCY}]?(?>[0-9]{{1,3}}(?:,[0-9]{{3}})+(?![0-9])|[0-9]+)(?>(?:\.[0-9]+)?)%?"
_OPERATOR = "[-+*/x\u00d7\u00f7\u2212]"
# Every repeat has an end, so that no text, however odd, takes long.
_TERM = rf"(?:[-\u2212]?\( ?){{0,5}}[-\u2212]?{_NUMBER}(?: ?\)){{0,5}}"
_EXPRESSION = rf"{_TERM}(?: ?{_OPERATOR} ?{_TERM}){{0,20}}+"
_FRACTION = "[0-9]{1,9}/[0-9]"
_CHAIN = re.compile(
    rf"(?<![\w.)])(?<!{_OPERATOR})(?<!{_OPERATOR} )"  # not in the middle of a longer one
    rf"(?<![0-9]:)(?!(?<=[0-9] ){_FRACTION})"  # nor of a time of day or of a mixed number
    rf"{_EXPRESSION}(?: ?= ?{_EXPRESSION}){{1,10}}(?!\w| {_FRACTION})"
)
_BULLET = re.compile(r"(?m)^[ \t]{0,20}[-*+] {1,3}")
_ASKED_INSIDE = re.compile(r"= ?\$?<<[^<>\n=]{1,200}=([^<>\n=]{1,100})>>[0-9.,]{0,100}")
_ASKED = re.compile(r"<<([^<>\n]{1,300})>>[0-9.,]{0,100}")
_TOKEN = re.compile(rf"\s*({_NUMBER}|{_OPERATOR}|[()])")
_SAME = str.maketrans({"x": "*", "\u00d7": "*", "\u00f7": "/", "\u2212": "-"})


def arithmetic(text: str) -> Fraction | None:
    """The exact value of an expression of numbers, `+ - * /` and brackets; None where it is none.

    Thousands' commas, currency signs and percent are read; `x`, the multiplication and the division
    sign and the long minus too.

    >>> arithmetic("(84 / 2) - 1.5")
    Fraction(81, 2)
    >>> arithmetic("9 x $1,000")
    Fraction(9000, 1)
    >>> arithmetic("2 * x") is None
    True
    """
    text = text.strip()
    tokens: list[str] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None or len(text) > LONGEST:
            return None
        tokens.append(match[1].translate(_SAME) if len(match[1]) == 1 else match[1])
        place = match.end()
    try:
        value, rest = _sum(tokens, 0, 0)
    except (ValueError, ZeroDivisionError):
        return None
    return value if rest == len(tokens) else None


def _sum(tokens: list[str], place: int, depth: int) -> tuple[Fraction, int]:
    """The value of a sum from a token on, and the token behind it."""
    value, place = _product(tokens, place, depth)
    while place < len(tokens) and tokens[place] in "+-":
        sign = tokens[place]
        right, place = _product(tokens, place + 1, depth)
        value = value + right if sign == "+" else value - right
    return value, place


def _product(tokens: list[str], place: int, depth: int) -> tuple[Fraction, int]:
    value, place = _factor(tokens, place, depth)
    while place < len(tokens) and tokens[place] in "*/":
        sign = tokens[place]
        right, place = _factor(tokens, place + 1, depth)
        value = value * right if sign == "*" else value / right
    return value, place


def _factor(tokens: list[str], place: int, depth: int) -> tuple[Fraction, int]:
    if place >= len(tokens) or depth > DEEPEST:
        raise ValueError("no number")
    token = tokens[place]
    if token == "-":
        value, place = _factor(tokens, place + 1, depth + 1)
        return -value, place
    if token == "(":
        value, place = _sum(tokens, place + 1, depth + 1)
        if place >= len(tokens) or tokens[place] != ")":
            raise ValueError("a bracket stays open")
        return value, place + 1
    return _number(token), place + 1


def _number(token: str) -> Fraction:
    value = Fraction(token.strip(_CURRENCY + "%").replace(",", ""))
    return value / 100 if token.endswith("%") else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Equation:
    """`left = right` in a text, both without spaces and signs of currency, and whether it holds."""

    left: str
    right: str
    true: bool

    def __str__(self) -> str:
        return f"{self.left}={self.right}"


def equations(text: str) -> tuple[Equation, ...]:
    """All equations of numbers in a text, in order; one with no operation in it does not count.

    `a = b = c` is two. One is true where both sides are equal, or where the right side is a decimal
    number, or per cent with decimals, to which the left one rounds. One that begins or ends in a
    mixed number (`1 1/2`), or begins in a time of day, is left out. What a calculator was asked, as
    `<<3*4=12>>`, is one too; repeated right behind each other, as in `3*4 = <<3*4=12>>12`, it
    counts once.

    >>> [str(equation) for equation in equations("So 16 - 3 - 4 = 9 eggs, 9 x $2 = $18.")]
    ['16-3-4=9', '9*2=18']
    >>> [equation.true for equation in equations("1 / 3 = 0.33 and 2 + 2 = 5")]
    [True, False]
    """
    text = _ASKED_INSIDE.sub(r"= \1 ", _BULLET.sub("", text))
    text = _ASKED.sub(r" \1 ", text)
    found: list[Equation] = []
    for match in _CHAIN.finditer(text):
        sides = _sides(match[0])
        for left, right in pairwise(sides):
            operations = re.search(r"[0-9)%][-+*/]", f"{left} {right}")
            true = _holds(left, right)
            if operations and true is not None:
                found.append(Equation(left=left, right=right, true=true))
    return tuple(found)


def _sides(chain: str) -> list[str]:
    """What stands between the equals signs, without the brackets of the sentence around it."""
    sides = [_plain(side) for side in chain.split("=")]
    while sides[0].startswith("(") and sides[0].count("(") > sides[0].count(")"):
        sides[0] = sides[0][1:]
    while sides[-1].endswith(")") and sides[-1].count(")") > sides[-1].count("("):
        sides[-1] = sides[-1][:-1]
    return sides


def _plain(side: str) -> str:
    signs = str.maketrans("", "", _CURRENCY + ", ")
    return side.translate(_SAME).translate(signs)


def _holds(left: str, right: str) -> bool | None:
    """Whether both sides are equal; None where one has no value."""
    a, b = arithmetic(left), arithmetic(right)
    if a is None or b is None:
        return None
    shown = re.fullmatch(r"-?[0-9]+\.([0-9]+)(%?)", right)
    slack = Fraction(1, 2 * 10 ** (len(shown[1]) + 2 * len(shown[2]))) if shown else 0
    return abs(a - b) <= slack
