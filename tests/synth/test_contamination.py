"""The step `contamination`: overlaps planted in several disguises, and none where there is none."""

import json

import pytest
from fakes import good, prompt, row, run_step
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.core.errors import RecipeError
from limbeck.synth.contamination import Contamination, Runs

QUESTION = (
    "A baker sells 12 loaves in the morning and 15 in the afternoon; how many loaves are sold that"
    " day?"
)
SHORT = "Which river runs through Vienna?"
TINY = "Who am I?"


@pytest.fixture
def evaluation(tmp_path):
    path = tmp_path / "test.jsonl"
    rows = [{"question": QUESTION, "answer": "27"}, {"messages": [{"content": SHORT}]}, {"q": TINY}]
    path.write_text("".join(json.dumps(one) + "\n\n" for one in rows))
    return str(path)


def reasons(step, *rows):
    made, _ = run_step(step, rows)
    assert [one.id for one in made] == [one.id for one in rows]
    return [one.failure for one in made]


DISGUISES = [
    QUESTION,
    QUESTION.upper(),
    QUESTION.replace(" ", "\n  "),
    QUESTION.replace(";", " --").replace("?", "!!"),
    f"Solve this. {QUESTION} Think hard.",
    QUESTION.replace("many", "\uff4d\uff41\uff4e\uff59"),  # wide letters
    " ".join(QUESTION.split()[3:]),  # 16 words of it
]


@pytest.mark.parametrize("text", DISGUISES)
@pytest.mark.parametrize("where", ["prompt", "completion", "rationale"])
def test_a_run_of_thirteen_words_is_found(evaluation, text, where):
    planted = {"prompt": row("a", "Fine.", prompt=prompt(text))}
    planted["completion"] = row("a", text)
    planted["rationale"] = row("a", "Fine.", rationale=text)
    (reason,) = reasons(Contamination(against=(evaluation,)), planted[where])
    name = "prompt" if where == "prompt" else "completion"
    assert reason == f"the {name} shares 13 words with {evaluation}:1"


def test_twelve_words_are_no_run(evaluation):
    step = Contamination(against=(evaluation,))
    twelve = " ".join(QUESTION.split()[:12])
    rows = [row("a", f"{twelve} otherwise"), row("b", f"x {twelve}")]
    assert reasons(step, *rows) == [None, None]
    step = Contamination(against=(evaluation,), words=12)
    assert reasons(step, rows[0]) == [f"the completion shares 12 words with {evaluation}:1"]


def test_shorter_texts_are_looked_for_as_a_whole(evaluation):
    step = Contamination(against=(evaluation,))
    found = reasons(
        step,
        row("a", "He asked: which river runs through Vienna -- and why?"),
        row("b", "A river runs through Vienna."),
        row("c", "Who am I? he asked himself, looking at the river."),
        row("d", prompt=prompt("who am i")),
        row("e", "27"),
    )
    assert found == [
        f"the completion shares 5 words with {evaluation}:3",
        None,
        None,
        f"the prompt is the whole of a text in {evaluation}:5",
        None,
    ]


def test_the_longest_overlap_is_told(evaluation):
    (reason,) = reasons(Contamination(against=(evaluation,)), row("a", f"{SHORT} {QUESTION}"))
    assert reason == f"the completion shares 13 words with {evaluation}:1"


def test_only_the_named_text_and_columns_count(evaluation, tmp_path):
    step = Contamination(against=(evaluation,), of="prompt")
    assert reasons(step, row("a", QUESTION)) == [None]
    step = Contamination(against=(evaluation,), of="completion")
    assert reasons(step, row("a", "x", prompt=prompt(QUESTION))) == [None]
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"question": QUESTION, "notes": SHORT}))
    step = Contamination(against=(str(path),), columns=("notes",))
    assert reasons(step, row("a", QUESTION)) == [None]
    step = Contamination(against=(str(path),), columns=("missing",))
    with pytest.raises(RecipeError, match=r"other.jsonl:1: no column 'missing'"):
        run_step(step, [row("a", QUESTION)])


def test_what_stands_before_each_question_is_no_sign(tmp_path):
    head = "Answer the following question as well as you can and give the answer in one word."
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"q": f"{head} Number {k}?"}) + "\n" for k in range(5)))
    rows = [row("a", f"{head} Good?"), row("b", f"{head} Number 3?")]
    assert None not in reasons(Contamination(against=(str(path),)), *rows)
    assert None not in reasons(Contamination(against=(str(path),), common=5), *rows)
    lenient = Contamination(against=(str(path),), common=4)
    assert reasons(lenient, *rows) == [None, f"the completion shares 13 words with {path}:4"]


def test_several_files_and_kinds_of_them(evaluation, tmp_path):
    import datasets

    table = tmp_path / "more.parquet"
    datasets.Dataset.from_list([{"text": "one two three four five six"}]).to_parquet(str(table))
    step = Contamination(against=(evaluation, str(table)))
    rows = [row("a", "one two three four five six seven"), row("b", QUESTION), row("c", "fine")]
    made, desk = run_step(step, rows)
    assert [one.failure for one in made] == [
        f"the completion shares 6 words with {table}[0]",
        f"the completion shares 13 words with {evaluation}:1",
        None,
    ]
    assert desk.counts["rows that overlap with an evaluation set"] == 2
    again, _ = run_step(step, good(made))
    assert good(again) == good(made)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.jsonl", None, "absent.jsonl: no such file"),
        ("bad.jsonl", "{", "bad.jsonl:1: not JSON"),
        ("bad.txt", "x", "unknown kind of file '.txt'"),
        ("empty.jsonl", "", "there are no rows"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError) as error:
        run_step(Contamination(against=(str(path),)), [row("a", "x")])
    assert error.value.field == "against"
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_files_decide_the_rows(evaluation):
    assert Contamination(against=(evaluation,)).files == (evaluation,)
    with pytest.raises(RecipeError, match="least"):
        Contamination(against=(evaluation,), words=4)


WORDS = st.lists(st.sampled_from("a b c".split()), max_size=14)


@given(st.lists(WORDS, min_size=1, max_size=4), WORDS, st.integers(2, 5))
@settings(max_examples=300)
def test_runs_against_a_search_by_hand(texts, text, n):
    """Everything that is at least two words long is looked for, in runs of n at most."""
    known = Runs()
    for place, one in enumerate(texts):
        known.add([one], str(place), n, 2)

    def stands(run):
        return any(text[k : k + len(run)] == run for k in range(len(text) - len(run) + 1))

    expected = any(
        stands(one[k : k + min(n, len(one))])
        for one in texts
        if len(one) >= 2
        for k in range(len(one) - min(n, len(one)) + 1)
    )
    found = known.find(text)
    assert (found is not None) == expected
    if found is not None:
        size, place = found
        theirs = texts[int(place)]
        assert any(stands(theirs[k : k + size]) for k in range(len(theirs) - size + 1))


def test_the_training_questions_of_gsm8k_that_are_test_questions_with_other_numbers(shared):
    """Four of 7,473: such as a train and a plane that travel on at the same rate."""
    folder = shared / "data" / "gsm8k"
    lines = (folder / "train.jsonl").read_text().splitlines()
    rows = [row(str(k), prompt=prompt(json.loads(one)["question"])) for k, one in enumerate(lines)]
    step = Contamination(against=(str(folder / "test.jsonl"),), columns=("question",))
    made, _ = run_step(step, rows)
    failed = [one for one in made if one.failure]
    assert len(failed) == 4
    assert sum("additional hours would it take" in one.prompt[0].text for one in failed) == 2
    own = (folder / "test.jsonl").read_text().splitlines()[:50]
    copies = [row(str(k), json.loads(one)["question"]) for k, one in enumerate(own)]
    made, _ = run_step(step, copies)
    assert not good(made)
