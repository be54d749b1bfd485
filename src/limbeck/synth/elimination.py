"""Which evolved instructions, and which answers to them, are no use."""

from collections.abc import Sequence

from limbeck.synth.quality import REFUSALS, plain
from limbeck.synth.words import size, words

STOP_WORDS = frozenset(
    """a about all also am an and any are as at be because been but by can could did do does for
    from had has have he her here him his how i if in into is it its just may me might my not of on
    or our she should so some such than that the their them then there these they this those to too
    us was we were what when where which who why will with would you your""".split()
)


def bad_evolution(
    text: str, ancestors: Sequence[str], *, max_words: int, copied: Sequence[str]
) -> str | None:
    """Why a rewritten instruction is no new one; None where it may be one.

    Args:
        text: of it.
        ancestors: the instructions that it descends from.
        max_words: it may have.
        copied: phrases that it must not have.

    >>> bad_evolution("Name a RIVER!", ["Name a river."], max_words=9, copied=[])
    'does not differ from what it was made of'
    """
    found, lower = words(text), plain(text)
    if not found:
        return "has no word in it"
    if any(found == words(ancestor) for ancestor in ancestors):
        return "does not differ from what it was made of"
    if (length := size(text)) > max_words:
        return f"is too long: {length} words"
    if any(phrase.casefold() in lower for phrase in copied):
        return "copies words of the request"
    if (opening := next(filter(lower.startswith, REFUSALS), None)) is not None:
        return f"refuses: it begins with {opening!r}"
    return None


def bad_answer(text: str, sorry_words: int) -> str | None:
    """Why an answer shows that its question is no good; None where it shows nothing of the kind.

    Args:
        text: of it.
        sorry_words: from this length on, an answer may say that it is sorry.

    >>> bad_answer("It is what it is.", 80)
    'its answer says nothing: stop words alone'
    """
    found = words(text)
    if all(word in STOP_WORDS for word in found):
        return "its answer says nothing: stop words alone"
    if "sorry" in found and len(found) < sorry_words:
        return "its answer is sorry, and short"
    return None
