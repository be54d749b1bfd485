"""The embedded domain: right arithmetic, clean splits, a verifier that cannot be fooled easily."""

import json
import re

import pytest

from limbeck.demo import facts, negations, phrasing, problems, verify, verify_rationale, write_jsonl
from limbeck.demo.problems import is_test

SPLITS = ("train", "test", "phrasings", "chains")


@pytest.mark.parametrize("split", SPLITS)
def test_rationales_are_true_and_end_in_the_answer(split):
    for row in problems(11, split, 1000):
        assert verify(row, row.completion)
        assert verify_rationale(row.completion), row
        assert 0 <= row.answer <= 99
        assert row.split == split


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_seed_gives_the_same_problems(split):
    assert list(problems(3, split, 50)) == list(problems(3, split, 50))
    assert list(problems(3, split, 50)) != list(problems(4, split, 50))


def test_no_test_question_can_come_up_in_training():
    train = {row.question for row in problems(0, "train", 3000)}
    test = {row.question for row in problems(0, "test", 1000)}
    assert not train & test
    assert not any(map(is_test, train))
    assert all(map(is_test, test))


def test_steps_are_one_to_five_and_longer_in_chains():
    assert {row.steps for row in problems(0, "train", 500)} == {1, 2, 3, 4, 5}
    assert {row.steps for row in problems(0, "chains", 100)} == {6, 7}
    for row in problems(0, "chains", 50):
        assert len(re.findall("=", row.rationale)) == row.steps


def test_every_operation_and_comparisons_occur():
    text = " ".join(row.completion for row in problems(0, "train", 500))
    assert all(f" {operation} " in text for operation in "+-*/")
    questions = " ".join(row.question for row in problems(0, "train", 500))
    assert "How many more" in questions
    assert "How many fewer" in questions


def test_unseen_phrasings_share_no_sentence_with_training():
    known = {
        s
        for kind in vars(phrasing).values()
        if isinstance(kind, phrasing.Phrasings)
        for s in kind.known
    }
    unseen = {
        s
        for kind in vars(phrasing).values()
        if isinstance(kind, phrasing.Phrasings)
        for s in kind.unseen
    }
    assert unseen
    assert not known & unseen


@pytest.mark.parametrize(
    "text",
    [
        "3 + 4 = 8. The answer is 8.",
        "3 + 4 = 7. The answer is 8.",
        "3 + 4 = 7. 9 - 1 = 8. The answer is 8.",
        "3 + 4 = 7.",
        "The answer is 7.",
        "3 + 4 = 7. The answer is 7. The answer is 9.",
        "5 - 7 = -2. 3 + 4 = 7. The answer is 7.",
        "3 + 4 = 7.5. The answer is 7.",
        "-3 + 4 = 7. The answer is 7.",
        "2 * 3 + 4 = 7. The answer is 7.",
        "12 + 7 = 19 + 1. The answer is 19.",
        "0 / 0 = 5. The answer is 5.",
        "3 + 4=8. 3 + 4 = 7. The answer is 7.",
    ],
)
def test_a_tampered_rationale_fails(text):
    assert not verify_rationale(text)


def test_the_last_answer_counts():
    row = next(problems(0, "train"))
    assert not verify(row, "no idea")
    assert not verify(row, f"The answer is {row.answer + 1}.")
    assert verify(row, f"The answer is {row.answer + 1}. No. The answer is {row.answer}.")


def test_rows_are_written_as_a_source_reads_them(tmp_path):
    assert write_jsonl(tmp_path / "rows.jsonl", problems(0, "train", 5)) == 5
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["completion"].endswith(f"The answer is {row['answer']}.")
        assert row["prompt"].endswith("\n")


def test_facts_are_one_to_one_and_negations_have_opposite_answers():
    known = facts()
    assert len({fact.forward[1] for fact in known}) == len(known)
    assert len({fact.backward[1] for fact in known}) == len(known)
    for pair in negations(0, 200):
        assert {pair.plain[1], pair.negated[1]} == {"Yes.", "No."}
