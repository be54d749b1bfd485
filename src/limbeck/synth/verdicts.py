"""Verdicts of a judge on texts that may try to forge one.

Every question has a code of its own, which occurs in none of the texts that are judged. They stand
between marks with the code, and a verdict is a line with the code: so whatever a text holds, and
however much of it the judge repeats, it has no mark and no verdict in it.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal, cast

from limbeck.core.random import stream_seed
from limbeck.core.types import Turn

CODE_DIGITS = 12

Preference = Literal["A", "B", "TIE"]

LOWEST, HIGHEST = 1, 10
"""Ends of the scale of scores."""


def code_for(seed: int, name: str, texts: Sequence[str]) -> str:
    """A code for a question: the same for the same arguments, and in none of the texts.

    It also depends on the texts, so whoever writes one cannot compute it beforehand.

    Args:
        seed: of the recipe.
        name: of the question, such as a row's id.
        texts: all that will be shown and is not ours.

    >>> code_for(0, "row-1", ["some text"]) == code_for(0, "row-1", ["some text"])
    True
    """
    shown = [_letters(text) for text in texts]
    attempt = 0
    while True:
        drawn = stream_seed(seed, json.dumps(["verdict", name, *texts]), attempt)
        code = f"{drawn:016x}"[-CODE_DIGITS:]
        if not any(code in letters for letters in shown):
            return code
        attempt += 1


def _letters(text: str) -> str:
    """Letters and digits alone, wide and decorated ones as plain: nothing hides between them."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in plain if character.isalnum())


def enclosed(label: str, text: str, code: str) -> str:
    """A text between marks that it cannot hold."""
    return f"[BEGIN {label} {code}]\n{text}\n[END {label} {code}]"


def plain(prompt: Sequence[Turn]) -> str:
    """A prompt as one text, with the role before each turn of a conversation."""
    if not any(turn.role for turn in prompt):
        return "".join(turn.text for turn in prompt)
    return "\n".join(f"{turn.role or 'user'}: {turn.text}" for turn in prompt)


def framed(text: str, prompt: Sequence[Turn]) -> tuple[Turn, ...]:
    """A question to a judge: a user's message where the rows are conversations, else plain text."""
    chat = any(turn.role for turn in prompt)
    return (Turn(text=text, role="user" if chat else None),)


def preference_form(code: str) -> str:
    """What the judge is told of the last line of a preference."""
    return (
        "End with one last line of exactly this form, where X is A or B for the better answer, or"
        f" TIE if neither is better:\nVERDICT {code} X"
    )


def scores_form(code: str, count: int) -> str:
    """What the judge is told of the last line of so many scores."""
    numbers = "N" if count == 1 else " ".join(f"N{k + 1}" for k in range(count))
    what = "N is a whole number" if count == 1 else "each N is the whole number of one answer"
    return (
        f"End with one last line of exactly this form, where {what} from {LOWEST} (worst) to"
        f" {HIGHEST} (best):\nSCORES {code} {numbers}"
    )


def ranking_form(code: str, count: int) -> str:
    """What the judge is told of the last line of a ranking."""
    numbers = " ".join(f"N{k + 1}" for k in range(count))
    return (
        "End with one last line of exactly this form, with the number of each answer once, the"
        f" best first:\nRANKING {code} {numbers}"
    )


def preference(reply: str, code: str) -> Preference | None:
    """The preference in a judge's reply; None where it has none.

    >>> preference("A is vague.\\nVERDICT 00c0de B", "00c0de")
    'B'
    >>> preference("VERDICT 00c0de A\\nVERDICT 00c0de B", "00c0de") is None
    True
    """
    return cast("Preference | None", _verdict(reply, "VERDICT", code, "A|B|TIE"))


def scores(reply: str, code: str, count: int) -> tuple[int, ...] | None:
    """So many scores in a judge's reply; None where it has none, more, fewer, or one off the scale.

    >>> scores("Both are fine.\\nSCORES 00c0de 7 4", "00c0de", 2)
    (7, 4)
    """
    found = _numbers(reply, "SCORES", code, count)
    inside = found is not None and all(LOWEST <= number <= HIGHEST for number in found)
    return found if inside else None


def permutation(reply: str, code: str, count: int) -> tuple[int, ...] | None:
    """The ranking in a judge's reply, from 0, best first; None unless each stands there once.

    >>> permutation("RANKING 00c0de 3 1 2", "00c0de", 3)
    (2, 0, 1)
    """
    found = _numbers(reply, "RANKING", code, count)
    if found is None or sorted(found) != list(range(1, count + 1)):
        return None
    return tuple(number - 1 for number in found)


def without_verdict(reply: str) -> str:
    """A reply without its last line that is not empty, which holds the verdict."""
    return reply.rstrip().rpartition("\n")[0].strip()


def _numbers(reply: str, word: str, code: str, count: int) -> tuple[int, ...] | None:
    found = _verdict(reply, word, code, rf"[1-9]\d{{0,3}}(?: [1-9]\d{{0,3}}){{{count - 1}}}")
    return None if found is None else tuple(map(int, found.split(" ")))


def _verdict(reply: str, word: str, code: str, form: str) -> str | None:
    """What the one line `WORD CODE ...` says, which must be the last one that is not empty."""
    line = re.compile(rf"[ \t]*{word} {re.escape(code)} ({form})[ \t\r]*", re.ASCII)
    lines = [text for text in reply.split("\n") if text.strip()]
    found = [match for text in lines if (match := line.fullmatch(text)) is not None]
    if len(found) != 1 or line.fullmatch(lines[-1]) is None:
        return None
    return found[0][1]
