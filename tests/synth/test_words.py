"""Words and runs of words, against plain sets of tuples."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from limbeck.synth.words import jaccard, runs, shingles, words

TEXTS = st.text(st.sampled_from("ab cD.,\u732b\u00c9-1\n"), max_size=60)


def naive(text, n):
    """Every run of n words as a tuple; the whole where there are fewer."""
    found = words(text)
    size = min(n, len(found))
    return {tuple(found[k : k + size]) for k in range(len(found) - size + 1)} if found else set()


@given(TEXTS, TEXTS, st.integers(1, 4))
def test_the_jaccard_index_is_that_of_the_sets(a, b, n):
    one, other = naive(a, n), naive(b, n)
    expected = len(one & other) / len(one | other) if one | other else 0.0
    assert jaccard(shingles(a, n), shingles(b, n)) == expected
    assert jaccard(shingles(b, n), shingles(a, n)) == expected
    assert len(shingles(a, n)) == len(one)


@given(st.text())
def test_case_width_and_punctuation_make_no_difference(text):
    assert words(words_apart := " ".join(words(text))) == words(text), words_apart
    assert words(f"...{text}!?") == words(text)


def test_of_letters_that_can_be_written_in_several_ways():
    for text in ("\uff34\uff48\uff45 caf\u00e9", "THE, cafe\u0301!", "the-CAF\u00c9"):
        assert words(text) == ["the", "caf\u00e9"]
    assert words("Stra\u00dfe") == words("STRASSE")
    assert words("snake_case") == ["snake", "case"]
    assert words("\u732b\u304c\u597d\u304d") == list("\u732b\u304c\u597d\u304d")
    assert words(unicodedata.normalize("NFD", "\u304c")) == ["\u304c"]


def test_lone_surrogates_are_words_of_no_kind():
    assert len(shingles("a \ud800 b c", 2)) == 2


def test_the_numbers_are_the_same_in_every_process():
    """So they do not depend on Python's own hashes, which differ from process to process."""
    assert runs("a b c d".split(), 3).tolist() == [15855784516576762627, 9399886582545748626]


def test_order_counts():
    assert set(runs(["a", "b"], 2)).isdisjoint(runs(["b", "a"], 2))
    assert not len(runs(["a", "b"], 3))


def test_marks_belong_to_the_letters_that_they_stand_on():
    """Vowels of Hindi, Bengali, Tamil, Hebrew and Arabic are marks, not letters."""
    for text in (
        "\u0928\u093f\u092e\u094d\u0928\u0932\u093f\u0916\u093f\u0924 \u092e\u0947\u0902",
        "\u09ac\u09be\u0982\u09b2\u09be \u09ad\u09be\u09b7\u09be",
        "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd \u0bae\u0bca\u0bb4\u0bbf",
        "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u05e2\u05b2\u05dc\u05b5\u05d9",
        "\u0643\u064e\u062a\u064e\u0628\u064e \u062f\u064e\u0631\u0652\u0633",
    ):
        found = words(f"\u00ab{text}!\u00bb")
        assert len(found) == 2
        assert [unicodedata.normalize("NFC", word) for word in found] == [
            unicodedata.normalize("NFKC", word) for word in text.split()
        ]
    assert words("\u0915\u093e\u0932\u093e") != words("\u0915\u0940\u0932")
    assert words("\u2764\ufe0f \u0301") == []  # a mark on no letter is no word


def test_each_character_of_thai_is_a_word_with_its_marks():
    """It has no spaces between words, so that a sentence would be one."""
    found = words("\u0e01\u0e34\u0e19\u0e19\u0e49\u0e33")
    assert found == ["\u0e01\u0e34", "\u0e19", "\u0e19\u0e49\u0e4d", "\u0e32"]
