"""Where sentences end."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.synth.sentences import sentences


def texts(text):
    return [one.text for one in sentences(text)]


@given(st.text(alphabet=st.sampled_from(list("aB1. !?\n\t\"')é。😀-")), max_size=60) | st.text())
def test_they_cover_the_text_exactly_and_in_bytes(text):
    found = sentences(text)
    assert "".join(one.text for one in found) == text
    places = [one.start for one in found] + [one.end for one in found[-1:]]
    assert places == sorted(set(places))
    data = text.encode(errors="replace")
    assert [data[one.start : one.end].decode(errors="replace") for one in found] == texts(text)
    # None is white space alone, so each has something that a model says something about.
    assert all(one.text.strip() for one in found) or not text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "It costs 3.14 and a.b is 1.000.000,5 so it is.",
        "See www.example.org/a.html?b=1 for it.",
        "one. two. three",  # no capital follows
        "2. Add the parts",
        "Now ... he waits",
        "",
        "no end",
    ],
)
def test_a_point_inside_ends_nothing(text):
    assert texts(text) == ([text] if text else [])


@pytest.mark.parametrize(
    ("parts"),
    [
        ["Now 2 + 3 = 5. ", "Then 5 - 1 = 4. ", "The answer is 4."],
        ["Is it? ", "It is! ", "3 remain."],
        ['He said "Go." ', "(Then he left.) ", "“Ah.” ", "*Done.* ", "- Über alles."][:4],
        ["end of a line. \n", "no capital behind it"],
        ["first line\n", "second line\n\n", "third"],
        ["1. Add them.\n", "2. Divide.\n", "Done."],
        ["a) 2 + 2 = 4. ", "So 4."],
        ["2.5 is half of 5. ", "So 5."],
        ["第一步。", "第二步！", "完"],
        ["Ende. ", "Über uns. ", "Да. ", "Нет."],
        ["It is 5. ", "$6 is more. ", "-1 is less."],
        ["Then?! ", "No… ", "Yes."],
    ],
)
def test_it_finds_the_sentences(parts):
    assert texts("".join(parts)) == parts


def test_white_space_at_both_ends_belongs_to_a_sentence():
    assert texts("\n\n One.\n Two. \n ") == ["\n\n One.\n ", "Two. \n "]
    assert texts(" \n ") == [" \n "]


@pytest.mark.parametrize("one", [".", "!", " ", "\n ", ".\n", '."', "! ", ". a", "("])
def test_a_long_run_takes_no_longer_than_its_length(one):
    """A text of 100,000 marks took minutes."""
    text = "a" + one * 50_000 + "b"
    began = time.process_time()
    assert "".join(texts(text)) == text
    assert time.process_time() - began < 2
