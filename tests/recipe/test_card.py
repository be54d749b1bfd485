"""What is known of generated rows: each reply counts once, and failures fall into few kinds."""

import pytest

from limbeck.core.exchange import Reply
from limbeck.core.types import Turn
from limbeck.recipe.card import Tally, kind_of
from limbeck.synth.rows import Row, to_json


def reply(question="q", tokens=24, usd: float | None = 0.5, **more):
    return Reply(
        question=question,
        index=0,
        text="x",
        finish="stop",
        model="big-1",
        prompt_tokens=9,
        completion_tokens=tokens,
        usd=usd,
        **more,
    )


def row(name, *entries, failure=None):
    """A row that replies have a part in; each is (reply, what else the entry says)."""
    made = Row(id=name, prompt=(Turn(text=name),), completion="x", failure=failure)
    for said, more in entries:
        made = made.made_by("grounded", "t", said, **more)
    return made


def tallied(*rows, servers=("t",)):
    tally = Tally(servers=servers)
    for one in rows:
        tally.add(one, to_json(one))
    return tally


def test_a_reply_of_which_several_rows_came_counts_once():
    """Its tokens, its version and its price; the place in its list does not make it another one."""
    rows = [row(str(k), (reply(), {"item": k})) for k in range(4)]
    found = tallied(*rows)
    assert (found.rows, found.tokens, found.usd) == (4, 24, 0.5)
    assert found.models == {"t": {"big-1": 1}}


def test_replies_to_several_questions_or_in_several_parts_each_count():
    rows = [
        row("a", (reply("q"), {"part": "same"}), (reply("q"), {"part": "answer"})),
        row("b", (reply("r", tokens=1), {})),
    ]
    assert tallied(*rows).tokens == 24 + 24 + 1
    assert tallied(*rows).usd == 1.5


def test_a_reply_is_written_for_rows_that_are_fit_and_paid_for_all():
    """One that came first to a failed row still counts for the fit row behind it."""
    bad, good = row("a", (reply(), {}), failure="no"), row("b", (reply(), {}))
    assert (tallied(bad).tokens, tallied(bad).usd) == (0, 0.5)
    assert (tallied(bad, good).tokens, tallied(bad, good).usd) == (24, 0.5)


def test_one_unknown_price_makes_the_sum_unknown_and_models_here_cost_nothing():
    rows = [row("a", (reply("q"), {})), row("b", (reply("r", usd=None), {})), row("c")]
    assert tallied(*rows).usd is None
    assert tallied(*rows, servers=()).usd == 0.0


@pytest.mark.parametrize(
    ("failures", "kind"),
    [
        (["repeats 'what-is-gravity'", "repeats 'who'", 'repeats "it\'s-me"'], "repeats …"),
        (["it is too near to 'a-b' (ROUGE-L 0.91)"], "it is too near to …"),
        (["it is 0.5 of the teacher's 'own' text"], "it is … of the teacher's … text"),
        (["ended by 'refusal'"], "ended by 'refusal'"),  # one of a few words, and the reason
        (["it ended with 'length'"], "it ended with 'length'"),
    ],
)
def test_a_kind_of_failure_leaves_out_the_names_that_it_quotes(failures, kind):
    assert {kind_of(failure) for failure in failures} == {kind}
