"""The step `self_instruct`: a pool that grows by what passes, and the same one every time."""

import random
import re
import sys

import pytest
from fakes import FakeWriter, broken, cut, good, prompt, row, run_step
from hypothesis import given
from hypothesis import strategies as st
from making import check_stopping, hostile

from limbeck.core.errors import RecipeError
from limbeck.core.types import Turn
from limbeck.synth.self_instruct import Pool, SelfInstruct, listed
from limbeck.synth.step import files_of
from limbeck.synth.words import words

SEEDS = [
    "Name three rivers in Europe.",
    "Explain to a child why leaves turn yellow.",
    "Write a short poem on a lighthouse keeper.",
    "Sort these numbers: 5, 3, 9.",
    "What does a baker do before dawn?",
    "Translate 'good morning' into Spanish.",
    "Give two reasons for learning to swim.",
]
VERBS = "describe compare list invent praise question summarise draft outline rate".split()
THINGS = [a + b for a in "mo ka li su te ba".split() for b in "ran dil nok pes gum tav".split()]


def seeds(count=7, **more):
    return [
        row(f"s{k}", prompt=prompt(text + "\n\n"), **more) for k, text in enumerate(SEEDS[:count])
    ]


def inventive(question, index):
    """Seven-word instructions of its own invention, by the question."""
    del index
    text = question.prompt[0].text
    draw = random.Random(text)
    count = int(re.search(r"Come up with (\d+)", text)[1])
    lines = [
        f"{k}. {draw.choice(VERBS)} {' '.join(draw.sample(THINGS, 6))}."
        for k in range(1, count + 1)
    ]
    return "Here you are:\n" + "\n".join(lines)


def new(rows):
    return [one for one in rows if one.id.startswith("self_instruct-")]


def test_new_instructions_follow_the_seeds():
    writer = FakeWriter(inventive)
    step = SelfInstruct(teacher="api", make=20, together=2, per_request=4)
    made, desk = run_step(step, seeds(), {"api": writer})
    assert made[:7] == seeds()
    kept = good(new(made))
    assert len(kept) == desk.counts["new instructions"] == 20
    assert len({one.id for one in made}) == len(made)
    assert all(one.prompt[0].text.endswith(".\n\n") for one in kept)  # as the seeds do
    (entry,) = kept[0].source
    assert (entry["step"], entry["teacher"], entry["item"]) == ("self_instruct", "api", 1)
    assert (entry["temperature"], entry["top_p"], entry["model"]) == (0.7, 0.5, "fake-1")
    assert {(s.temperature, s.top_p) for s, _ in writer.samplings} == {(0.7, 0.5)}
    assert len({s.seed for s, _ in writer.samplings}) == len(writer.samplings)  # a round each
    again, _ = run_step(step, seeds(), {"api": FakeWriter(inventive, window=1)})
    assert again == made
    other, _ = run_step(step, seeds(), {"api": FakeWriter(inventive)}, seed=1)
    assert other != made


def test_seeds_and_new_ones_are_shown_as_examples():
    writer = FakeWriter(inventive)
    step = SelfInstruct(teacher="api", make=60, together=3, human=3, machine=2)
    made, _ = run_step(step, seeds(), {"api": writer})
    own = {one.prompt[0].text.strip() for one in good(new(made))}
    for number, question in enumerate(writer.questions):
        found = re.findall(r"^\d+\. (.*)$", question.prompt[0].text, re.MULTILINE)
        assert len(set(found)) == 5
        assert len(set(found) & own) == (0 if number < 3 else 2)
        assert set(found) <= own | set(SEEDS)


def test_what_passes_is_as_far_from_all_others_as_it_should():
    vocabulary = "name the a river lake hill in of north south please now".split()

    def say(question, index):
        draw = random.Random(question.prompt[0].text)
        return "\n".join(f"{k}. {' '.join(draw.choices(vocabulary, k=6))}" for k in range(1, 9))

    step = SelfInstruct(teacher="api", make=40, attempts=2)
    made, desk = run_step(step, seeds(2), {"api": FakeWriter(say)})
    kept = [words(one.prompt[0].text) for one in good(made)]
    assert len(kept) > 4
    assert max(rouge(a, b) for k, a in enumerate(kept) for b in kept[:k]) <= 0.7
    texts = {one.id: words(one.prompt[0].text) for one in made}
    failed = [one for one in made if one.failure and "too near" in one.failure]
    assert len(failed) > 10
    for one in failed:
        name, said = re.search(r"too near to '(.*)' \(ROUGE-L (.*)\)", one.failure).groups()
        assert rouge(texts[name], texts[one.id]) == pytest.approx(float(said), abs=0.006)
        assert float(said) >= 0.7


def rouge(a, b):
    """ROUGE-L's F from a table of the longest common subsequence."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            )
    return 2 * table[-1][-1] / (len(a) + len(b)) if a or b else 0.0


SENTENCES = st.lists(st.sampled_from("a b c d".split()), min_size=1, max_size=8)


@given(st.lists(SENTENCES, min_size=1, max_size=6), SENTENCES)
def test_the_nearest_of_a_pool(pool, found):
    rows = [row(f"s{k}", prompt=prompt(" ".join(text))) for k, text in enumerate(pool)]
    expected = max(rouge(text, found) for text in pool)
    nearest = Pool(rows).nearest(found, 0.5)
    assert (nearest is not None) == (expected > 0.5)
    if nearest is not None:
        name, near = nearest
        assert near == pytest.approx(expected)
        assert rouge(pool[int(name[1:])], found) == pytest.approx(near)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Name a river.", "it has 3 words"),
        ("word " * 151, "it has 151 words"),
        ("Name " + "x" * 3030, "it has 151 words"),
        ("- name a very long river", "it begins with punctuation"),
        ("Draw what you can see outside.", "it has the word 'draw'"),
        ("Describe the Picture, and its frame", "it has the word 'picture'"),
        ("Name three rivers in Europe!", "it is too near to 's0' (ROUGE-L 1.00)"),
    ],
)
def test_what_does_not_pass_says_why(said, reason):
    step = SelfInstruct(teacher="api", make=1, attempts=1)
    made, desk = run_step(step, seeds(), {"api": FakeWriter(lambda *_: f"1. {said}")})
    assert [one.failure for one in new(made)] == [reason]
    assert desk.counts["instructions that were left out"] == 1
    assert desk.counts["instructions that are missing"] == 1


def test_it_gives_up_where_nothing_new_comes():
    writer = FakeWriter(lambda *_: "1. Say hello to all of us.")
    step = SelfInstruct(teacher="api", make=100, together=3, attempts=4)
    made, desk = run_step(step, seeds(), {"api": writer})
    assert len(good(new(made))) == 1
    assert len(writer.questions) == 3 * (1 + 4)
    assert desk.counts["rounds of requests"] == 5
    assert desk.counts["instructions that are missing"] == 99


@pytest.mark.parametrize(
    ("said", "count", "kept"),
    [
        ("Sure!", "unparsable lists", 0),
        ("1. Sing of a quiet sea.\n3. Hum of a loud street.", "unparsable lists", 0),
        (broken("time-out"), "requests without an answer", 0),
        (cut("1. Sing of a quiet sea.\n2. Hum of a lo"), "lists that were cut", 1),
        (cut("1. Sing of a qu"), "unparsable lists", 0),
    ],
)
def test_replies_that_are_no_list_are_counted(said, count, kept):
    step = SelfInstruct(teacher="api", make=2, together=1, attempts=1)
    made, desk = run_step(step, seeds(), {"api": FakeWriter(lambda *_: said)})
    assert len(good(new(made))) == kept
    assert desk.counts[count] >= 1


def test_no_more_are_taken_than_were_asked_for():
    say = FakeWriter(inventive)
    step = SelfInstruct(teacher="api", make=5, per_request=4)
    made, _ = run_step(step, seeds(), {"api": say})
    assert len(good(new(made))) == 5
    assert len(say.questions) == 2  # not the eight of a whole round
    many = "\n".join(f"{k}. {THINGS[k]} {THINGS[-k]} is it one?" for k in range(1, 30))
    made, _ = run_step(step, seeds(), {"api": FakeWriter(lambda *_: many)})
    assert len(new(made)) <= 4 * len(say.questions) * 6


def test_conversations_and_seeds_that_are_left_out():
    chats = [row("s", prompt=(Turn(text=SEEDS[0], role="user"),)), row("x", "a", prompt=())]
    step = SelfInstruct(teacher="api", make=3, keep=False)
    made, _ = run_step(step, chats, {"api": FakeWriter(inventive)})
    assert {one.id: one.failure for one in made if not one.id.startswith("self")} == {
        "s": "a seed; what was made from it is kept",
        "x": "a seed needs a prompt",
    }
    assert [one.prompt[0].role for one in good(made)] == ["user"] * 3
    assert not run_step(step, [], {})[0]


def test_a_name_that_a_seed_has_is_not_given_twice():
    rows = [row("self_instruct-0", prompt=prompt(SEEDS[0]))]
    made, _ = run_step(SelfInstruct(teacher="api", make=2), rows, {"api": FakeWriter(inventive)})
    assert len({one.id for one in made}) == len(made)


def test_line_breaks_in_examples_do_not_break_the_list():
    assert listed(["a\n2. b", "c"]) == "1. a 2. b\n2. c"


@pytest.mark.parametrize("seed", range(3))
def test_a_hostile_teacher_is_survived(seed):
    step = SelfInstruct(teacher="api", make=30, together=3)
    say = hostile(seed, inventive)
    made, _ = run_step(step, seeds(), {"api": FakeWriter(say)})
    assert len(good(new(made))) == 30
    assert all(len(one.prompt[0].text) < 1000 for one in good(made))
    only, _ = run_step(step, seeds(), {"api": FakeWriter(hostile(seed))})
    assert {one.prompt[0].text.strip() for one in good(new(only))} <= {
        "Name a river in the north of Europe.",  # whole, in a list that was cut behind it
    }


def test_stopped_and_run_again(tmp_path):
    def make():
        return SelfInstruct(teacher="api", make=40, together=3, per_request=4)

    check_stopping(make, seeds(), hostile(1, inventive), tmp_path)


def test_without_rapidfuzz_nothing_is_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    writer = FakeWriter(inventive)
    with pytest.raises(RecipeError, match=r"pip install 'limbeck\[synth\]'"):
        run_step(SelfInstruct(teacher="api", make=2), seeds(), {"api": writer})
    assert not writer.questions


def test_fields_that_do_not_fit():
    with pytest.raises(RecipeError, match="max_words"):
        SelfInstruct(teacher="t", make=1, min_words=9, max_words=3)


def test_a_template_of_ones_own(tmp_path):
    from limbeck.synth.step import Desk

    path = tmp_path / "mine.txt"
    path.write_text("{number} more like:\n{examples}\nCome up with 2")
    writer = FakeWriter(inventive)
    step = SelfInstruct(teacher="api", make=2, template="mine.txt")
    desk = Desk(seed=0, writer=lambda _: writer, reader=None, folder=tmp_path)
    assert len(list(step.run(seeds(), desk))) >= 9
    assert writer.questions[0].prompt[0].text.startswith("8 more like:\n1. ")
    assert files_of(step) == ("mine.txt",)
