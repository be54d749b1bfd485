"""Lists and blocks in replies: read exactly, or not at all."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from limbeck.core.exchange import Reply
from limbeck.synth.parsing import blocks, numbered, spoken

LINES = st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), min_size=1).map(str.strip)
LINES = LINES.filter(bool).filter(lambda text: "\n" not in text and text == text.strip())


@given(st.lists(LINES, min_size=1, max_size=30), st.sampled_from([".", ")"]))
def test_a_list_is_read_as_it_was_written(items, mark):
    reply = "\n".join(f"{k + 1}{mark} {text}" for k, text in enumerate(items))
    assert numbered(reply) == items
    assert numbered(f"Here:\n\n{reply}\n\nThat is all.") == items
    assert numbered(reply, whole=False) == (items[:-1] or None)


@given(st.lists(LINES, min_size=2, max_size=12), st.data())
def test_a_list_with_a_wrong_number_is_none(items, data):
    numbers = list(range(1, len(items) + 1))
    place = data.draw(st.integers(0, len(items) - 1))
    numbers[place] = data.draw(st.integers(0, 50).filter(lambda n: n != numbers[place]))
    reply = "\n".join(f"{n}. {text}" for n, text in zip(numbers, items, strict=True))
    assert numbered(reply) is None


@given(st.text())
def test_any_text_is_a_list_of_lines_or_none(text):
    for whole in (True, False):
        found = numbered(text, whole=whole)
        assert found is None or (found and all(item and "\n" not in item for item in found))


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "Sorry.",
        "1.",
        "1.Name a river.",
        "- Name a river.",
        "**1.** Name a river.",
        "1. Name a river.\nand a lake.",  # the item goes on
        "1. Name a river.\n\nor so\n2. Name a lake.",  # text between
        "1. a\n1. b",
        "0. a\n1. b",
        "\u0661. an Arabic digit",
        "1. a\n\nBye.\n\n1. again",
    ],
)
def test_what_is_no_list(reply):
    assert numbered(reply) is None


def test_behind_a_list_that_was_cut_there_may_be_words_that_were():
    assert numbered("1. a\n2. b\n\nI hope th", whole=False) == ["a", "b"]


def test_a_great_text_is_read_in_no_time():
    assert numbered("1" * 1_000_000) is None
    assert numbered("1. a\n" + " " * 1_000_000 + "x") is None
    assert len(numbered("\n".join(f"{k}. x" for k in range(1, 10_000))) or ()) == 9_999
    assert blocks("QUESTION 1: " + "x" * 1_000_000, ["QUESTION"]) is None
    assert blocks("Q 1: a\n" + " " * 1_000_000 + "x", ["Q"]) is None


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r:"), min_size=1).map(str.strip)
TEXTS = TEXTS.filter(lambda text: text and text == text.strip() and "END" not in text)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8))
@example([("a  \nb", "a\x0c\n b")])  # of the first line, too, nothing is taken away
def test_blocks_are_read_as_they_were_written(pairs):
    reply = "".join(f"Q {k}: {q}\nA {k}: {a}\n" for k, (q, a) in enumerate(pairs, 1))
    assert blocks(reply + "END", ["Q", "A"]) == pairs
    assert blocks(f"Well:\n{reply}END\n\n", ["Q", "A"]) == pairs
    assert blocks(reply, ["Q", "A"]) is None  # it may have been cut
    assert blocks(reply + "END\nBye.", ["Q", "A"]) is None


@pytest.mark.parametrize(
    "reply",
    [
        "END",
        "Q 1: a\nEND",
        "A 1: a\nQ 1: b\nEND",
        "Q 1: a\nA 2: b\nEND",
        "Q 1: a\nA 1: b\nA 1: c\nEND",
        "Q 1: a\nQ 1: b\nA 1: c\nEND",
        "Q 1: a\nA 1:\nEND",
        "Q 1: a\nA 1: b\nQ 2: c\nEND",
        "Q 1: a\nA 1: it says\nQ 1: forged\nA 1: forged\nEND",
        "Q 1: a\nA 1: b\nEND\nQ 2: c\nA 2: d\nEND",
        "q 1: a\na 1: b\nend",
    ],
)
def test_what_are_no_blocks(reply):
    assert blocks(reply, ["Q", "A"]) is None


@given(st.text(st.sampled_from("QA12: \nEND")))
def test_any_text_is_whole_blocks_or_none(text):
    found = blocks(text, ["Q", "A"])
    assert found is None or all(len(pair) == 2 and all(pair) for pair in found)


@pytest.mark.parametrize(
    ("text", "behind", "whole"),
    [
        ("<think>\n1. first idea\n</think>\n1. Name a river.", "1. Name a river.", True),
        ("first idea </think> Yes.", "Yes.", True),  # where the template has written the beginning
        ("<think>a</think><think>b</think>c", "c", True),
        ("<think>\nIt goes on", "", False),
        ("<think>done</think>\n", "", True),
        ("What is <think> for?", "What is <think> for?", True),
        ("Yes. ", "Yes. ", True),
    ],
)
def test_what_is_said_stands_behind_the_reasoning(text, behind, whole):
    said = spoken(Reply(question="", index=0, text=text, finish="stop"))
    assert (said.text, said.whole) == (behind, whole)


def test_reasoning_that_was_cut_is_no_beginning_of_an_answer():
    assert spoken(Reply(question="", index=0, text="<think>\n1. A", finish="length")).text == ""
    failed = Reply(question="", index=0, failure="time-out")
    assert spoken(failed) is failed
