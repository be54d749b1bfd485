"""The embedded domain: grade-school word problems, a small teacher, and a smaller student."""

from importlib import resources
from pathlib import Path
from typing import Literal

from limbeck.demo.facts import Fact, Negation, facts, negations
from limbeck.demo.problems import Problem, problems, verify, verify_rationale, write_jsonl

__all__ = [
    "Fact",
    "Negation",
    "Problem",
    "facts",
    "model_path",
    "negations",
    "problems",
    "verify",
    "verify_rationale",
    "write_jsonl",
]


def model_path(which: Literal["teacher", "student"]) -> Path:
    """The folder of one of the two models that ship with the package.

    The teacher solves problems of one to five steps; the student can read, calculate, and solve
    those of one step.
    """
    return Path(str(resources.files("limbeck.demo"))) / which
