"""What models are asked to continue when their speed is measured."""

from types import SimpleNamespace

from tests.evals.conftest import sample
from torch import nn

from limbeck.core.types import Sample, Turn
from limbeck.evals.speed import OPENING_WORDS, openings


class Words:
    """A model that reads words, up to a last position where one is given."""

    def __init__(self, positions: int | None = None) -> None:
        self.transformer = nn.Module()
        self.transformer.wpe = nn.Embedding(positions or 1, 1)
        text = SimpleNamespace(max_position_embeddings=positions)
        self.transformer.config = SimpleNamespace(get_text_config=lambda: text)

    def prompt_ids(self, prompt: Sample) -> list[int]:
        return [len(word) for turn in prompt.turns for word in turn.text.split()]


def texts(found: list[Sample]) -> list[str]:
    return [part.turns[0].text for part in found]


def test_prompts_and_the_first_words_of_texts_are_continued() -> None:
    plain = Sample(id="t", turns=(Turn(text="word " * 50, learn=True),))
    found = openings([Words()], [sample("two words", "c"), plain], 4)
    assert texts(found) == ["two words", " ".join(["word"] * OPENING_WORDS)]
    assert all(len(part.turns) == 1 for part in found)


def test_what_is_empty_is_left_out() -> None:
    nothing = Sample(id="n", turns=())
    assert texts(openings([Words()], [nothing, sample("", "c"), sample("a", "c")], 4)) == ["a"]


def test_what_goes_beyond_the_last_position_of_any_model_is_left_out() -> None:
    samples = [sample("a b", ""), sample("a b c", "")]
    assert texts(openings([Words(), Words(6)], samples, 4)) == ["a b"]
    assert texts(openings([Words(7), Words()], samples, 4)) == ["a b", "a b c"]
    assert openings([Words(5), Words(7)], samples, 4) == []
