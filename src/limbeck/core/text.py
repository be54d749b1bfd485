"""What text must be before anything can read it."""


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
