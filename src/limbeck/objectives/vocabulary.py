"""Objectives for a teacher with another tokenizer.

Those that compare distributions learn the two vocabularies in `finish`, and give a value of the
same kind that holds what it found. Special tokens mean nothing to another tokenizer; only the two
models' end-of-text tokens are taken for one another.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from limbeck.align.vocabulary import NO_PARTNER, nearest, openings, shared_tokens
from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Network, Scene
from limbeck.core.registry import did_you_mean, register
from limbeck.core.types import Needs, Signals, Unit
from limbeck.losses.likelihood import likelihood_matching
from limbeck.losses.semantic import Pricing, semantic_transport
from limbeck.losses.vocabularies import Partition, hybrid_kl, mapped_kl, prefix_kl
from limbeck.objectives.costs import byte_costs, embedding_costs, table_costs
from limbeck.objectives.token import Share, Temperature

Positive = Annotated[int, Field(gt=0)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class TwoVocabularies:
    """Common to objectives on the logits of models whose columns mean different tokens."""

    asks: ClassVar[Needs] = frozenset({"logits"})
    needs: ClassVar[Needs] = frozenset({"logits"})
    unit: ClassVar[Unit] = "token"
    shared_vocabulary: ClassVar[bool] = False
    rowwise: ClassVar[bool] = True
    kind: ClassVar[str] = ""

    temperature: Temperature = 1.0

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """[n] losses."""
        assert student.logits is not None
        assert teacher.logits is not None
        return self._compare(student.logits, teacher.logits)

    def _compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[n] losses of [n, v] and [n, w] logits; what `finish` gives knows how."""
        raise RuntimeError(f"{self.kind} must learn the vocabularies first: call finish(scene)")

    def _both(self, scene: Scene) -> tuple[Network, Network]:
        """Teacher and student."""
        if scene.teacher is None:
            raise RecipeError("", "needs a teacher whose model is at hand, to know its vocabulary")
        return scene.teacher, scene.student


@register("objective", "semantic_transport")
@dataclass(frozen=True, kw_only=True)
class SemanticTransport(TwoVocabularies):
    """Optimal transport between the likeliest tokens of both, cheap between tokens that are alike.

    Attributes:
        k: how many of each side's likeliest tokens are kept; the others are one rest.
        epsilon: strength of the regulariser. Costs are at most 1 with `bytes`.
        cost: `bytes`, edit distance of the tokens' bytes; `embeddings`, 1 - cosine of the teacher's
            embeddings, for one tokenizer; or a .safetensors file with a tensor `cost` [teacher's
            vocabulary, student's], and to debias it `teacher` and `student`, square ones.
        iterations: the most of each transport.
    """

    k: Positive = 20
    epsilon: PositiveNumber = 0.1
    cost: str = "bytes"
    iterations: Positive = 100

    def finish(self, scene: Scene) -> "SemanticTransport":
        """Find what is alike.

        Raises:
            RecipeError: the cost is no such thing, or k is larger than a vocabulary.
        """
        teacher, student = self._both(scene)
        theirs, mine = teacher.token_bytes(), student.token_bytes()
        if self.k > (least := min(len(theirs), len(mine))):
            raise RecipeError(
                "k", f"must be at most {least}, the smaller vocabulary; it is {self.k}"
            )
        device = student.embeddings().device
        if self.cost == "bytes":
            pricing = byte_costs(theirs, mine, _ends(teacher, student), device)
        elif self.cost == "embeddings":
            pricing = embedding_costs(teacher, student)
        elif Path(self.cost).suffix == ".safetensors":
            pricing = table_costs(self.cost, len(theirs), len(mine), device)
        else:
            hint = did_you_mean(self.cost, ["bytes", "embeddings", "a .safetensors file"])
            raise RecipeError("cost", f"unknown cost {self.cost!r}; {hint}")
        return _PricedTransport(**_fields(self, SemanticTransport), pricing=pricing)


@dataclass(frozen=True, kw_only=True, eq=False)
class _PricedTransport(SemanticTransport):
    pricing: Pricing = field(repr=False)

    def _compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return semantic_transport(
            student,
            teacher,
            self.pricing,
            k=self.k,
            epsilon=self.epsilon,
            iterations=self.iterations,
            temperature=self.temperature,
        )


@register("objective", "mapped_kl")
@dataclass(frozen=True, kw_only=True)
class MappedKL(TwoVocabularies):
    """KL divergence with the teacher's nearest token in the place of each of the student's (MinED).

    Attributes:
        reverse: KL(student || teacher) in the place of KL(teacher || student).
        max_distance: edits beyond which a token has no partner; 0 keeps equal tokens only.
    """

    reverse: bool = False
    max_distance: Annotated[int, Field(ge=0)] | None = None

    def finish(self, scene: Scene) -> "MappedKL":
        """Find the nearest token to each.

        Raises:
            RecipeError: no token of the student has a partner.
        """
        teacher, student = self._both(scene)
        theirs, mine = teacher.token_bytes(), student.token_bytes()
        if teacher.vocabulary == student.vocabulary:
            columns = torch.arange(len(mine))
            columns[len(theirs) :] = NO_PARTNER
        else:
            roles = _roles(_ends(teacher, student))
            columns = nearest(theirs, mine, roles, max_distance=self.max_distance)
        if not bool((columns != NO_PARTNER).any()):
            raise RecipeError("", "no token of the student has one of the teacher beside it")
        columns = columns.to(student.embeddings().device)
        return _KnownMap(**_fields(self, MappedKL), columns=columns)


@dataclass(frozen=True, kw_only=True, eq=False)
class _KnownMap(MappedKL):
    columns: Tensor = field(repr=False)

    def _compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return mapped_kl(
            student,
            teacher,
            self.columns,
            reverse=self.reverse,
            temperature=self.temperature,
        )


@register("objective", "prefix_kl")
@dataclass(frozen=True, kw_only=True)
class PrefixKL(TwoVocabularies):
    """KL divergence after each teacher's token gave its probability to the student's first token.

    For a teacher whose tokens are longer than the student's, such as whole words for characters.
    """

    def finish(self, scene: Scene) -> "PrefixKL":
        """Find the token with which the student begins each of the teacher's.

        Raises:
            RecipeError: it can begin none of them.
        """
        teacher, student = self._both(scene)
        theirs, mine = teacher.token_bytes(), student.token_bytes()
        if teacher.vocabulary == student.vocabulary:
            columns = torch.arange(len(theirs))
            columns[len(mine) :] = NO_PARTNER
        else:
            columns = openings(theirs, mine, _roles(_ends(teacher, student)))
        if not bool((columns != NO_PARTNER).any()):
            raise RecipeError("", "the student can begin none of the teacher's tokens")
        columns = columns.to(student.embeddings().device)
        return _KnownOpenings(**_fields(self, PrefixKL), columns=columns)


@dataclass(frozen=True, kw_only=True, eq=False)
class _KnownOpenings(PrefixKL):
    columns: Tensor = field(repr=False)

    def _compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return prefix_kl(student, teacher, self.columns, temperature=self.temperature)


@register("objective", "hybrid_kl")
@dataclass(frozen=True, kw_only=True)
class HybridKL(TwoVocabularies):
    """KL divergence on the tokens that both have, distance of sorted probabilities on the others.

    Attributes:
        transport: weight of the second part.
    """

    transport: NotNegative = 1.0

    def finish(self, scene: Scene) -> "HybridKL":
        """Find the tokens that both have.

        Raises:
            RecipeError: one of the models has no tokens, or the student has none but shared ones
                and shares none.
        """
        teacher, student = self._both(scene)
        return _KnownPartition(
            **_fields(self, HybridKL),
            partition=partition(teacher, student).to(student.embeddings().device),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _KnownPartition(HybridKL):
    partition: Partition = field(repr=False)

    def _compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return hybrid_kl(
            student,
            teacher,
            self.partition,
            transport=self.transport,
            temperature=self.temperature,
        )


@register("objective", "likelihood_matching")
@dataclass(frozen=True, kw_only=True)
class LikelihoodMatching:
    """Both models should find each stretch of text as likely (Approximate Likelihood Matching).

    What is compared is the log-probability of a stretch and of a new word, or the end, behind it:
    without the latter, one model may have said "wo" on the way to "world" and the other to "wo".

    Attributes:
        temperature: the root of the probabilities that is compared; see `likelihood_matching`.
        outcome_threshold: stretches behind which the teacher gives a new word or the end less than
            this probability have loss 0. They count among the rows all the same.
    """

    asks: ClassVar[Needs] = frozenset({"chosen", "boundary"})
    needs: ClassVar[Needs] = frozenset({"chosen", "boundary"})
    unit: ClassVar[Unit] = "span"
    shared_vocabulary: ClassVar[bool] = False

    temperature: Temperature = 100.0
    outcome_threshold: Share = 0.1

    def __call__(self, student: Signals, teacher: Signals) -> Tensor:
        """[g] losses."""
        assert student.chosen is not None
        assert student.boundary is not None
        assert teacher.chosen is not None
        assert teacher.boundary is not None
        value = likelihood_matching(
            student.chosen + student.boundary,
            teacher.chosen + teacher.boundary,
            temperature=self.temperature,
        )
        comparable = teacher.boundary.exp() >= self.outcome_threshold
        return torch.where(comparable, value, 0.0)


def partition(teacher: Network, student: Network) -> Partition:
    """Which tokens both have, which only one; one vocabulary is shared down to its padding.

    Raises:
        RecipeError: the student has no tokens, or the teacher none that could be compared.
    """
    theirs, mine = teacher.token_bytes(), student.token_bytes()
    if teacher.vocabulary == student.vocabulary:
        both = torch.arange(min(len(theirs), len(mine)))
        return Partition(
            student=both,
            teacher=both,
            student_rest=both[:0],
            teacher_rest=both[:0],
            student_other=torch.arange(len(both), len(mine)),
        )
    of_teacher, of_student = shared_tokens(theirs, mine, _roles(_ends(teacher, student)))
    columns = torch.arange(max(len(theirs), len(mine)))

    def rest(tokens: list[bytes | None], shared: Tensor, known: bool) -> Tensor:
        left = torch.tensor([(token is not None) == known for token in tokens], dtype=torch.bool)
        left[shared] = False
        return columns[: len(tokens)][left]

    found = Partition(
        student=of_student,
        teacher=of_teacher,
        student_rest=rest(list(mine), of_student, known=True),
        teacher_rest=rest(list(theirs), of_teacher, known=True),
        student_other=rest(list(mine), of_student, known=False),
    )
    if not len(found.student) and not (len(found.student_rest) and len(found.teacher_rest)):
        raise RecipeError("", "the two vocabularies have nothing that could be compared")
    return found


def _ends(teacher: Network, student: Network) -> tuple[int, int] | None:
    """Both models' end-of-text tokens, where both have one."""
    theirs, mine = teacher.end_token, student.end_token
    return None if theirs is None or mine is None else (theirs, mine)


def _roles(ends: tuple[int, int] | None) -> dict[int, int]:
    return {} if ends is None else {ends[0]: ends[1]}


def _fields(objective: Any, of: type) -> dict[str, Any]:
    """The settings that a recipe may give, and not what an earlier `finish` has found."""
    return {each.name: getattr(objective, each.name) for each in fields(of)}
