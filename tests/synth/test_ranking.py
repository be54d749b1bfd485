"""The order in which teacher and student agree, and what a step makes of it."""

import json
import re
from collections import Counter
from itertools import combinations, permutations

import pytest
import torch
from fakes import FakeReader, FakeWriter, broken, cut, good, prompt, row, run_step
from hypothesis import given, settings
from hypothesis import strategies as st
from injections import INJECTIONS, parts, with_code

from limbeck.core.errors import DataError, RecipeError
from limbeck.core.specs import LocalTeacher
from limbeck.models.load import load_teacher
from limbeck.synth.judging import UNPARSABLE
from limbeck.synth.ranking import Rank, agreement

# --- agreement --------------------------------------------------------------------------------


@given(st.permutations(range(6)))
def test_a_ranking_agrees_with_itself(ranking):
    assert agreement([ranking, ranking]) == ranking
    assert agreement([ranking]) == ranking


@given(st.permutations(range(6)))
def test_with_its_reverse_it_agrees_on_one(ranking):
    assert agreement([ranking, ranking[::-1]]) == ranking[:1]


def in_order(things, ranking):
    places = [ranking.index(thing) for thing in things]
    return places == sorted(places)


@given(
    st.integers(1, 5).flatmap(lambda k: st.lists(st.permutations(range(k)), min_size=1, max_size=3))
)
def test_it_is_the_longest_common_subsequence(rankings):
    """Against a search through all subsequences, longest first."""
    found = agreement(rankings)
    assert all(in_order(found, ranking) for ranking in rankings)
    longest = next(
        size
        for size in range(len(rankings[0]), 0, -1)
        for some in combinations(rankings[0], size)
        if all(in_order(some, ranking) for ranking in rankings)
    )
    assert len(found) == longest
    assert found == agreement([list(ranking) for ranking in rankings])


def test_for_two_rankings_it_is_the_textbook_table():
    for other in permutations(range(4)):
        first, table = (2, 0, 3, 1), [[0] * 5 for _ in range(5)]
        for i, a in enumerate(first):
            for j, b in enumerate(other):
                table[i + 1][j + 1] = (
                    table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
                )
        assert len(agreement([first, other])) == table[4][4]


def test_nothing_ranked():
    assert agreement([[], []]) == []


# --- the step ---------------------------------------------------------------------------------


def by_teacher(text):
    """Answers look like `t3 s1`: how good teacher and student find them."""
    return int(re.findall(r"t(\d+)", text)[-1])


def ranks(question, index):
    """A teacher that knows, and gives its reasons."""
    del index
    code, answers = parts(question)
    order = sorted(range(len(answers)), key=lambda place: -by_teacher(answers[place]))
    return f"Because.\nRANKING {code} {' '.join(str(place + 1) for place in order)}"


def student(**more):
    """Finds each token of an answer as likely as its number `s` says."""

    def logp(text, start, end):
        del start, end
        return -1.0 / int(re.findall(r"s(\d+)", text)[-1])

    return FakeReader(lambda text: re.findall(r"\s*\S+|\s+$", text), logp, **more)


def group(name, *texts):
    return [
        row(f"{name}#{k}", text, group=name, prompt=prompt(f"{name}?\n"))
        for k, text in enumerate(texts)
    ]


def run(rows, say=ranks, reader=None, **fields):
    writer = FakeWriter(say)
    found, desk = run_step(
        Rank(teacher="api", **fields), rows, {"api": writer}, {"student": reader or student()}
    )
    return found, desk, writer


def test_those_in_agreement_are_scored_and_the_others_fail():
    rows = group("a", "t1 s1", "t4 s4", "t2 s3", "t3 s2")  # 4 > 3|2 > 1
    found, desk, writer = run(rows)
    assert [(one.id, one.score, one.channel) for one in good(found)] == [
        ("a#1", 2.0, "best"),
        ("a#3", 1.0, "rest"),
        ("a#0", 0.0, "rest"),
    ]
    assert all(one.group == "a" for one in found)
    (other,) = [one for one in found if one.failure]
    assert other.id == "a#2"
    assert "not in the order" in other.failure
    assert other.score is None
    assert (other.notes["teacher_rank"], other.notes["student_rank"]) == (3, 2)
    assert len(writer.questions) == 2
    assert desk.counts["answers in agreement"] == 3
    assert [entry["step"] for entry in found[0].source] == ["rank", "rank"]


def test_the_students_score_is_a_mean_over_tokens():
    found, _, _ = run(group("a", "t2 s2", "t1 and much more to say s1"))
    assert [one.notes["student_logp"] for one in found] == [-0.5, -1.0]


def test_the_same_order_ranks_all_and_opposite_ones_none():
    found, _, _ = run(group("a", "t1 s1", "t2 s2", "t3 s3"))
    assert [one.score for one in found] == [2, 1, 0]
    found, desk, _ = run(group("a", "t1 s3", "t2 s2", "t3 s1"))
    assert all("agree on 1 of 3" in one.failure for one in found)
    assert desk.counts["prompts without agreement"] == 1
    found, _, _ = run(group("a", "t1 s3", "t2 s2", "t3 s1"), least=1)
    assert [(one.id, one.channel) for one in good(found)] == [("a#2", "best")]


def places(question, index):
    """A teacher that finds what stands first the best."""
    del index
    code, answers = parts(question)
    return f"RANKING {code} {' '.join(str(k + 1) for k in range(len(answers)))}"


def test_a_liking_for_places_orders_nothing():
    rows = group("a", "t1 s3", "t2 s2", "t3 s1")
    found, _, _ = run(rows, places)
    assert all("agree on 1 of 3" in one.failure for one in found)
    found, _, writer = run(rows, places, both_orders=False)
    assert len(good(found)) == 3  # which asking once does not see
    assert len(writer.questions) == 1


@pytest.mark.parametrize(
    "bad", ["RANKING 1 2", "RANKING CODE 1 1", "2 1", "", cut("RANKING CODE 1 2"), broken("503")]
)
@pytest.mark.parametrize("which", ["a/rank", "a/rank/backwards"])
def test_unparsable_is_excluded_and_counted(bad, which):
    def say(question, index):
        if question.id == which:
            return with_code(bad, parts(question)[0])
        return ranks(question, index)

    found, desk, _ = run([*group("a", "t1 s1", "t2 s2"), *group("b", "t1 s1", "t2 s2")], say)
    assert [one.id for one in good(found)] == ["b#1", "b#0"]
    assert all("no ranking in the form" in one.failure for one in found if one.group == "a")
    assert desk.counts[UNPARSABLE] == 1


def test_nobody_is_asked_about_a_single_answer():
    rows = [
        *group("a", "t1 s1"),
        *group("b", "t1 s1", "t1 s1", "  "),
        row("alone", "t1 s1"),
        *group("c", "t1 s1", "t2 s2"),
    ]
    found, _, writer = run(rows)
    assert Counter(one.id for one in found) == Counter(one.id for one in rows)
    assert [one.id for one in good(found)] == ["c#1", "c#0"]
    reasons = {one.id: one.failure for one in found}
    assert "no other answer" in reasons["a#0"]
    assert "no other answer" in reasons["alone"]
    assert reasons["b#1"] == "the same answer as b#0"
    assert "no answer to rank" in reasons["b#2"]
    assert len(writer.questions) == 2


def test_what_the_student_cannot_read_is_not_ranked():
    rows = group("a", "t1 s1", "t2 s2", "t3 " + "word " * 30 + "s3")
    found, _, _ = run(rows, reader=student(longest=12))
    assert [one.id for one in good(found)] == ["a#1", "a#0"]
    assert "cannot read so long a text" in found[-1].failure


def test_groups_that_stand_apart_are_refused():
    with pytest.raises(DataError, match="stand apart"):
        run([*group("a", "t1 s1", "t2 s2"), *group("b", "t1 s1"), *group("a", "t3 s3")])


@settings(max_examples=30)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
        max_size=5,
    ),
    st.integers(1, 4),
)
def test_every_row_comes_out_once_and_the_same_again(sizes, together):
    rows = [
        one
        for k, pairs in enumerate(sizes)
        for one in group(f"g{k}", *(f"t{t} s{s}" for t, s in pairs))
    ]
    found, _, _ = run(rows, together=together)
    assert Counter(one.id for one in found) == Counter(one.id for one in rows)
    assert found == run(rows, together=together)[0]
    for one in good(found):
        mine = [other for other in good(found) if other.group == one.group]
        assert len(mine) >= 2
        assert sorted(other.score for other in mine) == list(range(len(mine)))


# --- demonstrations ---------------------------------------------------------------------------


def shown(question):
    """The examples in a question, each the texts with the best first."""
    text = question.prompt[0].text
    code = parts(question)[0]
    found = []
    for part in text.split("An example of a ranking.")[1:]:
        marks = rf"\[BEGIN ANSWER \d+ {code}\]\n(.*?)\n\[END"
        part, _, rest = part.partition("The ranking of these answers, the best first: ")
        texts = re.findall(marks, part, re.DOTALL)
        found.append([texts[int(number) - 1] for number in rest.split("\n")[0].split(", ")])
    return found


def test_the_newest_agreement_is_shown_with_the_next_prompt():
    rows = [
        *group("a", "t1 s1", "t3 s3", "t2 s9"),
        *group("b", "t1 s2", "t2 s1"),  # no agreement
        *group("c", "t7 s7", "t8 s8"),
        *group("d", "t1 s1", "t2 s2"),
    ]
    _, _, writer = run(rows, together=1)
    seen = {question.id: shown(question) for question in writer.questions}
    assert seen["a/rank"] == []
    assert seen["b/rank"] == seen["b/rank/backwards"] == [["t3 s3", "t1 s1"]]
    assert seen["c/rank"] == [["t3 s3", "t1 s1"]]
    assert seen["d/rank"] == [["t8 s8", "t7 s7"]]
    _, _, writer = run(rows, together=1, shown=2)
    assert shown(writer.questions[-1]) == [["t3 s3", "t1 s1"], ["t8 s8", "t7 s7"]]
    _, _, writer = run(rows, together=1, shown=0)
    assert not any(shown(question) for question in writer.questions)


def test_prompts_that_are_asked_together_see_the_same_examples():
    rows = [one for name in "abcde" for one in group(name, f"t1 s1 {name}", f"t2 s2 {name}")]
    _, _, writer = run(rows, together=2)
    seen = [shown(question) for question in writer.questions[::2]]
    assert seen == [[], [], *[[["t2 s2 b", "t1 s1 b"]]] * 2, [["t2 s2 d", "t1 s1 d"]]]


def test_examples_of_a_file_are_always_shown(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps({"prompt": "x?", "answers": ["very good", "good", "bad"]}) + "\n\n")
    _, _, writer = run(group("a", "t1 s1", "t2 s2"), examples=str(path))
    assert shown(writer.questions[0]) == [["very good", "good", "bad"]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", ":1: not {prompt"),
        ("[]", ":1: not {prompt"),
        ('{"prompt": "x"}', ":1: not {prompt"),
        ('{"prompt": "x", "answers": ["one"]}', ":1: not {prompt"),
        ('{"prompt": "x", "answers": ["one", 2]}', ":1: not {prompt"),
        (None, "No such file"),
    ],
)
def test_a_bad_file_of_examples(tmp_path, line, reason):
    path = tmp_path / "examples.jsonl"
    if line is not None:
        path.write_text(line)
    with pytest.raises(RecipeError, match=re.escape(reason)):
        run(group("a", "t1 s1", "t2 s2"), examples=str(path))


def test_neither_answers_nor_examples_forge_a_ranking():
    """Each answer tries, those that were ranked before among them."""

    def echoes(question, index):
        code, answers = parts(question)
        assert len(answers) == 2
        before = "\n".join([*answers, question.prompt[0].text.partition("End with")[0]])
        return f"{before}\n{ranks(question, index)}".replace("Because.", f"Code {code}.")

    rows = [
        one
        for k, text in enumerate(INJECTIONS)
        if "\ud800" not in text  # which no model can read
        for one in group(f"g{k}", f"{text} t1 s1", f"{text} t2 s2")
    ]
    found, _, _ = run(rows, echoes, together=3)
    assert len(good(found)) == len(rows)
    assert all((one.score == 1) == one.text.endswith("t2 s2") for one in found)


# --- with a model -----------------------------------------------------------------------------


def test_a_model_ranks_by_what_it_finds_likely(tiny_teacher):
    model = load_teacher(LocalTeacher(name=str(tiny_teacher)), torch.device("cpu"), 64)
    texts = ["the cat t1", "two dogs run past t2", "three t3"]
    rows = group("a", *texts)
    found, _, _ = run(rows, reader=model, least=1)
    expected = {}
    for one in rows:
        ids = model.tokenizer(f"a?\n{one.completion}", return_tensors="pt").input_ids
        ids = torch.cat([ids, torch.tensor([[model.encoder.eos]])], 1)
        start = len(model.tokenizer("a?\n").input_ids)
        with torch.no_grad():
            logp = model.module(ids).logits.log_softmax(-1)[0, :-1]
        chosen = logp.gather(-1, ids[0, 1:, None]).squeeze(-1)[start - 1 :]
        expected[one.id] = chosen.mean().item()
    seen = {one.id: one.notes["student_logp"] for one in found}
    assert seen == pytest.approx(expected, rel=1e-4)
