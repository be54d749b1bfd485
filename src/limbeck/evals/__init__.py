"""Evaluations: agreement with the teacher, perplexity, tasks, and how fast a model writes."""

from limbeck.evals.agreement import Agreement
from limbeck.evals.perplexity import Perplexity
from limbeck.evals.score import Score
from limbeck.evals.speed import openings, tokens_per_second
from limbeck.evals.suite import Evaluation, check_names, run_suite
from limbeck.evals.task import Task

__all__ = [
    "Agreement",
    "Evaluation",
    "Perplexity",
    "Score",
    "Task",
    "check_names",
    "openings",
    "run_suite",
    "tokens_per_second",
]
