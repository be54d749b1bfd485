"""The words of the embedded domain: names, things, and many ways to say each step.

Each kind of sentence has phrasings to train on and, behind them, phrasings that are only ever
used to test whether a model understands what it has not read before.
"""

from dataclasses import dataclass

GIRLS = (
    "Mia Ana Lena Zoe Ruth Nora Ines Tara Lucy Emma Olga Rosa Hana Maya Vera Ella Alma Jana Kira "
    "Leah"
).split()
BOYS = (
    "Tom Ben Max Leo Sam Ivan Noah Paul Omar Hugo Jack Finn Axel Karl Luis Adam Rafi Emil Theo Dan"
).split()
THINGS = (
    "apples pears plums cookies marbles stamps shells coins books pencils stones cards stickers "
    "buttons beads balls flowers candles kites nuts eggs cakes tickets toys hats cups keys bells "
    "leaves ribbons"
).split()
HOLDERS = "boxes bags jars baskets rows shelves friends children".split()


@dataclass(frozen=True)
class Phrasings:
    """Ways to say one thing: `known` ones are trained on, `unseen` ones are only tested."""

    known: tuple[str, ...]
    unseen: tuple[str, ...]


START = Phrasings(
    known=(
        "{name} has {n} {things}.",
        "{name} starts with {n} {things}.",
        "There are {n} {things} on the table of {name}.",
        "{name} counts {n} {things} at home.",
        "This morning {name} had {n} {things}.",
        "{n} {things} belong to {name}.",
    ),
    unseen=("In the room of {name} lie {n} {things}.", "{name} is the owner of {n} {things}."),
)

ADD = Phrasings(
    known=(
        "{he} finds {k} more.",
        "Then {he} buys {k} more {things}.",
        "{friend} gives {him} {k} more.",
        "Later {k} {things} are added.",
        "{he} wins {k} {things} in a game.",
        "After lunch {he} gets another {k}.",
        "{friend} brings {k} {things} as a gift.",
    ),
    unseen=("{k} extra {things} come from {friend}.", "Later on {he} gets {k} in the mail."),
)

SUBTRACT = Phrasings(
    known=(
        "{he} loses {k} of them.",
        "Then {he} gives {k} {things} to {friend}.",
        "{he} sells {k} {things}.",
        "{friend} takes {k} away.",
        "On the way home {k} are lost.",
        "{he} throws {k} old ones away.",
        "{k} of the {things} break.",
    ),
    unseen=("{he} hands {k} of them over to {friend}.", "{k} {things} are gone the next day."),
)

MULTIPLY = Phrasings(
    known=(
        "The next day {he} has {k} times as many.",
        "Then the number of {things} grows {k} times.",
        "{he} works hard until there are {k} times as many {things}.",
        "A kind aunt makes it {k} times as many.",
        "By night the pile is {k} times as large.",
    ),
    unseen=(
        "Soon there are {k} times as many {things} as before.",
        "{he} makes the pile {k} times as big.",
    ),
)

DIVIDE = Phrasings(
    known=(
        "{he} shares them equally among {k} {holders} and looks at one share.",
        "Then {he} puts them into {k} equal {holders} and keeps only one.",
        "They are split into {k} equal parts, and {he} keeps one part.",
        "{he} divides them by {k} and keeps one share.",
        "{k} {holders} get the same number each, and {he} takes one of these.",
    ),
    unseen=(
        "{he} makes {k} equal piles and keeps a single pile.",
        "Of {k} equal {holders} {he} keeps one.",
    ),
)

OTHER = Phrasings(
    known=(
        "{friend} has {k} {things}.",
        "{friend} owns {k} {things}.",
        "At the same time {friend} has {k} {things}.",
    ),
    unseen=("{k} {things} belong to {friend}.",),
)

ASK = Phrasings(
    known=(
        "How many {things} does {name} have now?",
        "How many {things} are there in the end?",
        "What number of {things} does {name} have at last?",
        "How many {things} are left with {name}?",
    ),
    unseen=("Can you say how many {things} {name} has now?",),
)

ASK_MORE = Phrasings(
    known=(
        "How many more {things} does {name} have than {friend}?",
        "By how many {things} is {name} ahead of {friend}?",
    ),
    unseen=("How many {things} more than {friend} does {name} have?",),
)

ASK_FEWER = Phrasings(
    known=(
        "How many fewer {things} does {name} have than {friend}?",
        "By how many {things} is {name} behind {friend}?",
    ),
    unseen=("How many {things} fewer than {friend} does {name} have?",),
)

# One line of a rationale. Which of them is drawn is chance: a text shows one, a teacher's
# distribution knows them all.
STEP = (
    "{a} {op} {b} = {c} {things}.",
    "{name} has {a} {op} {b} = {c}.",
    "Now {a} {op} {b} = {c}.",
    "That makes {a} {op} {b} = {c}.",
)
COMPARE_STEP = ("The difference is {a} - {b} = {c}.", "{a} - {b} = {c} {things}.")
ANSWER = "The answer is {answer}."
