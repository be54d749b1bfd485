"""How much each valid answer counts."""

import math
import re

import pytest
from fakes import FakeReader, good, row, run_step
from hypothesis import given
from hypothesis import strategies as st

from limbeck.core.errors import RecipeError
from limbeck.synth.step import reads_of
from limbeck.synth.weights import Weights, parts_by_count, parts_by_probability


def reader(logps, **more):
    """Gives a whole text the log-probability that a table says, spread over its characters."""

    def logp(text, start, end):
        answer = text.removeprefix("Q?\n")
        return logps[answer] * (end - max(start, 3)) / len(answer)

    return FakeReader(lambda text: [text[:3], *re.findall(".", text[3:])], logp, **more)


def group(texts, name="p"):
    return [row(f"{name}#{k}", text, group=name) for k, text in enumerate(texts)]


def weights(rows):
    return [one.weight for one in rows]


def test_weights_are_the_teachers_distribution_over_what_is_left():
    """An enumerable toy: the teacher says a, b, c with 0.5, 0.3, 0.2, and b is not valid."""
    big = {"big": reader({"a": math.log(0.5), "cc": math.log(0.2), "e": math.log(0.01)})}
    rows = group(["a", "cc"]) + group(["e"], "q")
    found, desk = run_step(Weights(teacher="big"), rows, readers=big)
    assert weights(found) == pytest.approx([5 / 7, 2 / 7, 1.0])
    assert [one.notes["effective_paths"] for one in found] == pytest.approx([49 / 29, 49 / 29, 1.0])
    assert desk.counts == {"weighted prompts": 2, "weighted paths": 3}


def test_a_temperature_evens_them_out():
    big = {"big": reader({"a": math.log(0.8), "b": math.log(0.2)})}
    found, _ = run_step(Weights(teacher="big", temperature=2.0), group("ab"), readers=big)
    assert weights(found) == pytest.approx([2 / 3, 1 / 3])  # square roots: 2 to 1
    hot, _ = run_step(Weights(teacher="big", temperature=1e9), group("ab"), readers=big)
    assert weights(hot) == pytest.approx([0.5, 0.5])
    cold, _ = run_step(Weights(teacher="big", temperature=1e-3), group("ab"), readers=big)
    assert weights(cold) == pytest.approx([1.0, 0.0])


def test_the_end_of_the_text_is_a_part_of_its_probability():
    """Else `a` and `ab` would not be two outcomes of one distribution."""
    logps = {"a": math.log(0.5), "b": math.log(0.5)}
    big = {"big": reader(logps, end=-1.0)}
    found, _ = run_step(Weights(teacher="big"), group("ab"), readers=big)
    assert weights(found) == pytest.approx([0.5, 0.5])
    ends = {"a": -0.1, "b": -3.0}
    big["big"].end = None
    original = big["big"].logp
    big["big"].logp = lambda text, start, end: (
        original(text, start, end) + ends[text[3]] * (start >= 3)
    )
    found, _ = run_step(Weights(teacher="big"), group("ab"), readers=big)
    assert found[0].weight / found[1].weight == pytest.approx(math.exp(2.9))


def test_equal_texts_share_their_part():
    big = {"big": reader({"a": math.log(0.6), "b": math.log(0.2)})}
    found, _ = run_step(Weights(teacher="big"), group(["a", "a", "b", "a"]), readers=big)
    assert weights(found) == pytest.approx([0.25, 0.25, 0.25, 0.25])
    found, _ = run_step(Weights(by="counts"), group(["a", "a", "b", "a"]))
    assert weights(found) == pytest.approx([0.25] * 4)
    found, _ = run_step(Weights(by="uniform"), group(["a", "a", "b", "a"]))
    assert weights(found) == pytest.approx([1 / 6, 1 / 6, 0.5, 1 / 6])
    assert found[0].notes["effective_paths"] == pytest.approx(2.0)


@given(
    st.dictionaries(st.text(min_size=1, max_size=3), st.floats(-1e4, 0), min_size=1, max_size=6),
    st.floats(0.1, 100),
)
def test_parts_sum_to_one_and_follow_the_order(logps, temperature):
    parts = parts_by_probability(logps, temperature)
    assert sum(parts.values()) == pytest.approx(1)
    by_logp = sorted(logps, key=logps.__getitem__)
    found = [parts[text] for text in by_logp]
    assert found == sorted(found)
    shifted = parts_by_probability({t: v - 500 for t, v in logps.items()}, temperature)
    assert shifted == pytest.approx(parts, abs=1e-9)  # only what is likelier counts


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), st.booleans())
def test_counts_sum_to_one(texts, uniform):
    assert sum(parts_by_count(texts, uniform=uniform).values()) == pytest.approx(1)


def test_what_has_no_probability_fails_and_the_rest_is_renormalised():
    big = {"big": reader({"a": -1.0, "b": -math.inf, "c": -1.0}, longest=1000)}
    found, desk = run_step(Weights(teacher="big"), group("abc"), readers=big)
    assert [one.failure for one in found] == [
        None,
        "the teacher gives the answer no probability",
        None,
    ]
    assert weights(good(found)) == [0.5, 0.5]
    assert desk.figures == {"effective paths of a prompt": 2.0}


def test_scores_that_were_written_count_without_a_reader():
    notes = [{"scores": [[c, math.log(p)] for c in "x"]} for p in (0.6, 0.2)]
    rows = [row(f"p#{k}", "x", group="p", notes=n) for k, n in enumerate(notes)]
    rows = [rows[0], row("p#1", "y", group="p", notes={"scores": [["y", math.log(0.2)]]})]
    one = Weights(scores="written")
    assert not reads_of(one)
    found, _ = run_step(one, rows)
    assert weights(found) == pytest.approx([0.75, 0.25])


def test_fields_that_do_not_go_together():
    with pytest.raises(RecipeError, match="whose probabilities"):
        Weights()
    with pytest.raises(RecipeError, match="goes with `by: probability`"):
        Weights(by="counts", temperature=2.0)
    assert Weights(teacher="big").reads == ("big",)
    assert Weights(by="uniform").reads == ()
