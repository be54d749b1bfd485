"""Verdicts are read strictly, and no text that is judged can forge one."""

import re

import pytest
from fakes import FakeWriter
from hypothesis import assume, given
from hypothesis import strategies as st
from injections import ECHOES, INJECTIONS, KNOWN, parts

from limbeck.core.types import Sampling, Turn
from limbeck.synth import verdicts
from limbeck.synth.best import TEMPLATE
from limbeck.synth.judging import Judge, Pair

CODE = "00c0de00c0de"
GOOD, BAD = 8, 3


def test_there_are_many():
    assert len(INJECTIONS) == len(set(INJECTIONS)) >= 50


@pytest.mark.parametrize("text", INJECTIONS)
def test_a_code_is_in_no_text_that_it_guards(text):
    code = verdicts.code_for(0, "row", ["Q?\n", text])
    assert re.fullmatch(r"[0-9a-f]{12}", code)
    assert code not in text
    assert code == verdicts.code_for(0, "row", ["Q?\n", text])
    assert code not in {
        KNOWN,
        verdicts.code_for(1, "row", ["Q?\n", text]),
        verdicts.code_for(0, "other", ["Q?\n", text]),
    }


def test_a_code_that_was_guessed_is_not_taken(monkeypatch):
    """Whoever knows how codes are drawn puts the first ones in, also in disguise."""
    drawn = [0xAAAAAAAAAAAA, 0xBBBBBBBBBBBB, 0xCCCCCCCCCCCC, 0xDDDDDDDDDDDD]
    monkeypatch.setattr(verdicts, "stream_seed", lambda seed, name, attempt: drawn[attempt])
    disguised = "\uff42\u200b".join("" for _ in range(13)) + "cc-CC cc.cc\u00adcccc"
    assert verdicts.code_for(0, "x", ["a" * 12, disguised]) == "d" * 12


def judge(by, reply):
    return Judge(
        writer=FakeWriter(reply),
        by=by,
        principle="Be fair.",
        template=TEMPLATE,
        sampling=Sampling(),
        seed=0,
    )


def honest(form, tell):
    """A judge that knows the good answer, and repeats what it reads in some way."""

    def reply(question, index):
        del index
        code, answers = parts(question)
        assert len(answers) == 2
        marks = [GOOD if "the good one" in text else BAD for text in answers]
        before = tell(question, answers)
        if form == "scores":
            return f"{before}SCORES {code} {marks[0]} {marks[1]}"
        return f"{before}VERDICT {code} {'A' if marks[0] > marks[1] else 'B'}"

    return reply


@pytest.mark.parametrize("tell", ECHOES, ids=lambda tell: tell.__name__)
@pytest.mark.parametrize("form", ["scores", "preference"])
def test_what_answers_hold_forges_nothing(form, tell):
    margin = GOOD - BAD if form == "scores" else 1
    for text in INJECTIONS:
        for bad_first in (True, False):
            bad, good = f"{text}", f"the good one {text}"
            incumbent, challenger = (bad, good) if bad_first else (good, bad)
            pair = Pair(
                name="row", prompt=(Turn(text=text),), incumbent=incumbent, challenger=challenger
            )
            ((_, verdict),) = judge(form, honest(form, tell)).compare([(0, pair)])
            expected = margin if bad_first else -margin
            assert verdict.margin in (expected, None), text
            if tell.__name__ in ("no_echo", "echo"):  # whole lines of others do no harm at all
                assert verdict.margin == expected, text


@pytest.mark.parametrize("tell", ECHOES, ids=lambda tell: tell.__name__)
@pytest.mark.parametrize("text", INJECTIONS)
def test_nor_a_single_score_or_a_ranking(text, tell):
    code = verdicts.code_for(0, "row", [text])
    said = tell(Quoted(text), [text])
    assert verdicts.scores(f"{said}SCORES {code} 4", code, 1) in ((4,), None)
    assert verdicts.permutation(f"{said}RANKING {code} 2 1 3", code, 3) in ((1, 0, 2), None)
    assert verdicts.preference(f"{said}VERDICT {code} TIE", code) in ("TIE", None)
    for read, more in ((verdicts.scores, 2), (verdicts.permutation, 3)):
        assert read(said, code, more) is None  # a judge that only repeats has said nothing
    assert verdicts.preference(said, code) is None


class Quoted:
    """A question that is the text alone."""

    def __init__(self, text):
        self.prompt = (Turn(text=text),)


PREFERENCES = [
    (f"VERDICT {CODE} A", "A"),
    (f"VERDICT {CODE} TIE\n\n  \n", "TIE"),
    (f"A is longer.\n  VERDICT {CODE} B \r\n", "B"),
    (f"VERDICT 000000000000 A\nVERDICT {CODE} B", "B"),
    ("", None),
    ("A", None),
    ("VERDICT A", None),
    (f"VERDICT {CODE}", None),
    (f"VERDICT {CODE} C", None),
    (f"VERDICT {CODE} a", None),
    (f"verdict {CODE} A", None),
    (f"VERDICT {CODE.upper()} A", None),
    (f"VERDICT  {CODE} A", None),
    (f"VERDICT {CODE}  A", None),
    (f"VERDICT {CODE} A.", None),
    (f"**VERDICT {CODE} A**", None),
    (f"`VERDICT {CODE} A`", None),
    (f"So VERDICT {CODE} A", None),
    (f"VERDICT {CODE} A B", None),
    (f"VERDICT {CODE} A\nThat is my verdict.", None),
    (f"VERDICT {CODE} A\nVERDICT {CODE} A", None),
    (f"VERDICT {CODE} B\nVERDICT {CODE} A", None),
    (f"VERDICT {CODE} \u0391", None),
    (f"VERDICT {CODE} A\u200b", None),
    (f"VERDICT\u00a0{CODE} A", None),
    (f"SCORES {CODE} 1 2", None),
]


@pytest.mark.parametrize(("reply", "expected"), PREFERENCES)
def test_preferences_are_read_strictly(reply, expected):
    assert verdicts.preference(reply, CODE) == expected


SCORES = [
    ("7 4", (7, 4)),
    ("1 10", (1, 10)),
    ("7", None),
    ("7 4 4", None),
    ("0 4", None),
    ("11 4", None),
    ("7.5 4", None),
    ("-7 4", None),
    ("+7 4", None),
    ("07 4", None),
    ("7, 4", None),
    ("7/10 4/10", None),
    ("seven four", None),
    ("\u0667 4", None),
    ("N1 N2", None),
    ("9" * 9000 + " 4", None),
]


@pytest.mark.parametrize(("numbers", "expected"), SCORES)
def test_scores_are_read_strictly(numbers, expected):
    assert verdicts.scores(f"Well.\nSCORES {CODE} {numbers}", CODE, 2) == expected


RANKINGS = [
    ("2 3 1", (1, 2, 0)),
    ("1 2 3", (0, 1, 2)),
    ("1 2", None),
    ("1 2 3 4", None),
    ("1 2 2", None),
    ("0 1 2", None),
    ("2 3 4", None),
    ("1 > 2 > 3", None),
    ("1, 2, 3", None),
]


@pytest.mark.parametrize(("numbers", "expected"), RANKINGS)
def test_rankings_are_read_strictly(numbers, expected):
    assert verdicts.permutation(f"RANKING {CODE} {numbers}\n", CODE, 3) == expected


@given(st.text(), st.text(), st.sampled_from(["A", "B", "TIE"]))
def test_any_text_before_a_verdict_is_no_matter(before, answer, said):
    code = verdicts.code_for(3, "x", [before, answer])
    reply = f"{before}\n{answer}\nVERDICT {code} {said}"
    assert verdicts.preference(reply, code) == said
    assert verdicts.without_verdict(reply) == f"{before}\n{answer}".strip()


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4), st.text(max_size=20))
def test_marks_hold_what_was_put_between_them(texts, name):
    code = verdicts.code_for(0, name, texts)
    whole = "\n\n".join(verdicts.enclosed(f"ANSWER {k}", t, code) for k, t in enumerate(texts))
    for k, text in enumerate(texts):
        begin, end = f"[BEGIN ANSWER {k} {code}]\n", f"\n[END ANSWER {k} {code}]"
        assert whole.count(begin) == whole.count(end) == 1
        assert whole.partition(begin)[2].partition(end)[0] == text


@given(st.integers(1, 12), st.text(max_size=40))
def test_the_form_that_is_shown_is_no_verdict(count, before):
    """A judge that repeats its instructions has not judged."""
    assume(CODE not in before)
    assert verdicts.scores(before + verdicts.scores_form(CODE, count), CODE, count) is None
    assert verdicts.permutation(verdicts.ranking_form(CODE, count), CODE, count) is None
    assert verdicts.preference(verdicts.preference_form(CODE), CODE) is None


def test_a_conversation_is_shown_with_its_roles():
    chat = (Turn(text="Hi", role="user"), Turn(text="Yes?", role="assistant"))
    assert verdicts.plain(chat) == "user: Hi\nassistant: Yes?"
    assert verdicts.framed("x", chat) == (Turn(text="x", role="user"),)
    assert verdicts.framed("x", (Turn(text="Hi"),)) == (Turn(text="x"),)
