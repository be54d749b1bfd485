"""Multiple choice: which option a text chooses."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

Options = dict[str, str]
"""The text of each option by its letter, `A` first."""

_OPTION = re.compile(r"^[ \t]*(?:\(([A-Za-z])\)|([A-Za-z])[.)])[ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
_STATEMENT = re.compile(
    r"(?:\banswer(?:\s+choice)?\s*(?:is|are|would be|must be|should be|:|=)|\banswer\s*:)"
    r"\s*(?:option\b|choice\b|:)?\s*",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{|\\textbf\{|\\mathrm\{)?\s*([^{}\n]{1,200})\}")
_MARK = re.compile(r"(?<![\w)])\(([A-Za-z])\)")  # not f(a) and 501(c)
_BARE = re.compile(
    r"([A-Z]|[a-z](?=[.)]?\s*$))[*_`$\"']{0,3}(?=[).:,;]|\s*$)[).:]?\s*(.*)", re.DOTALL
)
_OWN = re.compile(r"([A-Z])(?:\s+[-\u2013]\s+|\s*\(|[).:]?\s+)(.*)", re.DOTALL)
_ANOTHER = re.compile(r"(?:\b(?:or|and|nor)\s+|^[,;]\s*)([A-Z])\b(?!\s+(?!(?:and|or)\b)[a-z])")
_EDGE = " \t*_`$\"'"
_NEGATED = re.compile(r"\s*(?:not|neither|none|never)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What a text chooses: a letter where one is known, and its text; or why nothing."""

    letter: str | None = None
    text: str = ""
    unclear: str = ""


def options_in(question: str) -> Options:
    """The options that stand in a question, each on a line of its own; empty where none do.

    They are read from the last line backwards to the first `(a)`, `A.` or `A)`, so that examples
    before the question do not count.

    >>> options_in("Which one?\\n(a) park\\n(b) gravity\\nA:")
    {'A': 'park', 'B': 'gravity'}
    """
    found: Options = {}
    for match in _OPTION.finditer(question):
        letter = (match[1] or match[2]).upper()
        if letter == "A":
            found = {}
        if letter == chr(ord("A") + len(found)):
            found[letter] = match[3]
    return found if len(found) > 1 else {}


def chosen(text: str, options: Options) -> Chosen:
    """The option that a text names in the end.

    That is what stands behind the last `answer is` or `answer:`, or in the last `boxed`, or else
    the last line: a letter, as `(d)`, `D` or `D.`, with or without the option's text, or that text
    alone. What names two options, or a letter with the text of another option, is unclear.

    >>> chosen("So the answer is (b) gravity.", {"A": "park", "B": "gravity"}).letter
    'B'
    >>> chosen("The answer is either (a) park or (b) gravity.", {}).unclear
    'it names several options'
    """
    said = _conclusion(text)
    if not said:
        return Chosen(unclear="it is empty")
    if _NEGATED.match(said):
        return Chosen(unclear="it says what the answer is not")
    own = _OWN.match(said)
    text_of = options.get(own[1]) if own else None
    if own and text_of and plain(own[2].rstrip(")")) == plain(text_of.rstrip(")")):
        return Chosen(letter=own[1], text=text_of)
    bare, mark = _BARE.match(said), _MARK.search(said)
    behind = bare[2] if bare else said[mark.end() :] if mark else ""
    found = [*_MARK.findall(said), *([bare[1], *_ANOTHER.findall(behind)] if bare else ())]
    marks = list(dict.fromkeys(mark.upper() for mark in found))
    if len(marks) > 1:
        return Chosen(unclear="it names several options")
    if not marks:
        return _by_text(said, options)
    letter = marks[0]
    if options and letter not in options:
        return Chosen(unclear=f"there is no option {letter}")
    named = [key for key, option in options.items() if plain(option) == plain(behind)]
    if named and letter not in named:
        return Chosen(unclear="it names a letter with the text of another option")
    return Chosen(letter=letter, text=options.get(letter, behind.strip(" .\n")))


def same_option(choice: Chosen, answer: str, options: Options) -> bool:
    """Whether a choice is the known answer, which is a letter, a text, or both.

    Options with the same text are the same.
    """
    right = chosen(answer, options)
    if right.letter is None:
        return bool(choice.text) and plain(choice.text) == plain(answer)
    if choice.letter is None:
        return bool(right.text) and plain(choice.text) == plain(right.text)
    if choice.letter == right.letter:
        return True
    same = options.get(choice.letter), options.get(right.letter)
    return None not in same and plain(same[0] or "") == plain(same[1] or "")


def plain(text: str) -> str:
    """A text without case, quotes, and punctuation and white space at its ends."""
    return " ".join(text.casefold().split()).strip(" .,;:!\"'*$`")


def _by_text(said: str, options: Options) -> Chosen:
    named = [letter for letter, option in options.items() if plain(option) == plain(said)]
    if named:
        return Chosen(letter=named[0], text=options[named[0]])
    if options:
        return Chosen(unclear="it names no option")
    return Chosen(text=said.strip(" .\n"))


def _conclusion(text: str) -> str:
    """What follows the last statement of an answer, to the line's end; else the last line."""
    lines: Sequence[str] = [line for line in text.splitlines() if line.strip()]
    starts = [match.end() for match in _STATEMENT.finditer(text)]
    boxes = list(_BOXED.finditer(text))
    if boxes and (not starts or boxes[-1].end() >= starts[-1]):
        said = boxes[-1][1]
    elif starts:
        said = text[starts[-1] :].strip().partition("\n")[0]
    else:
        said = lines[-1] if lines else ""
    return said.lstrip(_EDGE).rstrip(_EDGE + ".")
