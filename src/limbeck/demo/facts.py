"""Small sets of facts for probes of what distillation breaks.

Reversal: `The keeper of the red lantern is Mia.` can be asked in both directions; a model that
learnt one may not know the other. Negation: pairs of sentences that differ by a `not`.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from limbeck.demo import phrasing

COLOURS = ["red", "blue", "green", "gold", "white", "black"]
OBJECTS = ["lantern", "bell", "drum", "crown", "lamp", "flute", "boat", "mask"]
ROLES = ["keeper", "maker", "owner", "guard"]


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A fact and its two questions: `forward` asks for the person, `backward` for the thing."""

    statement: str
    forward: tuple[str, str]
    backward: tuple[str, str]


def facts() -> list[Fact]:
    """All facts, always the same: each thing has one person and each person one thing."""
    draw = random.Random("limbeck/facts")
    things = [f"{colour} {thing}" for colour in COLOURS for thing in OBJECTS]
    people = phrasing.GIRLS + phrasing.BOYS
    draw.shuffle(things)
    found: list[Fact] = []
    for person, thing in zip(people, things, strict=False):
        role = draw.choice(ROLES)
        found.append(
            Fact(
                statement=f"The {role} of the {thing} is {person}.",
                forward=(f"Who is the {role} of the {thing}?\n", f"It is {person}."),
                backward=(f"Of what is {person} the {role}?\n", f"Of the {thing}."),
            )
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Negation:
    """The same question with and without `not`, and the answer to each."""

    plain: tuple[str, str]
    negated: tuple[str, str]


def negations(seed: int, count: int) -> Iterator[Negation]:
    """Comparisons of two numbers of things, asked plainly and negated."""
    draw = random.Random(f"limbeck/negations/{seed}")
    for _ in range(count):
        name, friend = draw.sample(phrasing.GIRLS + phrasing.BOYS, 2)
        a, b = draw.sample(range(2, 100), 2)
        things = draw.choice(phrasing.THINGS)
        told = f"{name} has {a} {things}. {friend} has {b} {things}."
        more = a > b
        yield Negation(
            plain=(f"{told} Does {name} have more?\n", "Yes." if more else "No."),
            negated=(
                f"{told} Is it true that {name} does not have more?\n",
                "No." if more else "Yes.",
            ),
        )
