"""Direct answers where the student needs no reasoning."""

import pytest
from fakes import FakeWriter, cut, good, prompt, row, run_step

from limbeck.core.errors import RecipeError
from limbeck.synth.adaptive import Adaptive
from limbeck.synth.rows import NO_PROMPT, to_json
from limbeck.synth.step import asks_of, reads_of

LONG, SHORT = "First 2 + 3 = 5. Then 5 + 1 = 6. So it is 6.", "2 + 3 + 1 = 6. So it is 6."


def traces(name="p", answer="6", **more):
    texts = [LONG, SHORT, LONG + " Yes."]
    asked = prompt(f"{name}?\n")
    return [
        row(f"{name}#{k}", text, group=name, answer=answer, prompt=asked, **more)
        for k, text in enumerate(texts)
    ]


def student(*said):
    return {"student": FakeWriter(lambda question, index: said[index])}


def step(**more):
    return Adaptive(**{"tries": 2, "prefix": "It is", "answer": "It is {answer}.", **more})


def test_a_student_that_is_always_right_gets_a_direct_answer():
    both = student(" 6.", " 6, I think")
    found, desk = run_step(step(seed=5), traces(), both)
    (one,) = good(found)
    assert one.completion == "<direct> It is 6."
    assert one.notes == {"direct_passes": 2, "direct_tries": 2, "reasoned": False}
    assert [r.failure for r in found if r.failure] == ["a direct answer is enough"] * 2
    assert desk.counts == {"direct answers": 1}
    (question,) = both["student"].questions
    assert (question.prefix, question.prompt) == ("It is", prompt("p?\n"))
    ((sampling, n),) = both["student"].samplings
    assert (sampling.temperature, sampling.max_tokens, sampling.seed, n) == (0.7, 32, 5, 2)


@pytest.mark.parametrize("said", [(" 6.", " 7."), (" 6.", cut(" 6")), ("", " 6")])
def test_else_it_gets_the_shortest_trace(said):
    found, desk = run_step(step(), traces(), student(*said))
    (one,) = good(found)
    assert (one.id, one.completion) == ("p#1", "<think> " + SHORT)
    assert one.notes["direct_passes"] == 1
    assert one.notes["reasoned"]
    assert [r.failure for r in found if r.failure] == ["another trace is shorter"] * 2
    assert desk.counts == {"reasoned answers": 1}


def test_a_choice_is_judged_by_the_options_of_its_prompt():
    asked = prompt("Which is red?\n(A) a rose\n(B) the sea\n")
    rows = [row("p", "Roses are red. (A)", group="p", answer="A", prompt=asked)]
    choosing = step(match="choice", prefix="", answer="{answer}")
    (one,) = good(run_step(choosing, rows, student("a rose", "A"))[0])
    assert one.notes["direct_passes"] == 2


def test_the_row_that_is_kept_tells_what_the_student_said():
    found, _ = run_step(step(), traces(), student(" 6.", " 7."))
    (one,) = good(found)
    assert [(e["step"], e["index"]) for e in one.source] == [("adaptive", 0), ("adaptive", 1)]
    assert not any(other.source for other in found if other.failure)


def test_reasoning_that_was_split_off_is_left_out_or_tagged():
    rows = [row("a", " So it is 6.", rationale="2 + 4 = 6.", answer="6")]
    (direct,), _ = run_step(step(), rows, student(" 6", " 6"))
    assert (direct.rationale, direct.completion) == (None, "<direct> So it is 6.")
    (reasoned,), _ = run_step(step(), rows, student(" 6", " 5"))
    assert (reasoned.rationale, reasoned.completion) == ("<think> 2 + 4 = 6.", " So it is 6.")
    assert to_json(reasoned)["rationale"] == "<think> 2 + 4 = 6."


def test_tags_are_whatever_text_is_wanted():
    tags = {"direct_tag": "", "reason_tag": "Let me think. "}
    assert good(run_step(step(**tags), traces(), student(" 6", " 6"))[0])[0].text == "It is 6."
    (one,) = good(run_step(step(**tags), traces(), student(" 6", " 5"))[0])
    assert one.text == "Let me think. " + SHORT


def test_the_answer_may_stand_in_braces():
    boxed = step(answer=r"\boxed{{answer}}", direct_tag="")
    (one,) = good(run_step(boxed, traces(), student(" 6", " 6"))[0])
    assert one.text == r"\boxed{6}"


def test_both_ends_ask_nobody():
    for decide, text in (("always", "<think> " + SHORT), ("never", "<direct> It is 6.")):
        one = step(decide=decide)
        assert asks_of(one) == ()
        found, _ = run_step(one, traces())
        assert [r.completion for r in good(found)] == [text]
    assert (asks_of(step()), reads_of(step())) == (("student",), ())


def test_no_known_answer_no_row_and_groups_keep_their_order():
    rows = [*traces("p"), *traces("q", answer=None), *traces("r")]
    writers = {"student": FakeWriter(lambda q, k: " 6" if q.prompt == prompt("r?\n") else " 5")}
    found, _ = run_step(step(), rows, writers)
    assert [one.id for one in found] == [one.id for one in rows]
    assert {one.failure for one in found[3:6]} == {"there is no known answer"}
    assert [one.text[:8] for one in good(found)] == ["<think> ", "<direct>"]


def test_other_ways_to_compare_answers():
    rows = [row("a", "Because it is so: Paris", answer="Paris")]
    exact = step(match="exact", prefix="", answer="{answer}")
    (one,), _ = run_step(exact, rows, student("Paris", " Paris\n"))
    assert one.notes["direct_passes"] == 2
    pattern = step(match="regex", pattern=r"is (\w+)", prefix="It is ")
    (one,) = run_step(pattern, rows, student("Paris.", "Rome."))[0]
    assert one.notes["direct_passes"] == 1
    with pytest.raises(RecipeError, match="goes with `match: regex`"):
        step(match="regex")


def test_an_answer_may_stand_between_braces():
    """As mathematics is written; only {answer} is a place."""
    one = step(decide="never", answer=r"So \boxed{{answer}}, {0} or {x}.")
    (found,) = good(run_step(one, traces())[0])
    assert found.completion == r"<direct> So \boxed{6}, {0} or {x}."


def test_a_text_without_a_prompt_is_no_question():
    rows = [row("a", SHORT, answer="6", prompt=()), row("b", SHORT, answer="6")]
    both = student(" 6.", " 6.")
    found, _ = run_step(step(), rows, both)
    assert [one.failure for one in found] == [NO_PROMPT, None]
    assert len(both["student"].questions) == 1
