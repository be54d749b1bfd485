"""From prompts to a trained student by the parts of DASD and by adaptive rows, on the demo."""

import json

import pytest

from limbeck.demo import model_path, problems, write_jsonl
from limbeck.recipe.document import Document
from limbeck.recipe.generate import generate
from limbeck.recipe.resolve import resolve
from limbeck.recipe.run import run


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Six problems with their answers."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_jsonl(path, problems(0, "train", 6))
    return str(path)


def recipe_of(source):
    return {
        "student": {"name": str(model_path("student")), "max_length": 256},
        "teachers": {"big": {"name": str(model_path("teacher"))}},
        "source": source,
        "terms": [{"objective": "cross_entropy"}],
        "train": {"steps": 3, "batch_tokens": 400, "device": "cpu"},
    }


def made(folder, name, prompts, *steps):
    of = {"path": prompts, "holdout": 0}
    path = str(folder / name)
    return {"kind": "generated", "path": path, "of": of, "steps": list(steps), "holdout": 0}


def ask(n, temperature):
    settings = {"n": n, "temperature": temperature, "max_tokens": 120}
    return {"kind": "answers", "teacher": "big", **settings}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def dasd(folder, prompts):
    """Both temperatures; the second with every part."""
    low = made(folder, "low", prompts, ask(1, 0.3))
    high = made(
        folder,
        "high",
        prompts,
        ask(3, 1.2),
        {"kind": "divergence", "teacher": "big", "best": 2},
        {"kind": "weights", "teacher": "big", "temperature": 4.0},
        {"kind": "mixed", "teacher": "big", "cut": "all", "max_tokens": 120},
    )
    return {"kind": "stages", "of": [low, high], "epochs": [1]}


def test_dasd_from_prompts_to_a_student(tmp_path, prompts):
    document = Document(recipe_of(dasd(tmp_path, prompts)), {})
    generate(document)
    rows, failed = (lines(tmp_path / "high" / f"{n}.jsonl") for n in ("rows", "failed"))
    mixed = [row for row in rows if row["id"].endswith("/mixed")]
    kept = [row for row in rows if row not in mixed]
    groups = {row["group"] for row in rows}
    assert len(groups) == 6
    for group in groups:
        mine = [row for row in kept if row["group"] == group]
        assert len(mine) == 2
        assert sum(row.get("weight", 1.0) for row in mine) == pytest.approx(1.0)
        assert all(0 <= row["teacher_share"] <= 1 for row in mine)
    assert mixed
    assert all(0 < row["student_share"] < 1 for row in mixed)
    # One answer of three is left over for each prompt; each row is there once, good or failed.
    ids = [row["id"] for row in (*rows, *failed)]
    assert len(set(ids)) == len(ids) == 6 * 3 + len([i for i in ids if i.endswith("/mixed")])
    report = run(resolve(document), tmp_path / "run")
    assert report.train.steps == 3


def test_it_comes_out_the_same_when_it_is_made_again(tmp_path, prompts):
    for name in ("a", "b"):
        generate(Document(recipe_of(dasd(tmp_path / name, prompts)), {}))
    for file in ("low/rows.jsonl", "high/rows.jsonl", "high/failed.jsonl"):
        assert (tmp_path / "a" / file).read_text() == (tmp_path / "b" / file).read_text()


def test_scores_that_the_teacher_wrote_are_near_those_it_reads(tmp_path, prompts):
    """The same log-probabilities, but for the end of the text, which no server tells."""
    weigh = {"kind": "weights", "teacher": "big"}
    asked = {**ask(3, 1.0), "scores": True}
    for name, scores in (("read", "read"), ("written", "written")):
        divergence = {"kind": "divergence", "teacher": "big", "scores": scores}
        source = made(tmp_path, name, prompts, asked, divergence, {**weigh, "scores": scores})
        generate(Document(recipe_of(source), {}))
    read, written = (lines(tmp_path / name / "rows.jsonl") for name in ("read", "written"))
    assert [row["id"] for row in read] == [row["id"] for row in written]
    for one, other in zip(read, written, strict=True):
        assert one.get("weight", 1.0) == pytest.approx(other.get("weight", 1.0), abs=0.02)
        assert one["teacher_sentences"] == other["teacher_sentences"]


def test_adaptive_rows_carry_a_tag_and_train(tmp_path, prompts):
    step = {"kind": "adaptive", "prefix": "The answer is", "answer": "The answer is {answer}."}
    source = made(tmp_path, "adaptive", prompts, ask(2, 0.7), step)
    document = Document(recipe_of(source), {})
    generate(document)
    rows = lines(tmp_path / "adaptive" / "rows.jsonl")
    assert len(rows) == 6
    for row in rows:
        tag = "<think> " if row["reasoned"] else "<direct> "
        assert row["completion"].startswith(tag)
        assert row["reasoned"] == (row["direct_passes"] < row["direct_tries"] == 4)
        assert {entry["step"] for entry in row["source"]} <= {"answers", "adaptive"}
    assert run(resolve(document), tmp_path / "run").train.steps == 3
