"""What the comparisons train on: cut students, text in pieces, and what a teacher writes.

All of it is made once into a folder and depends on nothing but this code and its inputs, so that a
comparison which goes on another day finds the same.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import limbeck
from limbeck.core.random import stream
from limbeck.core.specs import CausalStudent, LocalTeacher
from limbeck.core.types import Sample, Sampling, Turn
from limbeck.demo import model_path, problems, write_jsonl
from limbeck.models.load import load_student, load_teacher, save_student

CPU = torch.device("cpu")
PIECE_CHARACTERS = 240
"""Of a story; 256 tokens of one character are the longest that babyllama105 reads."""

PROMPT_WORDS = 5


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made under another name first where it is not there."""
    if not path.exists():
        aside = path.with_name(f".{path.name}")
        make(aside)
        aside.rename(path)
    return path


def named(word: str, *inputs: Any) -> str:
    """A name that is another one where what a file is made of is something else."""
    text = json.dumps([str(one) for one in inputs])
    return f"{word}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def cut(name: str, layers: Sequence[int], folder: Path) -> Path:
    """A student of some layers of a model."""

    def make(aside: Path) -> None:
        spec = CausalStudent(from_="big", layers=tuple(layers))
        student = load_student(spec, {"big": LocalTeacher(name=name)}, CPU, 0)
        save_student(student, student.module.state_dict(), aside, torch.float32)

    return once(folder, make)


def without_end(name: Path, folder: Path) -> Path:
    """The same model, whose tokenizer puts no end-of-sequence token behind a text.

    Pieces of stories are no whole texts; after most of them the story goes on.
    """

    def make(aside: Path) -> None:
        aside.mkdir(parents=True)
        for path in name.iterdir():
            if path.name != "tokenizer_config.json":
                (aside / path.name).write_bytes(path.read_bytes())
        settings = json.loads((name / "tokenizer_config.json").read_text())
        settings.pop("eos_token", None)
        (aside / "tokenizer_config.json").write_text(json.dumps(settings))

    return once(folder, make)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """JSONL."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def pieces(stories: Path, alphabet: set[str], path: Path, count: int) -> Path:
    """Rows of whole sentences from stories, as long as both tokenizers can read.

    The first words are the prompt. Pieces with a character that `alphabet` lacks are left out, so
    that both tokenizers give back every piece. They are shuffled: `count` of them are of all
    stories.
    """

    def make(aside: Path) -> None:
        found = [piece for row in read_rows(stories) for piece in _pieces(row["text"])]
        order = torch.randperm(len(found), generator=stream(0, "pieces")).tolist()
        known = [found[i] for i in order if set(found[i]) <= alphabet | {" "}]
        rows: list[dict[str, Any]] = []
        for piece in known[:count]:
            words = piece.split(" ")
            prompt = " ".join(words[:PROMPT_WORDS])
            rows.append({"prompt": prompt, "completion": piece[len(prompt) :]})
        write_rows(aside, rows)

    return once(path, make)


def _pieces(text: str) -> Iterator[str]:
    piece = ""
    for sentence in " ".join(text.split()).replace("! ", "!\n").replace(". ", ".\n").split("\n"):
        longer = f"{piece} {sentence}".strip()
        if len(longer) > PIECE_CHARACTERS and piece:
            yield piece
            longer = sentence
        piece = longer
    if len(piece) > PIECE_CHARACTERS or len(piece.split(" ")) <= 2 * PROMPT_WORDS:
        return
    yield piece


def spoken(teacher: Path, rows: Path, path: Path, sampling: Sampling, max_length: int) -> Path:
    """What a teacher writes for the same prompts; rows in which it writes nothing are left out.

    A decoder of SentencePiece's kind drops the space before the first word that follows a prompt:
    it is put back where the prompt has none.
    """

    def make(aside: Path) -> None:
        model = load_teacher(LocalTeacher(name=str(teacher)), CPU, max_length)
        prompts = [row["prompt"] for row in read_rows(rows)]
        samples = [Sample(id=str(i), turns=(Turn(text=p),)) for i, p in enumerate(prompts)]
        made: list[dict[str, Any]] = []
        for prompt, text in zip(prompts, model.speak(samples, sampling), strict=True):
            text = " ".join(text.split())
            apart = text[:1].isalnum() and not prompt[-1:].isspace()
            if text:
                made.append({"prompt": prompt, "completion": " " * apart + text})
        write_rows(aside, made)

    return once(path, make)


def word_problems(folder: Path, count: int, task_count: int) -> dict[str, Path]:
    """The demo's problems: rows to train on, others, held-out text, problems to answer."""
    wanted = {
        "rows": (0, "train", count),
        "others": (2, "train", 4 * count),
        "held_out": (1, "test", 100),
        "task": (0, "test", task_count),
    }
    return {
        name: once(
            folder / f"{name}-{of}.jsonl",
            lambda aside, seed=seed, split=split, of=of: write_jsonl(
                aside, problems(seed, split, of)
            ),
        )
        for name, (seed, split, of) in wanted.items()
    }


def retokenized(
    name: Path, texts: Sequence[str], size: int, rows: Path, train: dict[str, Any], folder: Path
) -> Path:
    """A model moved to a byte-level vocabulary of `size` tokens that is made from `texts`.

    A new token's embedding is the mean of those of the old tokens that its text has; then it is
    trained on `rows` alone, without a teacher, until it is a model again.
    """

    def make(aside: Path) -> None:
        start = folder.with_name("untrained")
        new_vocabulary(name, texts, size, start)
        recipe = {
            "student": {"name": str(start), "max_length": 384},
            "source": {"path": str(rows), "holdout": 0},
            "terms": [{"objective": "cross_entropy"}],
            "train": {**train, "save_every": 100_000, "device": "cpu"},
            "seed": 1234,  # not one of the arms' seeds
        }
        run = folder.with_name("warm-up")
        shutil.rmtree(run, ignore_errors=True)
        limbeck.run(recipe, run)
        (run / "student").rename(aside)

    return once(folder, make)


def new_vocabulary(name: Path, texts: Sequence[str], size: int, folder: Path) -> None:
    """The model with a vocabulary of its own and mean embeddings."""
    old: Any = AutoTokenizer.from_pretrained(name)
    state = json.loads(old.backend_tokenizer.to_str())
    raw = Tokenizer.from_str(json.dumps(state))
    specials = [str(token["content"]) for token in state["added_tokens"]]
    made = Tokenizer(BPE())
    made.pre_tokenizer, made.decoder = raw.pre_tokenizer, raw.decoder
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.post_processor = raw.post_processor
    module: Any = AutoModelForCausalLM.from_pretrained(name)
    weight = module.get_input_embeddings().weight.detach()
    rows = torch.zeros(made.get_vocab_size(), weight.shape[1])
    for token, index in made.get_vocab().items():
        if token in specials:
            rows[index] = weight[old.convert_tokens_to_ids(token)]
            continue
        # Old and new tokens are written in the same byte-level alphabet.
        pieces = raw.model.tokenize(token)
        rows[index] = weight[[piece.id for piece in pieces]].mean(0)
    module.resize_token_embeddings(len(rows), mean_resizing=False)
    with torch.no_grad():
        module.get_input_embeddings().weight.copy_(rows)
    module.save_pretrained(folder)
    names = {key: getattr(old, key) for key in ("bos_token", "eos_token", "pad_token")}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)


def demo_model(which: str) -> Path:
    """One of the demo's two models."""
    return model_path("teacher" if which == "teacher" else "student")
