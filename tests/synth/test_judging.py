"""A judge's liking for a place cancels; templates are checked and filled once."""

import pytest
from fakes import FakeWriter, broken, cut
from hypothesis import given
from hypothesis import strategies as st
from injections import parts, with_code

from limbeck.core.errors import RecipeError
from limbeck.core.types import Sampling, Turn
from limbeck.synth.best import TEMPLATE
from limbeck.synth.judging import Judge, Pair, draws
from limbeck.synth.template import filled, template_text


def compare(by, say, incumbent, challenger):
    """The margin that a judge finds, whose replies are `say(first answer, second answer)`."""

    def reply(question, index):
        del index
        code, (first, second) = parts(question)
        return with_code(say(first, second), code)

    judge = Judge(
        writer=FakeWriter(reply),
        by=by,
        principle="Be fair.",
        template=TEMPLATE,
        sampling=Sampling(),
        seed=0,
    )
    pair = Pair(name="row", prompt=(Turn(text="Q?\n"),), incumbent=incumbent, challenger=challenger)
    ((_, verdict),) = judge.compare([("item", pair)])
    return verdict.margin


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 3), st.booleans())
def test_what_a_place_adds_to_a_score_cancels_exactly(one, other, bias, first_liked):
    def scored(first, second):
        a, b = int(first) + bias * first_liked, int(second) + bias * (not first_liked)
        return f"SCORES CODE {a} {b}"

    assert compare("scores", scored, str(one), str(other)) == other - one


@given(
    st.integers(1, 10),
    st.integers(1, 10),
    st.lists(st.integers(1, 10), min_size=10, max_size=10),
    st.lists(st.integers(1, 10), min_size=10, max_size=10),
)
def test_no_liking_for_a_place_turns_a_verdict_round(one, other, front, back):
    """Also one that hits the end of the scale: any rising scale for each place."""
    front, back = sorted(front), sorted(back)

    def scored(first, second):
        return f"SCORES CODE {front[int(first) - 1]} {back[int(second) - 1]}"

    margin = compare("scores", scored, str(one), str(other))
    assert margin * (other - one) >= 0


@pytest.mark.parametrize("liked", ["A", "B"])
def test_preferring_a_place_is_a_tie(liked):
    assert compare("preference", lambda a, b: f"VERDICT CODE {liked}", "x", "y") == 0


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        (("A", "B"), -1),
        (("B", "A"), 1),
        (("A", "TIE"), 0),
        (("TIE", "A"), 0),
        (("TIE", "TIE"), 0),
    ],
)
def test_preferences_count_where_both_orders_agree(replies, expected):
    said = iter(replies)
    assert compare("preference", lambda a, b: f"VERDICT CODE {next(said)}", "x", "y") == expected


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "SCORES CODE 7",
        "I cannot judge that.",
        "VERDICT CODE A",
        cut("SCORES CODE 7 4"),
        broken("429"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_one_bad_reply_leaves_no_verdict(bad, first):
    said = iter([bad, "SCORES CODE 7 4"] if first else ["SCORES CODE 7 4", bad])
    assert compare("scores", lambda a, b: next(said), "x", "y") is None


def test_each_answer_stands_first_once_and_the_code_is_the_questions_own():
    writer = FakeWriter(lambda question, index: "")
    judge = Judge(
        writer=writer,
        by="scores",
        principle="Be fair.",
        template=TEMPLATE,
        sampling=Sampling(),
        seed=0,
    )
    pairs = [
        Pair(name=str(k), prompt=(Turn(text="Q"),), incumbent="x", challenger="y") for k in range(3)
    ]
    items = [(0, pairs[0]), (1, None), (2, pairs[1]), (3, pairs[2]), (4, None)]
    found = list(judge.compare(items))
    assert [item for item, _ in found] == [0, 1, 2, 3, 4]
    assert [verdict is None for _, verdict in found] == [False, True, False, False, True]
    seen = [parts(question) for question in writer.questions]
    assert [answers for _, answers in seen] == [["x", "y"], ["y", "x"]] * 3
    assert len({code for code, _ in seen}) == 3
    assert len({question.id for question in writer.questions}) == 6
    assert "Be fair." in writer.questions[0].prompt[0].text


def test_what_stands_in_a_text_is_no_place():
    assert filled("{a}{b} {A} {} {a b}", a="{b}", b="{a}") == "{b}{a} {A} {} {a b}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{question}", "has no place {form}"),
        ("{question} {form} {questoin}", "unknown place {questoin}; did you mean 'question'"),
        (b"\xff", "not UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_template_is_checked(tmp_path, text, reason):
    if text is not None:
        (tmp_path / "t.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match=reason) as error:
        template_text("t.txt", "", tmp_path, ("question", "form"))
    assert error.value.field == "template"


def test_a_template_is_found_beside_the_recipe(tmp_path):
    (tmp_path / "t.txt").write_text("{question}, {form}")
    assert template_text("t.txt", "", tmp_path, ("question", "form")) == "{question}, {form}"
    assert template_text(None, "ours", tmp_path, ("question",)) == "ours"


def test_draws_are_the_steps_own():
    one, other = (draws(0, step, temperature=1.0, max_tokens=9) for step in ("a", "b"))
    assert one.seed != other.seed
    assert max(one.seed, other.seed) < 2**31
    assert one == draws(0, "a", temperature=1.0, max_tokens=9)
