"""Data from teachers: steps that turn rows into other rows."""

from limbeck.synth.adaptive import Adaptive
from limbeck.synth.answers import Answers
from limbeck.synth.backtranslate import Backtranslate
from limbeck.synth.best import Better
from limbeck.synth.contamination import Contamination
from limbeck.synth.critique import Critique
from limbeck.synth.distinct import Distinct
from limbeck.synth.distribution import Distribution
from limbeck.synth.divergence import Divergence
from limbeck.synth.duplicates import Duplicates
from limbeck.synth.evolve import Evolve
from limbeck.synth.feedback import Feedback
from limbeck.synth.grounded import Grounded
from limbeck.synth.hint import Hint
from limbeck.synth.mixed import Mixed
from limbeck.synth.quality import Quality
from limbeck.synth.ranking import Rank
from limbeck.synth.rationales import Split
from limbeck.synth.revise import Revise
from limbeck.synth.rewrite import Rewrite
from limbeck.synth.self_instruct import SelfInstruct
from limbeck.synth.step_by_step import TwoTasks
from limbeck.synth.teacher_speaker import TeacherSpeaker
from limbeck.synth.verify import Verify
from limbeck.synth.weights import Weights

__all__ = [
    "Adaptive",
    "Answers",
    "Backtranslate",
    "Better",
    "Contamination",
    "Critique",
    "Distinct",
    "Distribution",
    "Divergence",
    "Duplicates",
    "Evolve",
    "Feedback",
    "Grounded",
    "Hint",
    "Mixed",
    "Quality",
    "Rank",
    "Revise",
    "Rewrite",
    "SelfInstruct",
    "Split",
    "TeacherSpeaker",
    "TwoTasks",
    "Verify",
    "Weights",
]
