"""What text must be before anything can read it, and where it ends."""

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
