"""The embedded domain: grade-school word problems, and a small teacher that solves them."""

from importlib import resources
from pathlib import Path

from limbeck.demo.facts import Fact, Negation, facts, negations
from limbeck.demo.problems import Problem, problems, verify, verify_rationale, write_jsonl

__all__ = [
    "Fact",
    "Negation",
    "Problem",
    "facts",
    "negations",
    "problems",
    "teacher_path",
    "verify",
    "verify_rationale",
    "write_jsonl",
]


def teacher_path() -> Path:
    """The folder of the teacher that ships with the package."""
    return Path(str(resources.files("limbeck.demo"))) / "teacher"
