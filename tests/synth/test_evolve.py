"""The step `evolve`, and what it eliminates."""

import re

import pytest
from fakes import FakeWriter, broken, cut, good, prompt, row, run_step
from hypothesis import given
from hypothesis import strategies as st
from making import check_stopping, hostile

from limbeck.core.errors import RecipeError
from limbeck.core.types import Turn
from limbeck.recipe.document import Document
from limbeck.recipe.resolve import resolve_generation
from limbeck.synth.elimination import bad_answer, bad_evolution
from limbeck.synth.evolve import WAYS, Evolve
from limbeck.synth.grouped import grouped
from limbeck.synth.template import ours

TEXTS = ["Name three rivers.", "Explain why leaves turn yellow.", "Sort 5, 3 and 9."]


def rows(count=3, **more):
    return [
        row(f"r{k}", prompt=prompt(text + "\n"), **more) for k, text in enumerate(TEXTS[:count])
    ]


def way_of(question):
    """Which template a question was made of."""
    text = question.prompt[-1].text
    starts = {way: ours(f"evolve_{way}").partition("{instruction}")[0] for way in WAYS}
    return next((way for way, start in starts.items() if text.startswith(start)), None)


def shown(question):
    """The instructions between the marks."""
    found = re.findall(
        r"\[BEGIN INSTRUCTION (\w+)\]\n(.*?)\n\[END INSTRUCTION \1\]",
        question.prompt[-1].text,
        re.DOTALL,
    )
    return [text for _, text in found]


def diligent(question, index):
    """Adds a word that says which way it was asked for; answers at length; tells texts apart."""
    del index
    way, texts = way_of(question), shown(question)
    if way is not None:
        return f"{texts[0]} And {way}{len(texts[0])}."
    if texts:
        return "EQUAL" if texts[0] == texts[1] else "DIFFERENT"
    return f"The answer to {question.prompt[-1].text.strip()!r} is long."


def test_each_row_evolves_round_by_round():
    writer = FakeWriter(diligent)
    made, desk = run_step(Evolve(teacher="api", rounds=3), rows(), {"api": writer})
    assert [one.id for one in made] == [
        f"r{k}{t}" for k in range(3) for t in ("", "~1", "~2", "~3")
    ]
    assert good(made) == made
    assert made[::4] == rows()
    for k in range(3):
        texts = [one.prompt[0].text for one in made[4 * k : 4 * k + 4]]
        for parent, child in zip(texts, texts[1:], strict=False):
            assert child.startswith(parent.rstrip())
            assert child.endswith(".\n")  # as its parent does
        assert [one.notes.get("parent") for one in made[4 * k :][:4]] == [
            None,
            f"r{k}",
            f"r{k}~1",
            f"r{k}~2",
        ]
    ways = [entry["part"] for entry in made[3].source]
    assert len(ways) == 3
    assert made[3].notes["evolved"] == ways[-1]
    assert f"{ways[-1]}" in made[3].prompt[0].text
    assert desk.counts["instructions that evolved"] == 9
    again, _ = run_step(Evolve(teacher="api", rounds=3), rows(), {"api": FakeWriter(diligent, 1)})
    assert again == made
    alone, _ = run_step(Evolve(teacher="api", rounds=3), rows()[1:2], {"api": FakeWriter(diligent)})
    assert alone == made[4:8]  # whoever stands beside it


def test_ways_are_drawn_evenly_from_those_that_are_named():
    many = [row(f"r{k}", prompt=prompt(f"Do thing number {k}.")) for k in range(400)]
    writer = FakeWriter(diligent)
    run_step(Evolve(teacher="api", rounds=1), many, {"api": writer})
    counts = [sum(way_of(q) == way for q in writer.questions) for way in WAYS]
    assert sum(counts) == 400
    assert all(50 < count < 110 for count in counts)
    writer = FakeWriter(diligent)
    run_step(Evolve(teacher="api", rounds=2, ways=("broaden",)), many[:5], {"api": writer})
    assert {way_of(q) for q in writer.questions} == {"broaden"}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("name THREE rivers!", "does not differ from what it was made of"),
        ("", "the answer of api is empty"),
        ("...", "has no word in it"),
        ("word " * 401, "is too long: 401 words"),
        ("The rewritten prompt is: name a lake.", "copies words of the request"),
        ("I'm sorry, I can't.", 'refuses: it begins with "i\'m sorry"'),
        (cut("Name three rivers which"), "the answer of api is not whole"),
        (broken("time-out"), "api gave no answer: time-out"),
    ],
)
def test_the_parent_of_one_that_is_eliminated_goes_on(said, reason):
    def say(question, index):
        return said if "/evolve1" in question.id else diligent(question, index)

    made, desk = run_step(Evolve(teacher="api", rounds=2), rows(1), {"api": FakeWriter(say)})
    assert [one.id for one in made] == ["r0", "r0~1", "r0~2"]
    assert made[1].failure.startswith(reason)
    assert made[1].source
    assert made[2].failure is None
    assert made[2].notes["parent"] == "r0"
    assert desk.counts["instructions that were eliminated"] == 1


def test_what_returns_to_an_ancestor_is_no_new_one():
    def say(question, index):
        return TEXTS[0] if "/evolve2" in question.id else diligent(question, index)

    made, _ = run_step(Evolve(teacher="api", rounds=3), rows(1), {"api": FakeWriter(say)})
    assert [one.failure is None for one in made] == [True, True, False, True]


def test_marks_that_are_copied_are_seen():
    def say(question, index):
        return question.prompt[0].text.partition("\n\n[")[2] + "and more"

    made, _ = run_step(Evolve(teacher="api", rounds=1), rows(1), {"api": FakeWriter(say)})
    assert made[1].failure == "copies words of the request"


def test_a_phrase_that_was_there_before_may_stay():
    text = "Improve the given prompt: a cat."
    many = [row("r", prompt=prompt(text))]
    made, _ = run_step(Evolve(teacher="api", rounds=2), many, {"api": FakeWriter(diligent)})
    assert good(made) == made


def test_the_teacher_may_call_it_equal():
    said = {"r0~1/same": "EQUAL", "r1~1/same": "NOT EQUAL", "r2~1/same": cut("DIFFERENT")}

    def say(question, index):
        return said.get(question.id) or diligent(question, index)

    step = Evolve(teacher="api", rounds=2, compare=True)
    made, desk = run_step(step, rows(), {"api": FakeWriter(say)})
    failures = {one.id: one.failure for one in made if one.failure}
    assert failures == {
        "r0~1": "api calls it equal to its parent",
        "r1~1": "api did not say whether it differs",
        "r2~1": "api did not say whether it differs",
    }
    assert desk.counts["unparsable comparisons"] == 2
    assert [entry["part"] == "same" for entry in made[2].source] == [False, True]


def test_answers_become_completions_and_eliminate():
    said = {
        "r0~1/answer": "Sorry, what?",
        "r1~1/answer": "It is what it is...",
        "r2/answer": cut("Well"),
    }

    def say(question, index):
        return said.get(question.id) or diligent(question, index)

    step = Evolve(teacher="api", rounds=2, answer=True)
    many = [*rows(), row("known", "42", prompt=prompt("Six by seven?"), answer="42")]
    made, _ = run_step(step, many, {"api": FakeWriter(say)})
    by = {one.id: one for one in made}
    assert list(by) == [
        "r0",
        "r0~1",
        "r0~2",
        "r1",
        "r1~1",
        "r1~2",
        "r2",
        "known",
        "known~1",
        "known~2",
    ]
    assert by["r0~1"].failure == "its answer is sorry, and short"
    assert by["r1~1"].failure == "its answer says nothing: stop words alone"
    assert by["r2"].failure.startswith("the answer of api is not whole")
    assert by["known"] == many[-1]
    assert all("is long" in one.completion for one in good(made) if one.id != "known")
    assert by["known~2"].answer is None
    assert [entry["part"] == "answer" for entry in by["known~2"].source] == [False, False, True]


def test_it_is_the_last_turn_that_evolves():
    turns = (
        Turn(text="Be kind.", role="system"),
        Turn(text="Hello.", role="user"),
        Turn(text="Hello!", role="assistant"),
        Turn(text="Name a river.", role="user"),
    )
    writer = FakeWriter(diligent)
    made, _ = run_step(Evolve(teacher="api", rounds=1), [row("r", prompt=turns)], {"api": writer})
    assert made[1].prompt[:3] == turns[:3]
    assert made[1].prompt[3].text.startswith("Name a river. And")
    assert made[1].prompt[3].role == "user"
    assert [turn.role for turn in writer.questions[0].prompt] == ["user"]
    none = row("n", "text", prompt=())
    assert run_step(Evolve(teacher="api"), [none], {"api": writer})[0] == [none]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fields", [{}, {"compare": True}, {"compare": True, "answer": True}])
def test_a_hostile_teacher_is_survived(seed, fields):
    step = Evolve(teacher="api", rounds=3, **fields)
    many = [row(f"r{k}", prompt=prompt(f"Name river {k}.")) for k in range(12)]
    made, _ = run_step(step, many, {"api": FakeWriter(hostile(seed, diligent))})
    assert len({one.id for one in made}) == len(made)
    assert {one.id for one in made} >= {one.id for one in many}
    for one in good(made):
        assert len(one.prompt[0].text) < 3000
        assert not fields.get("answer") or one.completion.strip()
    only, _ = run_step(step, many, {"api": FakeWriter(hostile(seed))})
    if fields.get("compare"):
        assert not [one for one in good(only) if "~" in one.id]


@pytest.mark.parametrize("fields", [{}, {"compare": True, "answer": True}])
def test_stopped_and_run_again(tmp_path, fields):
    def make():
        return Evolve(teacher="api", rounds=2, **fields)

    many = [row(f"r{k}", prompt=prompt(f"Name river {k}.")) for k in range(6)]
    check_stopping(make, many, hostile(5, diligent), tmp_path)


def test_it_streams():
    """A long stream of rows is not read to its end before the first comes out."""
    drawn = []

    def endless():
        for k in range(10**9):
            drawn.append(k)
            yield row(f"r{k}", prompt=prompt(f"Name river {k}."))

    from limbeck.synth.step import Desk

    desk = Desk(seed=0, writer=lambda _: FakeWriter(diligent), reader=None)
    step = Evolve(teacher="api", rounds=3, compare=True, answer=True)
    made = step.run(endless(), desk)
    for _ in range(40):
        next(made)
    assert len(drawn) < 40


def test_templates_of_ones_own(tmp_path):
    (tmp_path / "deeper.txt").write_text("Deeper! {instruction}")
    (tmp_path / "bad.txt").write_text("Deeper!")
    writer = FakeWriter(lambda *_: "Name nine rivers.")
    from limbeck.synth.step import Desk

    desk = Desk(seed=0, writer=lambda _: writer, reader=None, folder=tmp_path)
    step = Evolve(teacher="t", rounds=1, ways=("deepen",), templates={"deepen": "deeper.txt"})
    assert step.files == ("deeper.txt",)
    assert len(list(step.run(rows(1), desk))) == 2
    assert writer.questions[0].prompt[0].text.startswith("Deeper! [BEGIN")
    step = Evolve(teacher="t", templates={"same": "bad.txt"})
    with pytest.raises(RecipeError, match=r"templates.same: bad.txt: has no place \{first\}"):
        list(step.run(rows(1), desk))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"ways": ["deeper"]}, "ways.0"),
        ({"ways": []}, "ways"),
        ({"templates": {"deeper": "x.txt"}}, "templates"),
        ({"rounds": 0}, "rounds"),
    ],
)
def test_a_wrong_field_is_named(change, field):
    step = {"kind": "evolve", "teacher": "t", **change}
    source = {"kind": "generated", "path": "x", "of": {"path": "y.jsonl"}, "steps": [step]}
    with pytest.raises(RecipeError) as error:
        resolve_generation(Document({"source": source}, {}))
    assert error.value.field.startswith(f"source.steps.0.{field}")


@given(st.text(max_size=60))
def test_no_text_is_a_new_version_of_itself(text):
    assert bad_evolution(f" {text.upper()}!", [text.upper()], max_words=99, copied=[]) is not None


@given(st.text(), st.integers(0, 5))
def test_an_answer_that_passes_a_stricter_rule_passes_a_milder_one(text, limit):
    for said in (text, f"sorry {text}"):
        assert bad_answer(said, limit) is None or bad_answer(said, limit + 3) is not None


def test_a_long_answer_may_be_sorry():
    text = "I am sorry to hear that your cat ran away; " + "look under beds " * 30
    assert bad_answer(text, 80) is None
    assert bad_answer("Sorry about your cat.", 80) is not None
    assert bad_answer("Sorry about your cat.", 4) is None


def test_a_phrase_may_stay_whatever_its_capitals():
    many = [row("r", prompt=prompt("Explain Given Context."))]
    step = Evolve(teacher="api", rounds=1, copied=("Given Context",))
    made, _ = run_step(step, many, {"api": FakeWriter(diligent)})
    assert good(made) == made


def test_rows_of_a_group_stay_together():
    """A step that takes groups would refuse them, after everything was paid."""
    many = [*rows(2, group="p"), *(row(f"s{k}", prompt=prompt(TEXTS[2])) for k in range(2))]
    made, _ = run_step(Evolve(teacher="api", rounds=2), many, {"api": FakeWriter(diligent)})
    assert [one.id for one in made] == [
        *("r0", "r1", "r0~1", "r0~2", "r1~1", "r1~2"),
        *("s0", "s0~1", "s0~2", "s1", "s1~1", "s1~2"),
    ]
    assert [len(group) for group in grouped(made)] == [2] + [1] * 10
