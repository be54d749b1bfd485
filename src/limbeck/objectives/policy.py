"""Objectives of what the student wrote itself: a reward for each token, or for each answer.

They need a `rollouts` source, and a term with `channel: student` where given text is mixed in.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.registry import register
from limbeck.core.types import Needs, Signals, Unit
from limbeck.losses import policy
from limbeck.losses.policy import Estimator
from limbeck.objectives.token import LogitObjective

Clip = Annotated[float | None, Field(gt=0, lt=1)]


@register("objective", "top_k_reverse_kl")
@dataclass(frozen=True, kw_only=True)
class TopKReverseKL(LogitObjective):
    """KL(student || teacher) over the student's `k` likeliest tokens and one for all others."""

    loss = staticmethod(policy.top_k_reverse_kl)
    k: Annotated[int, Field(gt=0)] = 100


@register("objective", "on_policy_kl")
@dataclass(frozen=True, kw_only=True)
class OnPolicyKL:
    """KL(student || teacher) of whole answers, from the tokens that were drawn alone.

    The reward of a token is log p - log q: how much likelier the teacher finds it than the student.
    The gradient is the policy gradient's; the value in the metrics is an estimate of the KL.

    Attributes:
        discount: how much of later tokens' rewards a token is given: 0 is its own alone, 1 all.
        own: whether its own reward is among them. MiniLLM leaves it out here, and has a term
            `reverse_kl` beside for it, which is exact.
        mean: average the rewards instead of summing them, so that long answers do not weigh more.
        clip: how far the ratio to the policy that wrote may go (PPO's); null lets it.
        estimator: of the reported value; see `losses.policy.reverse_kl_estimate`.
    """

    asks: ClassVar[Needs] = frozenset({"chosen"})
    needs: ClassVar[Needs] = frozenset({"chosen"})
    unit: ClassVar[Unit] = "token"
    shared_vocabulary: ClassVar[bool] = True

    discount: Annotated[float, Field(ge=0, le=1)] = 0.0
    own: bool = True
    mean: bool = False
    clip: Clip = 0.2
    estimator: Estimator = "k3"

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """[n] losses."""
        logp, heard = student.chosen, teacher.chosen
        assert logp is not None
        assert heard is not None
        assert student.sample is not None
        behaviour = drawn_with(student)
        # Of the policy that wrote, where it is known: the draws are its.
        reward = heard - behaviour
        gain = policy.returns(
            reward, student.sample, discount=self.discount, own=self.own, mean=self.mean
        )
        followed = policy.surrogate(logp, behaviour, gain, clip=self.clip)
        return policy.reported(policy.reverse_kl_estimate(logp, heard, self.estimator), followed)


@register("objective", "group_policy")
@dataclass(frozen=True, kw_only=True)
class GroupPolicy:
    """Policy gradient on the answers' scores, each beside the others to its prompt (GRPO).

    The value in the metrics is minus the mean score. A term with a KL to a frozen `self` teacher
    keeps the student near where it began.

    Attributes:
        clip: how far the ratio to the policy that wrote may go (PPO's); null lets it.
        spread: divide by the standard deviation of a group's scores.
    """

    asks: ClassVar[Needs] = frozenset({"chosen"})
    needs: ClassVar[Needs] = frozenset()
    unit: ClassVar[Unit] = "token"
    shared_vocabulary: ClassVar[bool] = False

    clip: Clip = 0.2
    spread: bool = True

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """[n] losses; 0 for answers that have no score."""
        del teacher
        logp = student.chosen
        assert logp is not None
        assert student.sample is not None
        if student.score is None or student.group is None:
            return logp * 0
        sample, place = student.sample.unique_consecutive(return_inverse=True)
        first = torch.searchsorted(student.sample, sample)
        score, group = student.score[first], student.group[first]
        known = ~score.isnan()
        gain = torch.zeros_like(score)
        gain[known] = policy.advantages(score[known], group[known], spread=self.spread)
        followed = policy.surrogate(logp, drawn_with(student), gain[place], clip=self.clip)
        return policy.reported(-score.nan_to_num(0.0)[place], followed)


def drawn_with(student: Signals) -> Tensor:
    """[n] log-probability of each token when it was drawn; of the student now, where not known."""
    assert student.chosen is not None
    now: Any = student.chosen.detach()
    if student.behaviour is None:
        return now
    return torch.where(student.behaviour.isnan(), now, student.behaviour)
