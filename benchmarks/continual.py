"""Three families of word problems, learnt one after the other: which way forgets least?

    python benchmarks/continual.py             # four arms, three seeds
    python benchmarks/continual.py --quick     # two steps, nothing written

The student that ships with limbeck learns to add and subtract, then to multiply and divide, then to
compare. The arms differ in the recipe alone, and take the same steps:

plain            fine-tuning on the labels
replay           the same, with a fifth of earlier tasks' rows
LwF              labels, and a KL to the student before the task
own words        on what it writes, judged by itself a little behind, which reads the solution
"""

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

from environment import environment
from table import markdown

from limbeck.campaigns.continual import Stage, continual
from limbeck.core.files import write_text
from limbeck.demo import model_path, problems
from limbeck.recipe.document import Document

RESULTS = Path(__file__).with_name("results") / "continual.json"
ROWS, TESTS = 1500, 100
TRAIN = {"steps": 80, "batch_tokens": 2048, "learning_rate": 1e-3, "save_every": 1000}
FAMILIES = ("add", "multiply", "compare")
LABELS = {"objective": "cross_entropy"}


def family(problem: Any) -> str:
    """Of which kind a problem is, by what its solution does."""
    if re.search(r"more|fewer|ahead|behind", problem.question.rsplit(".", 1)[1]):
        return "compare"
    return "multiply" if re.search(r"\d [*/] \d", problem.rationale) else "add"


def of_family(name: str, split: Any) -> Iterator[Any]:
    return (problem for problem in problems(0, split) if family(problem) == name)


def stages(folder: Path, rows: int, tests: int) -> list[Stage]:
    """Each family's rows and problems; a row's solution is what a teacher may read first."""
    found: list[Stage] = []
    for name in FAMILIES:
        train, test = folder / f"{name}.jsonl", folder / f"{name}-test.jsonl"
        made = [
            {
                "prompt": p.prompt,
                "completion": p.completion,
                "answer": str(p.answer),
                "privileged": f"{p.prompt}{p.completion}\n",
            }
            for p in islice(of_family(name, "train"), rows)
        ]
        write_text(train, "".join(json.dumps(row) + "\n" for row in made))
        asked = [
            {"prompt": p.prompt, "answer": str(p.answer)}
            for p in islice(of_family(name, "test"), tests)
        ]
        write_text(test, "".join(json.dumps(row) + "\n" for row in asked))
        found.append(Stage(name=name, train=str(train), test=str(test)))
    return found


def arms(train: dict[str, Any], seed: int) -> dict[str, Document]:
    """The recipes."""
    base: dict[str, Any] = {
        "student": {"name": str(model_path("student")), "max_length": 384},
        "source": {"path": "", "holdout": 0},
        "terms": [LABELS],
        "train": {**train, "device": "cpu"},
        "seed": seed,
    }
    before = {"before": {"kind": "self", "update": "frozen"}}
    kept = [LABELS, {"objective": "forward_kl", "teacher": "before", "weight": 1.0}]
    me = {"me": {"kind": "self", "update": "ema", "decay": 0.99}}
    writing = {"kind": "rollouts", "max_tokens": 100, "batch": 32, "of": base["source"]}
    own = [{"objective": "forward_kl", "teacher": "me"}]
    values = {
        "plain": base,
        "replay": base,
        "LwF": {**base, "teachers": before, "terms": kept},
        "own words": {**base, "teachers": me, "terms": own, "source": writing},
    }
    return {name: Document(value, {}) for name, value in values.items()}


def table(results: dict[str, Any]) -> str:
    lines: list[list[str]] = []
    for arm in results["seeds"][0]:
        found = [seed[arm] for seed in results["seeds"]]
        cells = [mean(one[name] for one in found) for name in ("average", "forgetting", "transfer")]
        last = [mean(one["accuracy"][-1][k] for one in found) for k in range(len(FAMILIES))]
        lines.append([arm, *(f"{cell:.1%}" for cell in (*cells, *last))])
    return markdown(["arm", "average", "forgetting", "forward transfer", *FAMILIES], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tasks in sequence.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    train = {**TRAIN, "steps": 2} if chosen.quick else TRAIN
    seeds: list[Any] = []
    for seed in range(1 if chosen.quick else chosen.seeds):
        with tempfile.TemporaryDirectory() as name:
            tasks = stages(Path(name), 60 if chosen.quick else ROWS, 6 if chosen.quick else TESTS)
            test = {"match": "last_number", "max_tokens": 120}
            found = continual(
                arms(train, seed), tasks, Path(name) / "out", test=test, replay={"replay": 0.2}
            )
            seeds.append({arm: matrix.to_json() for arm, matrix in found.items()})
        if not chosen.quick:
            values = {"environment": environment(), "train": train, "seeds": seeds}
            RESULTS.write_text(json.dumps(values, indent=1) + "\n")
    print(table({"seeds": seeds}))


if __name__ == "__main__":
    main()
