"""Data from teachers: steps that turn rows into other rows."""

from limbeck.synth.adaptive import Adaptive
from limbeck.synth.answers import Answers
from limbeck.synth.best import Better
from limbeck.synth.critique import Critique
from limbeck.synth.distinct import Distinct
from limbeck.synth.distribution import Distribution
from limbeck.synth.divergence import Divergence
from limbeck.synth.hint import Hint
from limbeck.synth.mixed import Mixed
from limbeck.synth.ranking import Rank
from limbeck.synth.rationales import Split
from limbeck.synth.revise import Revise
from limbeck.synth.rewrite import Rewrite
from limbeck.synth.step_by_step import TwoTasks
from limbeck.synth.verify import Verify
from limbeck.synth.weights import Weights

__all__ = [
    "Adaptive",
    "Answers",
    "Better",
    "Critique",
    "Distinct",
    "Distribution",
    "Divergence",
    "Hint",
    "Mixed",
    "Rank",
    "Revise",
    "Rewrite",
    "Split",
    "TwoTasks",
    "Verify",
    "Weights",
]
