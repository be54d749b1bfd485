"""Objectives: frozen values that bind a loss to the signals of student and teacher."""

from limbeck.objectives.attention import AttentionMaps, AttentionRelations
from limbeck.objectives.candidates import Candidates
from limbeck.objectives.dual_space import DualSpace
from limbeck.objectives.features import Features
from limbeck.objectives.policy import GroupPolicy, OnPolicyKL, TopKReverseKL
from limbeck.objectives.sequence_ranking import SequenceRanking
from limbeck.objectives.sparse import SparseKL
from limbeck.objectives.token import (
    TAID,
    AdaptiveKL,
    AlphaBeta,
    CrossEntropy,
    DecoupledKD,
    ForwardKL,
    JensenShannon,
    LogitMSE,
    Ranking,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SortedL1,
    TotalVariation,
)
from limbeck.objectives.units import FlexKD
from limbeck.objectives.vocabulary import (
    HybridKL,
    LikelihoodMatching,
    MappedKL,
    PrefixKL,
    SemanticTransport,
)

__all__ = [
    "TAID",
    "AdaptiveKL",
    "AlphaBeta",
    "AttentionMaps",
    "AttentionRelations",
    "Candidates",
    "CrossEntropy",
    "DecoupledKD",
    "DualSpace",
    "Features",
    "FlexKD",
    "ForwardKL",
    "GroupPolicy",
    "HybridKL",
    "JensenShannon",
    "LikelihoodMatching",
    "LogitMSE",
    "MappedKL",
    "OnPolicyKL",
    "PrefixKL",
    "Ranking",
    "ReverseKL",
    "SemanticTransport",
    "SequenceRanking",
    "SkewForwardKL",
    "SkewReverseKL",
    "SortedL1",
    "SparseKL",
    "TopKReverseKL",
    "TotalVariation",
]
