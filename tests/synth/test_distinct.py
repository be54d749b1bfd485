"""Of several right answers those that differ."""

import itertools

import pytest
from fakes import good, row, run_step
from hypothesis import given
from hypothesis import strategies as st

from limbeck.core.errors import RecipeError
from limbeck.synth import distinct
from limbeck.synth.distinct import Distinct


def group(*texts, name="g"):
    return [row(f"{name}#{k}", text, group=name) for k, text in enumerate(texts)]


def kept(step, rows):
    found, _ = run_step(step, rows)
    assert [one.id for one in found] == [one.id for one in rows]  # none lost, none moved
    return [one.id for one in good(found)]


def test_one_of_each_list_of_equations():
    rows = group("4+3 = 7, so 7", "We see 4 + 3 = 7.", "3 + 4 = 7", "7 - 0 = 7 and 4 + 3 = 7")
    found, desk = run_step(Distinct(), rows)
    assert [one.failure for one in found] == [None, "says the same as g#0", None, None]
    assert desk.counts == {"distinct answers": 3}


def test_texts_without_equations_count_by_their_words():
    rows = group("Seven, of course", "seven of COURSE!", "It is seven")
    assert kept(Distinct(), rows) == ["g#0", "g#2"]


@pytest.mark.parametrize(
    ("by", "left"), [("equations", [0, 2]), ("text", [0, 1, 2, 4]), ("words", [0, 2])]
)
def test_what_makes_two_the_same(by, left):
    rows = group("4 + 3 = 7 a", "4+3=7  A.", "5 + 2 = 7 b", " 5 + 2 = 7 b\n", "5+2=7 B")
    assert kept(Distinct(by=by, prefer="first"), rows) == [f"g#{k}" for k in left]


def test_groups_are_apart_and_a_row_without_one_is_its_own():
    rows = [*group("a", "a", name="g"), *group("a", name="h"), row("x", "a"), row("y", "a")]
    assert kept(Distinct(), rows) == ["g#0", "h#0", "x", "y"]


def test_no_more_than_the_cap():
    rows = group("aaa", "bb", "c", "dddd")
    found, _ = run_step(Distinct(by="text", cap=2, prefer="shortest"), rows)
    assert [one.id for one in good(found)] == ["g#1", "g#2"]
    assert found[0].failure == "there are 2 others to this prompt already"
    assert kept(Distinct(by="text", cap=2, prefer="first"), rows) == ["g#0", "g#1"]


def test_the_shortest_of_a_kind():
    rows = group("We know that 4 + 3 = 7.", "4 + 3 = 7.", "So 4 + 3 = 7.")
    assert kept(Distinct(prefer="shortest"), rows) == ["g#1"]


def levenshtein(a, b):
    """By its definition."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


texts = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=6)


@given(texts, st.integers(1, 4))
def test_the_most_different_are_taken(words, cap):
    pytest.importorskip("rapidfuzz")
    rows = group(*words)
    step = Distinct(by="text", cap=cap)
    distinct_words = list(dict.fromkeys(words))
    expected = [distinct_words.pop(0)]
    while distinct_words and len(expected) < cap:
        best = max(distinct_words, key=lambda w: sum(levenshtein(w, one) for one in expected))
        distinct_words.remove(best)
        expected.append(best)
    found, _ = run_step(step, rows)
    assert sorted(one.text for one in good(found)) == sorted(expected)


@given(st.lists(st.sampled_from(["1 + 1 = 2", "1+1=2.", "2 + 0 = 2", "two", "Two!", "3-1 = 2"]),
                min_size=1, max_size=8),
       st.sampled_from(["equations", "text", "words"]), st.sampled_from(["different", "shortest",
       "first"]), st.none() | st.integers(1, 3))  # fmt: skip
def test_a_second_pass_changes_nothing(words, by, prefer, cap):
    pytest.importorskip("rapidfuzz")
    step = Distinct(by=by, prefer=prefer, cap=cap)
    once = good(run_step(step, group(*words))[0])
    assert once
    assert len(once) <= (cap or len(words))
    assert run_step(step, once)[0] == once
    for a, b in itertools.combinations(once, 2):
        assert a.text.strip() != b.text.strip()


def test_equations_must_hold():
    rows = group("4 + 3 = 8, so 7", "4 + 3 = 7", "seven", "1 / 3 = 0.33", "<<2*3=6>>6 and 6+1 = 8")
    found, _ = run_step(Distinct(true_equations=True), rows)
    why = "an equation in it does not hold, or there is none"
    assert [one.failure for one in found] == [why, None, why, None, why]


def test_an_untrue_answer_is_no_reason_to_drop_a_true_one():
    rows = group("4 - 3 = 7", "4 + 3 = 7")  # the same words
    assert kept(Distinct(by="words", true_equations=True), rows) == ["g#1"]


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(distinct, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'limbeck\[synth\]'"):
        Distinct()
    assert Distinct(prefer="shortest").cap is None


def test_words_that_differ_by_their_vowels_are_different():
    rows = [
        row("p#0", "\u092c\u093e\u0932", group="p"),
        row("p#1", "\u092c\u093f\u0932", group="p"),
    ]
    found, _ = run_step(Distinct(by="words", prefer="first"), rows)
    assert good(found) == found
