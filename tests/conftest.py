"""What many tests need: the folder of shared assets, a tiny tokenizer, tiny models and data."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings

# How long an example takes is the machine's affair.
settings.register_profile("limbeck", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("limbeck")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():  # before anything imports Triton, whose kernels then run anywhere
    os.environ["TRITON_INTERPRET"] = "1"

WORDS = "the cat sat on a mat and saw two dogs run past three old red trees near the river".split()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The assets beside the checkout; tests that need them skip where they are absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.exists():
        pytest.skip("the folder of shared assets is absent")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Two test workers with two threads each would fight over two cores."""
    torch.set_num_threads(1)


HOLD = """
import sys
from pathlib import Path
from limbeck.core.files import held
with held(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="session")
def held_elsewhere():
    """`with held_elsewhere(folder)`: another process uses it."""

    @contextmanager
    def holding(folder):
        command = [sys.executable, "-c", HOLD, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes) as process:
            assert process.stdout.readline() == "True\n"
            yield
            process.communicate("")

    return holding


def byte_level(size: int, text: str):
    """A byte-level tokenizer of up to so many tokens, learnt from a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([text] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def make_tokenizer():
    """Makes a byte-level tokenizer: (size, text)."""
    return byte_level


@pytest.fixture(scope="session")
def tokenizer():
    """A 320-token byte-level tokenizer with a simple chat template."""
    fast = byte_level(320, " ".join(WORDS))
    fast.chat_template = (
        "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )
    return fast


def tiny_config(vocabulary: int, **changes):
    """A two-layer Llama of 16 units."""
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**{**sizes, **changes})


@pytest.fixture(scope="session")
def tiny_teacher(tokenizer, tmp_path_factory) -> Path:
    """A folder with random weights, large enough that its distribution is not flat."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models") / "teacher"
    torch.manual_seed(0)
    config = tiny_config(len(tokenizer), num_hidden_layers=4, initializer_range=0.4)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Sixty rows of prompt and completion, of many lengths."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w") as file:
        for row in range(60):
            prompt = " ".join(WORDS[(row + k) % len(WORDS)] for k in range(3 + row % 5))
            answer = " ".join(WORDS[(row * 7 + k) % len(WORDS)] for k in range(2 + row % 11))
            file.write(json.dumps({"prompt": prompt + "\n", "completion": answer}) + "\n")
    return path


@pytest.fixture
def make_recipe(tiny_teacher, tiny_data):
    """Builds a recipe of the tiny models; keyword arguments replace its parts."""
    from limbeck.recipe.document import Document
    from limbeck.recipe.resolve import resolve

    def make(train=None, **parts):
        values = {
            "student": {"from": "teacher", "layers": [0, 3]},
            "teachers": {"big": {"name": str(tiny_teacher)}},
            "source": {"path": str(tiny_data), "holdout": 4},
            "terms": [
                {"objective": {"kind": "forward_kl"}, "weight": 0.7},
                {"objective": {"kind": "cross_entropy"}, "weight": 0.3},
            ],
            "train": {
                "steps": 8,
                "batch_tokens": 200,
                "learning_rate": 0.01,
                "save_every": 3,
                **(train or {}),
            },
        }
        return resolve(Document({**values, **parts}, {}))

    return make


@pytest.fixture
def rollout_recipe(make_recipe, tiny_data):
    """Builds a recipe whose student writes most of what it learns; arguments are of `train`."""

    def make(**train):
        return make_recipe(
            source={
                "kind": "rollouts",
                "of": {"path": str(tiny_data), "holdout": 4},
                "share": 0.7,
                "max_tokens": 8,
                "batch": 6,
                "replay": {"size": 40, "share": 0.3},
            },
            train=train,
        )

    return make


@pytest.fixture
def call(capsys):
    """Runs the command line in this process; gives its exit code and what it said."""

    from limbeck import cli

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return SimpleNamespace(code=stopped.value.code, err=said.err, out=said.out)

    return run
