"""Which of a row's tokens are scored, with a real tokenizer and chat templates."""

from dataclasses import replace

import torch
from fakes import FakeWriter, row, run_step
from transformers import AutoTokenizer

from limbeck.core.types import Signals, Turn
from limbeck.demo import model_path
from limbeck.models.encode import Encoder
from limbeck.sources.dataset import to_sample
from limbeck.synth.divergence import Divergence
from limbeck.synth.ranking import Rank
from limbeck.synth.rows import row_of
from limbeck.synth.scoring import read_tokens, written_tokens
from limbeck.synth.weights import Weights

DROPS = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|a|>{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% else %}<|u|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)
"""Drops what an assistant thought, as the templates of DeepSeek-R1's students do."""

SHOWS = DROPS.replace(".split('</think>')[-1]", "")

ASKED = (Turn(text="What is 6*7?", role="user"),)
NOT_SHOWN = "the chat template does not show this text as it is written, so it cannot be scored"


class Even:
    """A reader that gives every token -1 nat, with a real tokenizer."""

    name, offers = "even", frozenset({"chosen"})

    def __init__(self, template):
        tokenizer = AutoTokenizer.from_pretrained(model_path("student"))
        tokenizer.chat_template = template
        self.encoder = Encoder(tokenizer, 512)
        self.encode, self.collate = self.encoder.encode, self.encoder.collate

    def read(self, view, needs):
        del needs
        return Signals(labels=view.labels, chosen=torch.full((len(view.rows),), -1.0))


def test_a_text_that_the_template_rewrites_is_not_a_certain_one():
    """Without a token it had log-probability 0, more than any text that can be read."""
    reader = Even(DROPS)
    texts = ["<think>6*7 = 42</think>42", "It is 42"]
    rows = [row(f"a#{k}", text, prompt=ASKED, group="a") for k, text in enumerate(texts)]
    for step in (Weights(teacher="t"), Divergence(teacher="t")):
        found, _ = run_step(step, rows, readers={"t": reader, "student": reader})
        assert [one.failure for one in found] == [NOT_SHOWN, None]
    writers = {"t": FakeWriter(lambda *_: "x")}
    found, _ = run_step(Rank(teacher="t", student="t"), rows, writers, {"t": reader})
    assert {one.id: one.failure for one in found}["a#0"] == NOT_SHOWN


def test_an_earlier_answer_of_a_conversation_is_no_part_of_this_one():
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "zebra zebra zebra zebra"},
        {"role": "user", "content": "go on"},
        {"role": "assistant", "content": "yes it is"},
    ]
    talk = row_of(to_sample({"messages": messages}, "x"))
    alone = replace(talk, prompt=talk.prompt[2:])
    (_, told), (_, short) = read_tokens([talk, alone], Even(SHOWS))
    assert [(one.start, one.end) for one in told] == [(one.start, one.end) for one in short]
    assert told[-1].start == told[-1].end == len("yes it is")


def test_a_character_that_was_written_in_several_tokens_is_spelt():
    """As emoji are, and much Chinese: OpenAI names the bytes, and so do models on this machine."""
    scores = [
        ["I", -0.1],
        [r"bytes:\x20\xf0\x9f", -0.2],
        [r"bytes:\x98", -0.3],
        [r"bytes:\x80", -0.4],
    ]
    tokens = written_tokens(row("a", "I \U0001f600!").noted(scores=[*scores, ["!", -0.5]]))
    assert [(one.start, one.end) for one in tokens] == [(0, 1), (1, 4), (4, 5), (5, 6), (6, 7)]
    assert [one.logp for one in tokens] == [-0.1, -0.2, -0.3, -0.4, -0.5]
    marks = [["I", -0.1], [" \ufffd", -0.2], ["\ufffd", -0.3]]
    failure = written_tokens(row("a", "I \U0001f600").noted(scores=marks))
    assert "does not say which part; let it read the text instead" in failure
