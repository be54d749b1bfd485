"""Data from teachers: steps that turn rows into other rows."""

from limbeck.synth.adaptive import Adaptive
from limbeck.synth.answers import Answers
from limbeck.synth.best import Better
from limbeck.synth.critique import Critique
from limbeck.synth.distribution import Distribution
from limbeck.synth.divergence import Divergence
from limbeck.synth.mixed import Mixed
from limbeck.synth.ranking import Rank
from limbeck.synth.revise import Revise
from limbeck.synth.weights import Weights

__all__ = [
    "Adaptive",
    "Answers",
    "Better",
    "Critique",
    "Distribution",
    "Divergence",
    "Mixed",
    "Rank",
    "Revise",
    "Weights",
]
