"""What a recipe may say: frozen values, which `recipe/resolve.py` makes from YAML and checks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from limbeck.core.specs import EnsembleTeacher, SelfTeacher, ServerTeacher
from limbeck.core.term import Term

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long and how fast.

    Attributes:
        steps: optimizer steps.
        batch_tokens: tokens of one step, over all processes and accumulation, without padding.
        learning_rate: at the top of the schedule.
        schedule: what follows the warm-up: `cosine`, `linear`, `wsd` (flat, then down over the
            last fifth) or `constant`.
        warmup: share of the steps in which the rate rises.
        weight_decay: AdamW's, on matrices only.
        clip: largest gradient norm.
        accumulate: micro-batches of a step per process; raise it when memory runs out.
        packing: `always` lays the samples of a micro-batch end to end in one line, without padding,
            wherever the models keep them apart; `auto` does where that is also faster.
        logits: `chunked` takes losses a few rows at a time in the place of the student's output
            head, so that all logits never exist together; `compiled` does with compiled code;
            `naive` makes them all; `auto` is `chunked` where the models and terms allow it, and
            in one kernel where the terms have it.
        balance: how the sizes of several terms are evened out before their weights count: `fixed`
            leaves them; `gradient` gives all the same gradient norm at the last layer they share,
            measured every 20 steps; `uncertainty` divides each by its own running size.
        parallel: with torchrun, `ddp` copies the model to each process, `fsdp` splits it.
        device: `auto`, `cpu`, `cuda` ...
        save_every: steps between checkpoints.
        keep: how many checkpoints stay.
        patience: non-finite steps in a row before the run stops.
        profile: write where the time of a few early steps goes, in `profile/`.
    """

    steps: Positive = 500
    batch_tokens: Positive = 16384
    learning_rate: PositiveFloat = 3.0e-4
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    clip: PositiveFloat = 1.0
    accumulate: Positive = 1
    packing: Literal["auto", "always", "never"] = "auto"
    logits: Literal["auto", "chunked", "compiled", "naive"] = "auto"
    balance: Literal["fixed", "gradient", "uncertainty"] = "fixed"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    device: str = "auto"
    save_every: Positive = 100
    keep: Positive = 2
    patience: Positive = 5
    profile: bool = False


@dataclass(frozen=True, kw_only=True)
class Price:
    """US dollars per device-hour, from which the report computes the cost of 1,000 tokens."""

    teacher_usd_per_hour: PositiveFloat | None = None
    student_usd_per_hour: PositiveFloat | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run.

    `student`, `source`, each teacher and each evaluation are values of a registered kind.
    `compare: labels` adds a control arm: the same student, data and steps on hard labels alone.
    """

    student: Any
    source: Any
    terms: tuple[Term, ...]
    teachers: Mapping[str, Any] = field(default_factory=dict[str, Any])
    train: Train = Train()
    evals: tuple[Any, ...] = ()
    compare: Literal["labels"] | None = None
    price: Price = Price()
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def readers(self) -> Mapping[str, Any]:
        """The teachers that read; a run has no use for one that only writes data.

        A server can be paid to read, so it is asked only where a term says so.
        """
        heard = {term.teacher for term in self.terms}
        return {
            name: spec
            for name, spec in self.teachers.items()
            if spec.offers - {"text"} and (name in heard or not isinstance(spec, ServerTeacher))
        }

    @property
    def speaker(self) -> str | None:
        """The teacher that writes in the source, or helps to, if one does."""
        return getattr(getattr(self.source, "speaker", None), "teacher", None)

    @property
    def models(self) -> Mapping[str, Any]:
        """The readers with weights of their own, on this machine or in a cache."""
        without = EnsembleTeacher | SelfTeacher | ServerTeacher
        return {n: s for n, s in self.readers.items() if not isinstance(s, without)}

    @property
    def others(self) -> Mapping[str, Any]:
        """The readers that the student can be compared with: models other than itself."""
        without = SelfTeacher | ServerTeacher
        return {n: s for n, s in self.readers.items() if not isinstance(s, without)}
