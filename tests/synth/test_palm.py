"""Step by step on what a real teacher wrote: PaLM-540B's rationales, parsed and learnt from."""

import importlib.util
import json
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def palm(shared):
    """The benchmark as a module."""
    if not (shared / "data" / "dss").exists():
        pytest.skip("PaLM's rationales are absent")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        place = BENCHMARKS / "palm_rationales.py"
        spec = importlib.util.spec_from_file_location("palm_rationales", place)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


COUNTS = [  # questions, unparsed, right: read as the paper reads them
    ("cqa", "train", 9741, 3, 7234),
    ("cqa", "test", 1221, 0, 943),
    ("svamp", "train", 800, 13, 586),
    ("svamp", "test", 200, 2, 148),
]


@pytest.mark.parametrize(("name", "part", "questions", "unparsed", "right"), COUNTS)
def test_counts_are_those_of_the_paper(palm, name, part, questions, unparsed, right):
    rows, desk = palm.parsed(palm.READINGS["of the paper"][name], palm.given(name, part))
    assert len(rows) == questions
    assert len({row.id for row in rows}) == questions
    assert desk.counts["texts without a rationale and an answer"] == unparsed
    assert desk.counts["answers that are right"] == right
    assert sum(row.failure is None for row in rows) == right
    assert desk.figures["right answers"] == round(right / (questions - unparsed), 4)


@pytest.mark.parametrize(
    ("name", "paper", "both", "ours"), [("cqa", 1, 942, 16), ("svamp", 0, 148, 7)]
)
def test_limbecks_own_reading_finds_more(palm, name, paper, both, ours):
    """It lets case pass, and `3 + 4` without brackets; a letter with another's text is unclear."""
    found = {}
    for reading, by_data in palm.READINGS.items():
        rows, _ = palm.parsed(by_data[name], palm.given(name, "test"))
        found[reading] = {row.id: row.failure for row in rows}
    first, second = found["of the paper"], found["of limbeck"]
    lost = [second[each] for each in first if first[each] is None and second[each] is not None]
    assert all("unclear: it names a letter with the text of another" in why for why in lost)
    assert len(lost) == paper
    assert sum(first[each] is None and second[each] is None for each in first) == both
    assert sum(first[each] is not None and second[each] is None for each in first) == ours


def test_own_reading_parts_every_text(palm):
    (split, verify) = palm.READINGS["of limbeck"]["svamp"]
    rows, _ = palm.parsed((split, verify), palm.given("svamp", "test"))
    raw = {row.id: row.completion for row in palm.given("svamp", "test")}
    good = [row for row in rows if row.failure is None]
    for row in good:
        assert raw[row.id].startswith(row.text)
        assert row.completion.startswith("The answer is")
        assert row.rationale.endswith((" ", "\n"))


# From raw outputs to a trained student, in both forms.


@pytest.fixture
def recipe(palm, tmp_path, tiny_teacher):
    """Writes a recipe over the first raw outputs of a set; a weight of None is no term."""

    def write(name, two_tasks, alpha, beta):
        raw = tmp_path / f"{name}.jsonl"
        with raw.open("w") as file:
            for row in islice(palm.given(name, "train"), 60):
                line = {"prompt": row.prompt[0].text, "completion": row.completion}
                file.write(json.dumps({"id": row.id, **line, "answer": row.answer}) + "\n")
        made = [
            {"kind": "split", "form": "the_answer_is", "stop": ["Q:"]},
            {"kind": "verify", "match": {"cqa": "choice", "svamp": "arithmetic"}[name]},
            *(["two_tasks"] if two_tasks else []),
        ]
        terms = [
            {"objective": "cross_entropy", "channel": channel, "weight": weight, "name": channel}
            for channel, weight in (("rationale", alpha), ("answer", beta))
            if weight is not None
        ]
        values = {
            "student": {"name": str(tiny_teacher), "max_length": 256},
            "source": {
                "kind": "generated",
                "path": str(tmp_path / f"{name}-{two_tasks}"),
                "of": {"path": str(raw), "holdout": 0},
                "steps": made,
                "holdout": 0,
            },
            "terms": terms,
            "train": {"steps": 3, "batch_tokens": 1500, "learning_rate": 0.01},
            "evals": [],
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def trained(call, path, out):
    """Lines of the metrics and the student's weights after a run."""
    assert call("generate", path).code == 0
    done = call("run", path, "--out", out)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(out / "student" / "model.safetensors")


@pytest.mark.parametrize("two_tasks", [False, True])
@pytest.mark.parametrize("name", ["cqa", "svamp"])
def test_raw_outputs_train_a_student(recipe, call, tmp_path, name, two_tasks):
    lines, _ = trained(call, recipe(name, two_tasks, 0.5, 0.5), tmp_path / "run")
    assert lines[-1]["loss/rationale"] > 0
    assert lines[-1]["loss/answer"] > 0
    made = [
        json.loads(line)
        for line in (tmp_path / f"{name}-{two_tasks}" / "rows.jsonl").read_text().splitlines()
    ]
    card = json.loads((tmp_path / f"{name}-{two_tasks}" / "card.json").read_text())
    right = card["counts"]["answers that are right"]
    assert 30 <= right < 60
    assert len(made) == (2 * right if two_tasks else right)
    assert {row.get("channel") for row in made} == (
        {"rationale", "answer"} if two_tasks else {None}
    )


@pytest.mark.parametrize("two_tasks", [False, True])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0)])
def test_at_the_limits_one_part_alone_is_learnt(recipe, call, tmp_path, two_tasks, alpha, beta):
    both, weights = trained(call, recipe("svamp", two_tasks, alpha, beta), tmp_path / "both")
    alone, expected = trained(
        call, recipe("svamp", two_tasks, alpha or None, beta or None), tmp_path / "alone"
    )
    part = "loss/rationale" if alpha else "loss/answer"
    assert [line["loss"] for line in both] == pytest.approx([line[part] for line in both])
    assert [line["loss"] for line in both] == pytest.approx([line["loss"] for line in alone])
    assert weights.keys() == expected.keys()
    for key, value in weights.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5)  # of 0.03 steps
