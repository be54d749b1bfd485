"""A real server over loopback: `transformers serve` with the embedded teacher, asked like any."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from transformers import AutoTokenizer

from limbeck.core.errors import ServerError
from limbeck.core.exchange import Question
from limbeck.core.specs import ServerTeacher
from limbeck.core.types import Sample, Sampling, Turn
from limbeck.demo import model_path, problems, verify
from limbeck.teachers import server as module
from limbeck.teachers.server import Server
from limbeck.teachers.server_reader import ServerReader

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (find_spec("fastapi") and find_spec("uvicorn")),
        reason="transformers[serving] is absent",
    ),
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.6"),
        reason="transformers serve has no completions before 5.6",
    ),
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT_SECONDS", 0.001)


@pytest.fixture(scope="module")
def url(tmp_path_factory, serving):
    """A server that is up."""
    command = Path(sys.executable).with_name("transformers")
    if not command.exists():
        command = shutil.which("transformers")
    with serving([str(command), "serve"], tmp_path_factory.mktemp("serve")) as url:
        yield url


def spec_of(url, tmp_path, model, **fields):
    ledger = str(tmp_path / "ledger.sqlite")
    return ServerTeacher(url=url, model=model, ledger=ledger, in_flight=2, **fields)


def test_it_is_asked_as_any_other(url, tmp_path):
    spec = spec_of(url, tmp_path, str(model_path("teacher")), api="completions")
    asked = list(problems(0, "test", 4))
    sampling = Sampling(max_tokens=100, temperature=0.0)
    questions = [Question(id=str(k), prompt=(Turn(text=p.prompt),)) for k, p in enumerate(asked)]
    with Server(spec, display=False) as server:
        found = [reply for (reply,) in server.answers(questions, sampling)]
        # What it cannot do was found out: it takes no notice of `n` and `logprobs`.
        assert not server.capabilities.logprobs
        assert not server.capabilities.n
    assert all(reply.whole for reply in found)
    assert all(verify(p, reply.text) for p, reply in zip(asked, found, strict=True))


def test_conversations_need_a_chat_template(url, tmp_path):
    plain, folder = model_path("teacher"), tmp_path / "teacher"
    with_template = shutil.copytree(plain, folder)
    template = "{% for turn in messages %}{{ turn['content'] }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    text = "Tom has 3 apples. He finds 4 more. How many apples does Tom have now?"
    asked = [Question(id="a", prompt=(Turn(text=text, role="user"),))]
    with Server(spec_of(url, tmp_path, str(with_template)), display=False) as server:
        ((reply,),) = server.answers(asked, Sampling(max_tokens=60))
        assert reply.whole
        assert "The answer is" in reply.text
        assert not server.capabilities.prefix
    with (
        Server(spec_of(url, tmp_path, str(plain), attempts=1), display=False) as server,
        pytest.raises(ServerError, match="plain question: status 500"),
    ):
        list(server.answers(asked, Sampling(max_tokens=60)))


def test_it_draws_only_where_the_generation_settings_say_so(url, tmp_path, shared):
    """A trap of this server: temperature and seed count for nothing where `do_sample` is off."""
    model = str(shared / "models" / "stories260K")
    asked = [Question(id="s", prompt=(Turn(text="Once upon a time"),))]
    sampling = Sampling(max_tokens=20, temperature=1.0, seed=1)
    draws = {"generation_config": json.dumps({"do_sample": True, "eos_token_id": 2})}
    different = []
    for place, extra in enumerate(({}, draws)):
        spec = spec_of(url, tmp_path / str(place), model, api="completions", extra=extra)
        with Server(spec, display=False) as server:
            (replies,) = server.answers(asked, sampling, 4)
            different.append(len({reply.text for reply in replies}))
            assert server.capabilities.seed is (True if extra else None)
    assert different[0] == 1
    assert different[1] > 1


def test_it_does_not_read(url, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path("teacher"))
    spec = spec_of(url, tmp_path, str(model_path("teacher")), api="completions")
    sample = Sample(id="a", turns=(Turn(text="Tom"), Turn(text=" has 3", learn=True)))
    with ServerReader(spec, tokenizer, max_length=32) as reader:
        view = reader.collate([reader.encode(sample)])
        with pytest.raises(ServerError, match="says nothing of text"):
            reader.read(view, frozenset({"chosen"}))
