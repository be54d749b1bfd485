"""What text must be before anything can read it, where it ends, and how it fits on a line."""

from collections.abc import Sequence


def is_whole(text: str) -> bool:
    """Whether UTF-8 can write it.

    It cannot write half of a surrogate pair, which JSON can hold and which is what is left of an
    emoji that was cut in the middle.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def until(text: str, marks: Sequence[str]) -> str:
    """The text before the first of some strings; all of it where none is there."""
    ends = [place for mark in marks if (place := text.find(mark)) >= 0]
    return text[: min(ends, default=len(text))]


def one_line(said: object, longest: int | None = None) -> str:
    """What is said, such as an error, with each run of white space as one space; perhaps cut.

    >>> one_line("no such\\n  file", 9)
    'no such f'
    """
    return " ".join(str(said).split())[:longest]
