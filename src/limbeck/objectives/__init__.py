"""Objectives: frozen values that bind a loss to the signals of student and teacher."""

from limbeck.objectives.sparse import SparseKL
from limbeck.objectives.token import (
    AdaptiveKL,
    CrossEntropy,
    ForwardKL,
    JensenShannon,
    LogitMSE,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SortedL1,
    TotalVariation,
)

__all__ = [
    "AdaptiveKL",
    "CrossEntropy",
    "ForwardKL",
    "JensenShannon",
    "LogitMSE",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "SortedL1",
    "SparseKL",
    "TotalVariation",
]
