"""Texts in two parts, in all the forms."""

import pytest
from fakes import row, run_step
from hypothesis import given
from hypothesis import strategies as st

from limbeck.core.errors import RecipeError
from limbeck.synth.rationales import WINDOW, Split, split, split_all

FORMS = ["the_answer_is", "hashes", "boxed", "think"]


@pytest.mark.parametrize(
    ("form", "text", "rationale", "bare"),
    [
        ("the_answer_is", "4 + 3 = 7. So the answer is 7.", "4 + 3 = 7. ", "7"),
        ("the_answer_is", "a b.\nThe answer is (84 / 2).", "a b.\n", "(84 / 2)"),
        ("the_answer_is", "x. Therefore, the final answer is: y\nBye.", "x. ", "y"),
        ("the_answer_is", "The answer is 1. No. The answer is 2.", "The answer is 1. No. ", "2"),
        ("the_answer_is", "x. The answer is 1.5.", "x. ", "1.5"),
        ("the_answer_is", "6*7. **The answer is: 42**", "6*7. ", "42"),
        ("the_answer_is", "6*7. The answer is **42**.", "6*7. ", "42"),
        ("the_answer_is", "6*7. **The answer is 42.**", "6*7. ", "42"),
        ("the_answer_is", "6*7. **The answer is:** 42", "6*7. ", "42"),
        ("the_answer_is", "6*7.\n\n**Final answer:** 42", "6*7.\n\n", "42"),
        ("the_answer_is", "6*7. **Final answer:** **42**", "6*7. ", "42"),
        ("the_answer_is", "6*7. The answer is **42** apples.", "6*7. ", "**42** apples"),
        ("the_answer_is", "6*7.\nFinal Answer: 2**3", "6*7.\n", "2**3"),
        ("the_answer_is", "a or b. The answer is a*.", "a or b. ", "a*"),
        ("hashes", "6*7\n#### **42**", "6*7\n", "42"),
        ("hashes", "4 + 3 = 7\n#### 7", "4 + 3 = 7\n", "7"),
        ("boxed", "We add. So $x = \\boxed{\\frac{1}{2}}$.", "We add. ", "\\frac{1}{2}"),
        ("boxed", "1.5 + 2\nis \\boxed{3.5}", "1.5 + 2\n", "3.5"),
        ("think", "<think>\na b\n</think>\n\nSeven.", "<think>\na b\n</think>\n\n", "Seven."),
        ("think", "a b</think>Seven.\nYes.", "a b</think>", "Seven.\nYes."),
    ],
)
def test_parts(form, text, rationale, bare):
    parts = split(text, form)
    assert parts is not None
    assert (parts.rationale, parts.bare) == (rationale, bare)
    assert parts.rationale + parts.answer == text


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("the_answer_is", "Seven."),
        ("the_answer_is", "The answer is 7."),
        ("the_answer_is", "4 + 3. The answer is"),
        ("the_answer_is", "4 + 3. The answer is ."),
        ("hashes", "#### 7"),
        ("hashes", "7 ####\n"),
        ("boxed", "\\boxed{7}"),
        ("boxed", "a. \\boxed{7"),
        ("boxed", "a. \\boxed{}"),
        ("think", "<think></think>7"),
        ("think", "<think>a</think>\n"),
        ("think", "<think>a"),
    ],
)
def test_texts_without_one_of_both(form, text):
    assert split(text, form) is None


@given(
    st.text(alphabet="So the answr i7.#\\boxed{}</think>\n", max_size=60), st.sampled_from(FORMS)
)
def test_parts_are_the_text_again(text, form):
    parts = split(text, form)
    if parts is not None:
        assert parts.rationale + parts.answer == text
        assert parts.rationale.strip()
        assert parts.bare.strip() == parts.bare != ""
        assert parts.bare in parts.answer


@given(st.sampled_from(FORMS), st.text(alphabet="ab 1\n", max_size=20).filter(str.strip),
       st.text(alphabet="ab1", min_size=1, max_size=5))  # fmt: skip
def test_what_was_put_together_is_parted(form, reasons, answer):
    said = {
        "the_answer_is": f"The answer is {answer}.",
        "hashes": f"#### {answer}",
        "boxed": f"\n\\boxed{{{answer}}}",
        "think": f"</think>{answer}",
    }[form]
    parts = split(f"{reasons}\n{said}", form)
    assert parts is not None
    assert parts.bare == answer
    assert parts.rationale.startswith(reasons.rstrip())


def test_a_pattern_of_ones_own():
    texts = ["a b => 7", "=> 7", "a => 7 => 8!", "a"]
    found = split_all(texts, "regex", r"=>\s*(\d+)")
    assert [p and (p.rationale, p.answer, p.bare) for p in found] == [
        ("a b ", "=> 7", "7"),
        None,
        ("a => 7 ", "=> 8!", "8"),
        None,
    ]
    with pytest.raises(RecipeError, match="pattern"):
        split("a", "regex")


def test_rows_get_both_parts_and_those_without_fail():
    rows = [row("1", "\n4 + 3. So the answer is 7.\n"), row("2", "7"), row("3", "")]
    found, desk = run_step(Split(), rows)
    assert (found[0].rationale, found[0].completion) == ("\n4 + 3. ", "So the answer is 7.")
    why = "no rationale and answer in the form 'the_answer_is'"
    assert [one.failure for one in found] == [None, why, why]
    assert [one.completion for one in found[1:]] == ["7", ""]
    assert desk.counts == {"texts without a rationale and an answer": 2}
    again, _ = run_step(Split(), found[:1])
    assert again == found[:1]


def test_the_answer_can_be_bare_and_a_text_can_end_before_the_next_question():
    text = "4 + 3. The answer is 7.\n\nQ: And 5?\nA: x. The answer is 8."
    found, _ = run_step(Split(answer="bare", stop=("Q:",)), [row("1", text)])
    assert (found[0].rationale, found[0].completion) == ("4 + 3. ", "7")


def test_windows_keep_the_order():
    rows = [row(str(k), f"a #### {k}" if k % 3 else "a") for k in range(WINDOW + 5)]
    found, _ = run_step(Split(form="regex", pattern=r"####\s*(\d+)"), rows)
    assert [one.id for one in found] == [one.id for one in rows]
    assert [one.failure is None for one in found] == [k % 3 > 0 for k in range(WINDOW + 5)]


@pytest.mark.parametrize(
    "fields", [{"form": "regex"}, {"pattern": "(a)"}, {"form": "regex", "pattern": "a"}]
)
def test_a_pattern_goes_with_regex_alone(fields):
    with pytest.raises(RecipeError, match="pattern"):
        Split(**fields)
