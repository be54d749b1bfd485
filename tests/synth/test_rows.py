"""Rows between the files that they come from and those that they become."""

from dataclasses import replace

import pytest
from fakes import FakeWriter, run_step

from limbeck.sources.dataset import to_sample
from limbeck.synth.answers import Answers
from limbeck.synth.quality import Quality
from limbeck.synth.rows import row_of, to_json

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


@pytest.mark.parametrize(
    "line",
    [
        {"messages": TALK},
        {"messages": TALK[:4]},  # without an answer to the last question
        {"messages": TALK[1:3]},
        {"prompt": TALK[:2], "completion": TALK[2:]},  # all of the completion is learnt
        {"prompt": "q", "completion": "a", "privileged": "the solution"},
        {"messages": TALK, "privileged": "the solution"},
        {"prompt": "q", "privileged": [{"role": "user", "content": "psst"}]},
        {"prompt": "q", "completion": "a", "rationale": "r ", "weight": 0.5, "group": "g"},
    ],
)
def test_what_no_step_changed_comes_out_as_it_came(line):
    """A filter must not change what is learnt, nor what a teacher may know."""
    came = to_sample(line, "x")
    (row,), _ = run_step(Quality(min_characters=0, degenerate=False), [row_of(came)])
    assert to_sample(to_json(row), "x") == came


def test_a_new_answer_to_a_conversation_is_learnt_alone():
    """What the others said before it was learnt as the data's own, not as this answer's."""
    row = row_of(to_sample({"messages": TALK}, "x"))
    writer = FakeWriter(lambda *_: "new")
    (made,), _ = run_step(Answers(teacher="t"), [row], {"t": writer})
    back = to_sample(to_json(made), "x")
    assert [(turn.text, turn.learn) for turn in back.turns] == [
        ("Be kind.", False),
        ("a", False),
        ("b", False),
        ("c", False),
        ("new", True),
    ]
    parted = replace(row, rationale="d", completion="")
    assert "messages" not in to_json(parted)


def test_what_only_a_teacher_reads_stays_with_an_answer_to_the_same_prompt():
    row = row_of(to_sample({"prompt": "q", "privileged": "the solution"}, "x"))
    (made,), _ = run_step(Answers(teacher="t"), [row], {"t": FakeWriter(lambda *_: "a")})
    assert to_json(made)["privileged"] == "the solution"
