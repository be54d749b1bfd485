"""Strict readings of replies that hold several texts: what does not have the form is nothing."""

import re
from collections.abc import Sequence
from dataclasses import replace

from limbeck.core.exchange import Reply

_ITEM = re.compile(r"([0-9]{1,4})[.)][ \t]+(\S.*)")
END = "END"
"""The line that ends a reply of blocks, and shows that it is whole."""

UNENDED = "reasoning without an end"
"""How a reply finished that has nothing else."""


def spoken(reply: Reply) -> Reply:
    """A reply without the reasoning that local models and some servers leave in it.

    That is all up to the last `</think>`, and the white space behind. Where reasoning was begun and
    not ended, nothing is left, and the reply is not whole.

    >>> spoken(Reply(question="", index=0, text="<think>Hm.</think> A river.")).text
    'A river.'
    """
    _, end, text = reply.text.rpartition("</think>")
    if end:
        return replace(reply, text=text.lstrip())
    if text.lstrip().startswith("<think>"):
        return replace(reply, text="", finish=UNENDED)
    return reply


def numbered(reply: str, *, whole: bool = True) -> list[str] | None:
    """The lines of a list that is numbered 1, 2, 3, ...; None where there is no such list.

    Each item is one line. Other text may stand before the list, and behind it after an empty line.
    A wrong number, or a line that goes on where an item should have ended, makes it no list.

    Args:
        reply: of a teacher.
        whole: False where it was cut: then the last item may be half a one, and is left out.

    >>> numbered("Here they are:\\n1. Name a river.\\n2) Sort 3, 1, 2.\\n\\nEnjoy!")
    ['Name a river.', 'Sort 3, 1, 2.']
    >>> numbered("1. Name a river.\\n3. Sort these.") is None
    True
    """
    items: list[str] = []
    gap = behind = False
    for line in map(str.strip, reply.split("\n")):
        match = _ITEM.fullmatch(line)
        if match is not None:
            if behind or int(match[1]) != len(items) + 1:
                return None
            items.append(match[2])
            gap = False
        elif not line:
            gap = True
        elif items:
            if not gap:
                return None
            behind = True
    if not whole and not behind:
        items = items[:-1]
    return items or None


def blocks(reply: str, names: Sequence[str]) -> list[tuple[str, ...]] | None:
    """Texts behind lines `NAME NUMBER:`, in turn, up to the line `END`; None where it is otherwise.

    With the names QUESTION and ANSWER these are QUESTION 1, ANSWER 1, QUESTION 2, ... A text goes
    on until the next such line. Text before the first is left alone; behind `END` there is none.

    Args:
        reply: of a teacher.
        names: of the texts that belong together, in their order.

    >>> blocks("Q 1: Who?\\nA 1: A cat\\nin a hat.\\nEND", ["Q", "A"])
    [('Who?', 'A cat\\nin a hat.')]
    >>> blocks("Q 1: Who?\\nA 1: A cat", ["Q", "A"]) is None
    True
    """
    form = re.compile(rf"\s*({'|'.join(map(re.escape, names))}) ([0-9]{{1,4}}):(.*)")
    texts: list[list[str]] = []
    ended = False
    for line in reply.split("\n"):
        if ended and line.strip():
            return None
        if line.strip() == END:
            ended = True
        elif (match := form.fullmatch(line)) is not None:
            number, place = divmod(len(texts), len(names))
            if (match[1], int(match[2])) != (names[place], number + 1):
                return None
            texts.append([match[3]])
        elif texts:
            texts[-1].append(line)
    joined = ["\n".join(lines).strip() for lines in texts]
    if not ended or not joined or len(joined) % len(names) or not all(joined):
        return None
    return list(zip(*(joined[k :: len(names)] for k in range(len(names))), strict=True))
