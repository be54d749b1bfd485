"""The step `quality`: each rule alone, its edges, and what good text is."""

import json

import pytest
from fakes import good, prompt, row, run_step
from hypothesis import given
from hypothesis import strategies as st

from limbeck.core.errors import RecipeError
from limbeck.synth.quality import Quality, ascii_share, repeated

OFF = {
    "min_characters": 0,
    "degenerate": False,
    "repetition": None,
    "refusals": (),
    "forbidden": (),
}


def fault(text, **fields):
    found = Quality(**fields).fault(text)
    return found and found[0]


@pytest.mark.parametrize(
    ("fields", "bad", "fine"),
    [
        ({}, "", "7"),
        ({"min_characters": 5}, "four", "fours"),
        ({"max_characters": 5}, "sixsix", "fives"),
        ({}, "?!?!", "?!?!1"),
        ({}, "!", "x"),
        ({}, "aaaa", "aaa"),
        ({}, "I\u2019m sorry, but no.", "She says: I'm sorry."),
        ({}, "AS AN AI, I do not eat.", "Use it as an AI."),
        ({"refusals": ("nope",)}, "Nope.", "I'm sorry."),
        ({}, "Well, as an AI language model I do not know.", "A language model is a model."),
        ({"forbidden": ("###",)}, "a ### b", "a ## b"),
        ({}, "go on and " * 10, "go on, and do not say it twice or you will be told not to."),
        ({}, "xyxyxyxyxy" * 20, "abc" * 4),
        (
            {"ascii_letters": 0.5},
            "\u043f\u0440\u0438\u0432\u0435\u0442 hi",
            "caf\u00e9 1+1 \u2248 2",
        ),
        ({"must_end": True}, "It ends in the", "It ends."),
        ({"must_end": True}, "the answer is 7", 'He said "yes."'),
        ({"must_end": True}, "a, b,", "```\ncode\n```"),
        ({"must_end": True}, "\u597d", "\u597d\u3002"),
    ],
)
def test_a_rule_and_its_edge(fields, bad, fine):
    assert fault(bad, **fields) is not None
    assert fault(fine, **fields) is None


@given(st.text())
def test_with_all_rules_off_everything_is_fit(text):
    assert Quality(**OFF).fault(text) is None


@given(st.text(max_size=300))
def test_any_text_is_judged_and_again_the_same(text):
    made, _ = run_step(Quality(must_end=True, ascii_letters=0.3), [row("a", text)])
    again, _ = run_step(Quality(must_end=True, ascii_letters=0.3), good(made))
    assert again == good(made)


@given(st.lists(st.sampled_from("a b c d e".split()), max_size=40), st.integers(2, 5))
def test_repeating_a_text_repeats_its_runs(words, times):
    text = " ".join(words)
    assert 0 <= repeated(text) < 1
    if len(words) >= 11:
        assert repeated(" ".join([text] * times)) >= repeated(text)


def test_rows_are_counted_by_rule():
    rows = [row("a", ""), row("b", "!!!!"), row("c", "I cannot."), row("d", "Fine."), row("e", " ")]
    made, desk = run_step(Quality(), rows)
    assert [one.failure for one in made] == [
        "the completion is empty",
        "the completion has no letter and no digit",
        "the completion begins with 'i cannot'",
        None,
        "the completion is empty",
    ]
    assert desk.counts == {
        "completions that break the rule min_characters": 2,
        "completions that break the rule degenerate": 1,
        "completions that break the rule refusals": 1,
    }


def test_prompts_can_be_judged_and_rationales_belong_to_completions():
    rows = [row("a", prompt=prompt("!!!!")), row("b", prompt=prompt("Who?"))]
    made, _ = run_step(Quality(of="prompt"), rows)
    assert [one.failure is None for one in made] == [False, True]
    made, _ = run_step(Quality(min_characters=8), [row("a", "7", rationale="So it is ")])
    assert good(made)


def test_limits_must_fit():
    with pytest.raises(RecipeError, match="max_characters"):
        Quality(min_characters=9, max_characters=3)


def test_shares_of_letters():
    assert ascii_share("12 + 3") == 1
    assert ascii_share("a\u00e9") == 0.5


def test_good_solutions_pass(shared):
    """The defaults let real text through: the reference solutions of GSM8K."""
    lines = (shared / "data" / "gsm8k" / "test.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert not [text for text in answers if Quality().fault(text)]


def test_a_megabyte_is_judged():
    assert fault("word " * 200_000) == "repetition"
    assert fault("!" * 1_000_000) == "degenerate"
    assert fault("x" * 1_000_000, must_end=True) == "degenerate"
    assert fault(")" * 1_000_000 + "a", must_end=True) is not None
