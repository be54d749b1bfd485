"""The student begins, the teacher goes on."""

import torch
from fakes import FakeWriter, broken, cut, good, prompt, row, run_step
from hypothesis import given
from hypothesis import strategies as st

from limbeck.core.random import stream
from limbeck.core.types import Turn
from limbeck.synth.mixed import Mixed, cut_place
from limbeck.synth.rows import NO_PROMPT

KNOWN = "one two three four five six seven"  # 33 characters
LONG = cut("and so it goes on and on and on and on and on for ever")


def step(**more):
    return Mixed(teacher="big", **more)


def mixed(step, rows, both, **more):
    """Only the new rows."""
    found, desk = run_step(step, rows, both, **more)
    new = [one for one in found if one.id.endswith("/mixed")]
    # Those that came are there too, each with why it is not kept.
    old = [(one.id, one.failure) for one in found if one not in new]
    assert old == [(one.id, "mixed answers alone are kept") for one in rows]
    return new, desk


def writers(student, teacher=lambda question, index: " the end."):
    return {"student": FakeWriter(student), "big": FakeWriter(teacher)}


def test_the_teacher_goes_on_from_a_place_beyond_half_of_what_the_student_wrote():
    both = writers(lambda question, index: LONG)
    rows = [row(str(k), KNOWN, prompt=prompt(f"Q{k}?\n")) for k in range(30)]
    found, desk = mixed(step(keep=False, max_tokens=7, seed=3), rows, both)
    assert [one.id for one in found] == [f"{k}/mixed" for k in range(30)]
    longest = LONG.text[: int(1.5 * len(KNOWN))]
    places = set()
    for one, question in zip(found, both["big"].questions, strict=True):
        prefix = question.prefix
        assert question.prompt == one.prompt
        assert one.completion == prefix + " the end."
        assert longest.startswith(prefix)
        assert len(longest) // 2 <= len(prefix) < len(longest)
        assert longest[len(prefix)] == " "
        assert one.notes["student_share"] == len(prefix) / len(one.completion)
        assert [(e["step"], e["teacher"], e["part"]) for e in one.source] == [
            ("mixed", "student", "begin"),
            ("mixed", "big", "end"),
        ]
        places.add(len(prefix))
    assert len(places) > 4  # by lot
    assert desk.counts["mixed answers"] == 30
    for name, temperature in (("big", 1.0), ("student", 1.0)):
        ((sampling, n),) = both[name].samplings
        assert (sampling.max_tokens, sampling.temperature, sampling.seed, n) == (
            *(7, temperature, 3),
            1,
        )


def test_the_same_seed_cuts_the_same_and_rows_beside_it_do_not_matter():
    rows = [row(str(k), KNOWN) for k in range(6)]
    texts = [
        {one.id: one.completion for one in mixed(step(keep=False), part, writers(say))[0]}
        for part, say in ((rows, lambda q, k: LONG), (rows[3:], lambda q, k: LONG))
    ]
    assert texts[0] | texts[1] == texts[0]
    other, _ = mixed(step(keep=False), rows, writers(lambda q, k: LONG), seed=1)
    assert {one.id: one.completion for one in other} != texts[0]


def test_an_answer_that_the_student_ended_in_time_is_not_continued():
    def student(question, index):
        return "short." if question.prompt == prompt("easy") else "long " * 40

    rows = [row("a", KNOWN, prompt=prompt("easy")), row("b", KNOWN)]
    found, desk = run_step(step(), rows, writers(student))
    # `b` has an end too, but a longer one than it may have.
    assert [one.id for one in found] == ["a", "b", "b/mixed"]
    assert desk.counts["answers that the student ended"] == 1
    found, _ = mixed(step(keep=False), rows, writers(student))
    assert [(one.id, one.failure) for one in found] == [
        ("a/mixed", "the student ended its answer"),
        ("b/mixed", None),
    ]
    found, _ = mixed(
        step(keep=False, cut="all"), rows, writers(lambda q, k: "short but with spaces.")
    )
    assert len(good(found)) == 2


def test_one_new_row_for_each_group_behind_its_rows():
    rows = [row(f"p#{k}", KNOWN, group="p", weight=0.5, answer="7") for k in range(3)]
    found, _ = run_step(step(), rows, both := writers(lambda q, k: LONG))
    assert [one.id for one in found] == ["p#0", "p#1", "p#2", "p#0/mixed"]
    assert found[:3] == rows
    assert (found[3].group, found[3].weight, found[3].answer) == ("p", 1.0, "7")
    assert len(both["student"].questions) == 1


def test_what_the_teacher_cannot_end_has_failed_and_says_why():
    said = {
        "a": cut(" and so"),
        "b": broken("500: server error"),
        "c": "  ",
        "d": " done.",
    }
    rows = [row(name, KNOWN) for name in said]
    both = writers(lambda q, k: LONG, lambda q, k: said[q.id[0]])
    found, _ = run_step(step(), rows, both)
    failures = {one.id: one.failure for one in found if one.id.endswith("mixed")}
    assert failures == {
        "a/mixed": "the teacher's part is not whole: it ended with 'length'",
        "b/mixed": "big gave no answer: 500: server error",
        "c/mixed": "the teacher added nothing",
        "d/mixed": None,
    }
    assert [one.id for one in good(found)] == ["a", "b", "c", "d", "d/mixed"]


def test_rows_that_cannot_be_begun_have_failed():
    rows = [row("a", KNOWN), row("b"), row("c", KNOWN)]
    said = {"a": broken("time-out"), "b": LONG, "c": cut("x" * 60)}
    found, _ = mixed(step(keep=False), rows, writers(lambda q, k: said[q.id]))
    assert [one.failure for one in found] == [
        "student gave no answer: time-out",
        "there is no known answer that says how long one may be",
        "what the student wrote has no place between words to cut it at",
    ]


def test_only_the_teachers_part_may_be_learnt():
    learnt = step(keep=False, learn="teacher")
    (one,), _ = mixed(learnt, [row("a", KNOWN)], writers(lambda q, k: LONG))
    whole = "".join(turn.text for turn in one.prompt) + one.completion
    assert one.completion == " the end."
    assert one.prompt[0] == Turn(text="Q?\n")
    assert whole.startswith("Q?\nand so it goes")
    chat = row("a", KNOWN, prompt=(Turn(text="Q?", role="user"),))
    (failed,), _ = mixed(learnt, [chat], writers(lambda q, k: LONG))
    assert failed.failure == "in a conversation an answer cannot be learnt in part"


@given(st.text(alphabet="ab \n", max_size=30), st.floats(0, 0.99), st.integers(0, 99))
def test_a_cut_is_before_white_space_and_far_enough(text, beyond, seed):
    place = cut_place(text, beyond, stream(seed, "test"))
    allowed = [
        k
        for k in range(1, len(text))
        if k >= int(beyond * len(text)) and text[k].isspace() and not text[k - 1].isspace()
    ]
    assert place in allowed if allowed else place is None


def test_places_are_drawn_evenly():
    text = "ab cd ef gh ij"
    counts = dict.fromkeys((8, 11), 0)
    for seed in range(400):
        counts[cut_place(text, 0.5, torch.Generator().manual_seed(seed))] += 1
    assert abs(counts[8] - 200) < 40  # four standard deviations


def test_a_beginning_that_failed_comes_out_beside_the_rows_that_are_kept():
    """Only an answer that the student ended needs no mixed one."""
    rows = [row("a", KNOWN), row("b"), row("c", KNOWN), row("d", KNOWN), row("e", KNOWN, prompt=())]
    said = {"a": broken("time-out"), "b": LONG, "c": cut("x" * 60), "d": "short."}
    found, _ = run_step(step(), rows, both := writers(lambda q, k: said[q.id]))
    assert [one for one in found if not one.id.endswith("/mixed")] == rows
    assert {one.id: one.failure for one in found if one.id.endswith("/mixed")} == {
        "a/mixed": "student gave no answer: time-out",
        "b/mixed": "there is no known answer that says how long one may be",
        "c/mixed": "what the student wrote has no place between words to cut it at",
        "e/mixed": NO_PROMPT,
    }
    assert len(both["student"].questions) == 4


def test_text_without_spaces_is_cut_between_its_characters():
    chinese = "\u9996\u5148\u6211\u4eec\u8ba1\u7b97\u82f9\u679c\u7684\u6570\u91cf" * 5
    rows = [row("a", chinese)]
    found, desk = run_step(step(keep=False), rows, writers(lambda q, k: cut(chinese * 2)))
    assert [one.failure for one in found if one.id == "a/mixed"] == [None]
    assert desk.counts["mixed answers"] == 1
    thai = "\u0e01\u0e34\u0e19\u0e19\u0e49\u0e33"
    places = {cut_place(thai, 0.0, torch.Generator().manual_seed(k)) for k in range(60)}
    assert places == {2, 3, 5}  # before a letter, and never between it and its marks
