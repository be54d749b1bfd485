"""What is made of a server's answers when it is asked what it can do."""

import pytest

from limbeck.core.exchange import Scored
from limbeck.teachers.probe import believable, seeded
from limbeck.teachers.wire import Choice, Heard


def heard(text, *scores):
    scored = tuple(Scored(text=word, logp=logp, top=top) for word, logp, top in scores)
    return Heard(
        choices=(Choice(text=text, finish="stop", scores=scored),),
        model="m",
        fingerprint=None,
        prompt_tokens=None,
        completion_tokens=None,
    )


def test_log_probabilities_may_begin_with_the_drawn_one_and_go_on_behind_the_text():
    """As those of vLLM."""
    drawn = ("sea", -3.0, (("sea", -3.0), ("The", -0.3), ("It", -2.0)))
    end = ("<eos>", -0.1, (("<eos>", -0.1), (" .", -4.0)))
    assert believable(heard("sea", drawn, end))
    assert not believable(heard("lake", drawn, end))
    assert not believable(heard("sea", ("sea", -3.0, (("It", -2.0), ("The", -0.2)))))
    assert not believable(heard("sea", ("sea", -0.1, (("sea", -0.1), ("The", -0.2)))))


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["a", "a", "b"], True), (["a", "b", "b"], False), (["a", "a"], False), (["", "", ""], None)],
)
def test_what_is_seen_of_seeds(words, expected):
    assert seeded(words) is expected
