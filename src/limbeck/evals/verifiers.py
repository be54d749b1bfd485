"""Is an answer right? One contract for evaluations and for steps that make data.

A verdict is `right`, `wrong`, or `unclear`: there is no answer in the text, or it says two things.
Whoever trains on what is right had better lose a right answer than learn a wrong one, so everything
that can be read in two ways is unclear.
"""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal, cast

from pydantic import Field

from limbeck.core.errors import RecipeError
from limbeck.evals import matching
from limbeck.evals.arithmetic import arithmetic
from limbeck.evals.choices import chosen, options_in, same_option
from limbeck.evals.math_pool import SECONDS, pool

Match = Literal["exact", "last_number", "regex", "choice", "math", "json", "arithmetic"]
"""`exact` compares whole texts but for white space; `last_number` the last number of both by value,
that of the text behind "answer is" where it says so; `regex` the text that the group of `pattern`
catches at its first match; `choice` the option that is chosen, by letter or text, where the options
stand in the prompt or are not known; `math` what math-verify reads as mathematics; `json` values;
`arithmetic` the values of two expressions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a verifier says of a text.

    Attributes:
        verdict: `right`, `wrong` or `unclear`.
        found: the answer as it was read; None where none was.
        reason: why it is unclear.
    """

    verdict: Literal["right", "wrong", "unclear"]
    found: str | None = None
    reason: str = ""

    @property
    def right(self) -> bool:
        """Whether it is right."""
        return self.verdict == "right"


@dataclass(frozen=True, kw_only=True)
class Verifier:
    """Compares what texts answer with known answers.

    Attributes:
        match: how; see `Match`.
        pattern: for `regex`, with one group.
        seconds: how long a comparison by `math` may take; a longer one is unclear.
    """

    match: Match = "exact"
    pattern: str | None = None
    seconds: Annotated[float, Field(gt=0, le=600)] = SECONDS

    def __post_init__(self) -> None:
        if (self.pattern is not None) != (self.match == "regex"):
            raise RecipeError("pattern", "goes with `match: regex`, and only with it")
        if self.pattern is not None:
            matching.check_pattern(self.pattern)
        if self.match == "math" and importlib.util.find_spec("math_verify") is None:
            raise RecipeError("match", "math needs math-verify: pip install 'limbeck[synth]'")

    def check(self, text: str, answer: str, question: str = "") -> Verdict:
        """The verdict on one text; see `check_all`."""
        return self.check_all([text], [answer], [question])[0]

    def check_all(
        self, texts: Sequence[str], answers: Sequence[str], questions: Sequence[str] = ()
    ) -> list[Verdict]:
        """The verdicts on texts, in order. Faster than one by one for `regex` and `math`.

        Args:
            texts: what was written.
            answers: the known answer to each.
            questions: what was asked; `choice` finds the options in it.

        Raises:
            RecipeError: the pattern backtracks without end, or a package is missing.
        """
        asked = questions or [""] * len(texts)
        if self.match == "regex":
            assert self.pattern is not None
            found = matching.captures(self.pattern, texts)
            return [_caught(text, answer) for text, answer in zip(found, answers, strict=True)]
        if self.match == "math":
            return self._mathematics(texts, answers)
        check = {
            "exact": _exact,
            "last_number": _last_number,
            "choice": _choice,
            "json": _json,
            "arithmetic": _arithmetic,
        }[self.match]
        return [check(*each) for each in zip(texts, answers, asked, strict=True)]

    def problem_with(self, answer: str) -> str | None:
        """Why an answer cannot be the known one; None where it can."""
        if self.match == "last_number" and matching.last_number(answer) is None:
            return "has no number"
        if self.match == "arithmetic" and arithmetic(answer) is None:
            return "is no expression of numbers"
        if self.match == "json" and matching.read_json(answer) is None:
            return "is not JSON"
        return None if answer.strip() or self.match == "exact" else "is empty"

    def _mathematics(self, texts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """Without asking math-verify where a look is enough; what is left, all together."""
        seen = [_at_a_look(text, answer) for text, answer in zip(texts, answers, strict=True)]
        pairs = [
            (_in_dollars(answer), _readable(text))
            for text, answer, verdict in zip(texts, answers, seen, strict=True)
            if verdict is None
        ]
        replies = iter(pool().check_all(pairs, self.seconds))
        return [verdict or _of_reply(next(replies)) for verdict in seen]


def _of_reply(reply: Mapping[str, str]) -> Verdict:
    said = cast(Literal["right", "wrong", "unclear"], reply["verdict"])
    return Verdict(verdict=said, found=reply.get("found"), reason=reply.get("reason", ""))


def _exact(text: str, answer: str, question: str) -> Verdict:
    del question
    right = matching.same_text(text, answer)
    return _told(right, " ".join(text.split())) if text.strip() or right else _EMPTY


def _caught(text: str | None, answer: str) -> Verdict:
    if text is None:
        return Verdict(verdict="unclear", reason="the pattern does not match")
    return _told(matching.same_text(text, answer), text)


def _last_number(text: str, answer: str, question: str) -> Verdict:
    del question
    number = _number(_signed(text))
    if number is None:
        return Verdict(verdict="unclear", reason="it has no number")
    if (doubt := _doubt(text, answer)) is not None:
        return Verdict(verdict="unclear", reason=doubt)
    return _told(number == matching.last_number(answer), str(number))


def _choice(text: str, answer: str, question: str) -> Verdict:
    options = options_in(question)
    choice = chosen(text, options)
    if choice.unclear:
        return Verdict(verdict="unclear", reason=choice.unclear)
    return _told(same_option(choice, answer, options), choice.letter or choice.text)


def _json(text: str, answer: str, question: str) -> Verdict:
    del question
    found = matching.json_in(text)
    if not found:
        return Verdict(verdict="unclear", reason="it has no JSON")
    if any(value != found[0] for value in found):
        return Verdict(verdict="unclear", reason="it has several values of JSON")
    return _told(found[0] == matching.read_json(answer), str(found[0]))


def _arithmetic(text: str, answer: str, question: str) -> Verdict:
    del question
    value = arithmetic(_expression(text))
    if value is None:
        return Verdict(verdict="unclear", reason="it does not end in an expression of numbers")
    return _told(value == arithmetic(answer), str(value))


_EMPTY = Verdict(verdict="unclear", reason="it is empty")


def _told(right: bool, found: str) -> Verdict:
    return Verdict(verdict="right" if right else "wrong", found=found)


# What numbers and mathematics share: where a text says its answer, and whether it says one.

_STATEMENT = re.compile(r"\banswer\s*(?:is|:|=)\s*:?|^[ \t]*A[ \t]*:", re.IGNORECASE | re.MULTILINE)
_NEGATED = re.compile(
    r"(?:\bnot|\bnever|n[\u2019']t)\s+(?:be\s+|equal(?:\s+to)?\s+)?"
    r"(?:\$|\\\(|\\\[)?\s?(?:\\boxed\{)?\s?[-+\u2212$]{0,2}[0-9]",
    re.IGNORECASE,
)
_ALTERNATIVE = re.compile(r"[0-9][^\n.;0-9]{0,30}\bor\b[^\n.;0-9]{0,20}[0-9]", re.IGNORECASE)
_SIGN_FIRST = re.compile(r"^[-\u2212\u2013]\s+(?=[$\u20ac\u00a3\u00a5]?\.?[0-9])")
_SIGN_INSIDE = re.compile(
    r"([=:({$]\s*|\bis\s+)[-\u2212\u2013]\s+(?=[$\u20ac\u00a3\u00a5]?\.?[0-9])"
)
_DIGIT = re.compile(r"[0-9]")
_ASKED_FORM = re.compile(r"####|\\boxed")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_MARKDOWN = " \t*_`"
_NEEDLESS_SPACE = re.compile(r" (?![0-9])|(?<![0-9]) | (?=[0-9]{3}(?![0-9]))")  # 1 000, not 1 1/2
_MIXED = re.compile(r"(?<![\w.,/])([0-9]+) ([0-9]+)/([0-9]+)(?![\w/])")
_MATHEMATICAL = re.compile(r"[0-9+\-*/^()\[\]=<>|{}., \u2212]{1,200}")
_FORMULA = re.compile(
    r"(?:\\(?:text|mbox|mathrm|begin|end)\{[^{}]*\}|\\[a-zA-Z]+|\\[^a-zA-Z]|[^a-zA-Z\\]"
    r"|(?<![a-zA-Z])(?!a\s+[a-zA-Z]{2})[a-zA-Z](?![a-zA-Z]))+"  # x is in it, words and "a" are not
)


def _conclusion(text: str) -> tuple[int, int, bool]:
    """Where a text says its answer, and whether behind a statement such as "the answer is".

    Without one it is the last line with a digit in it.
    """
    starts = [match.end() for match in _STATEMENT.finditer(text)]
    if starts and _DIGIT.search(text, starts[-1]):
        start = starts[-1] + len(text[starts[-1] :]) - len(text[starts[-1] :].lstrip())
        end = text.find("\n", start)
        return start, len(text) if end < 0 else end, True
    start = end = 0
    place = 0
    for line in text.splitlines(keepends=True):
        if _DIGIT.search(line):
            start, end = place + len(line) - len(line.lstrip()), place + len(line.rstrip())
        place += len(line)
    return start, end, False


def _said(text: str) -> str:
    """The conclusion alone, without the full stop and what makes it bold."""
    start, end, _ = _conclusion(text)
    return text[start:end].strip().lstrip(_MARKDOWN).rstrip(_MARKDOWN + ".")


def _number(text: str) -> Fraction | None:
    """The last number behind the last "answer is", to the line's end; else that of the whole text.

    "Answer:" is often followed by the whole solution, so there the last number counts. So it does
    where a form that is asked for comes later.
    """
    start, end, stated = _conclusion(text)
    is_said = stated and text[:start].rstrip(" \t\r\n:")[-2:].lower() == "is"
    if is_said and not _ASKED_FORM.search(text, end):
        number = matching.last_number(text[start:end])
        if number is not None:
            return number
    return matching.last_number(text)


def _expression(text: str) -> str:
    """The sum that a text ends in: of `\\boxed{a}`, `#### a` and `b = a` it is a."""
    said = _said(text).lstrip("# ")
    boxed = _BOXED.search(said)
    return (boxed[1] if boxed else said).rpartition("=")[2].strip(" $")


def _doubt(text: str, answer: str) -> str | None:
    """Why a text cannot be taken at its word: "not 18", "18, or maybe 20"."""
    start, end, _ = _conclusion(text)
    said = text[start:end]
    if _NEGATED.search(said):
        return "it says what the answer is not"
    if _ALTERNATIVE.search(said) and not _ALTERNATIVE.search(answer):
        return "it says two answers"
    return None


def _signed(text: str) -> str:
    """The text with "is - 5" written as "is -5"; "- 5 apples" in a list stays as it is."""
    start, end, stated = _conclusion(text)
    said = _SIGN_INSIDE.sub(r"\1-", text[start:end])
    if stated or not text[:start].strip():
        said = _SIGN_FIRST.sub("-", said)
    return text[:start] + said + text[end:]


def _at_a_look(text: str, answer: str) -> Verdict | None:
    """The verdict on mathematics that needs no mathematics; None where it does."""
    said, bare = _bare(_said(text)), _bare(answer)
    if bare and said == bare:
        return _told(True, answer)
    doubt = _doubt(text, answer)
    return None if doubt is None else Verdict(verdict="unclear", reason=doubt)


def _bare(text: str) -> str:
    """A text without signs of dollars and the white space that means nothing."""
    return _NEEDLESS_SPACE.sub("", " ".join(_priceless(text).replace("$", "").split()))


def _priceless(text: str) -> str:
    """Without LaTeX's sign of the dollar, which is not the one that marks mathematics."""
    return text.replace("\\$", "")


def _readable(text: str) -> str:
    """The text, or the mathematics alone that it ends in, marked as such.

    math-verify reads "(1, 2)" as 2, "- 5" as 5 and "3\\sqrt{2}" as 3 where no dollars stand around
    them, and "1 1/2" as no number.
    """
    said = _priceless(_said(text))
    latex = _MIXED.sub(r"\1\\frac{\2}{\3}", said)
    if _MATHEMATICAL.fullmatch(said):
        return f"${latex}$"
    _, _, stated = _conclusion(text)
    if "\\" in latex and not _marked(said if stated else text) and "\\boxed" not in text:
        found = [one for one in _FORMULA.findall(latex) if _DIGIT.search(one) or "\\" in one]
        for formula in found[:1] if stated else found[-1:]:
            bare = formula.strip(" ,;:.").removesuffix("\\")
            if "\\" in bare:
                return f"${bare}$"
    return _signed(text)


def _in_dollars(answer: str) -> str:
    """A known answer marked as mathematics, where it is not."""
    answer = _MIXED.sub(r"\1\\frac{\2}{\3}", _priceless(answer))
    marked = _marked(answer) and answer.count("$") != 1
    return answer if marked else f"${answer.replace('$', '').strip()}$"


def _marked(text: str) -> bool:
    """Whether something in a text is marked as mathematics."""
    return any(mark in _priceless(text) for mark in ("$", "\\boxed", "\\(", "\\["))
