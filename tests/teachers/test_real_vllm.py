"""vLLM's server over loopback with the embedded teacher; needs the command `vllm` (CPU or GPU)."""

import shutil

import pytest
import torch

from limbeck.core.errors import ServerError
from limbeck.core.exchange import Question
from limbeck.core.specs import LocalTeacher, ServerTeacher
from limbeck.core.types import Sample, Sampling, Turn
from limbeck.demo import model_path, problems, verify
from limbeck.losses.sparse import sparse_kl
from limbeck.models.load import load_teacher
from limbeck.synth.rows import Row
from limbeck.synth.scoring import SCORES, written_tokens
from limbeck.teachers.server import Server
from limbeck.teachers.server_reader import ServerReader

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("vllm") is None, reason="the command vllm is not on the path"),
]

MOST_LOGPROBS = 20
"""What vLLM gives unless it is started with more."""


@pytest.fixture(scope="module")
def url(tmp_path_factory, serving):
    """A server that is up."""
    folder = tmp_path_factory.mktemp("vllm")
    model = shutil.copytree(model_path("teacher"), folder / "teacher")
    template = "{{ bos_token }}{% for turn in messages %}{{ turn['content'] }}\n{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    command = ["vllm", "serve", str(model), "--served-model-name", "demo"]
    command += ["--dtype", "float32", "--enforce-eager"]
    with serving(command, folder, VLLM_CPU_KVCACHE_SPACE="1") as url:
        yield url


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(LocalTeacher(name=str(model_path("teacher"))), torch.device("cpu"), 256)


def spec_of(url, tmp_path, **fields):
    ledger = str(tmp_path / "ledger.sqlite")
    return ServerTeacher(url=url, model="demo", ledger=ledger, in_flight=4, **fields)


def text_of(problem, api):
    """As the template of the chat ends it by itself."""
    return problem.prompt if api == "completions" else problem.prompt.rstrip("\n")


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_it_is_asked_as_any_other(url, tmp_path, api):
    asked = list(problems(0, "test", 8))
    role = "user" if api == "chat" else None
    questions = [
        Question(id=str(k), prompt=(Turn(text=text_of(p, api), role=role),))
        for k, p in enumerate(asked)
    ]
    with Server(spec_of(url, tmp_path, api=api), display=False) as server:
        found = [reply for (reply,) in server.answers(questions, Sampling(max_tokens=100))]
        assert server.capabilities.n
        assert server.capabilities.logprobs
        assert server.capabilities.prefix
    assert all(reply.whole for reply in found)
    assert all(verify(p, reply.text) for p, reply in zip(asked, found, strict=True))


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_draws_are_seeded_and_their_scores_are_the_models(url, tmp_path, teacher, api):
    role = "user" if api == "chat" else None
    (problem,) = problems(0, "test", 1)
    asked = [Question(id="s", prompt=(Turn(text=text_of(problem, api), role=role),))]
    sampling = Sampling(max_tokens=60, temperature=1.0, seed=1, scores=3)
    drawn = []
    for place in ("a", "b"):
        with Server(spec_of(url, tmp_path / place, api=api), display=False) as server:
            (replies,) = server.answers(asked, sampling, 4)
        drawn.append([reply.text for reply in replies])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1
    for reply in replies:
        assert reply.whole
        scores = [[score.text, score.logp] for score in reply.scores]
        row = Row(id="s", prompt=asked[0].prompt, completion=reply.text, notes={SCORES: scores})
        tokens = written_tokens(row)
        assert not isinstance(tokens, str), tokens
        sample = Sample(
            id="s", turns=(Turn(text=problem.prompt), Turn(text=reply.text, learn=True))
        )
        with torch.no_grad():
            here = teacher.read(teacher.collate([teacher.encode(sample)]), frozenset({"chosen"}))
        logp = [token.logp for token in tokens]
        torch.testing.assert_close(torch.tensor(logp), here.chosen[: len(logp)], atol=1e-3, rtol=0)


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_scores_go_on_behind_a_stop_string(url, tmp_path, api):
    role = "user" if api == "chat" else None
    (problem,) = problems(0, "test", 1)
    asked = [Question(id="s", prompt=(Turn(text=text_of(problem, api), role=role),))]
    sampling = Sampling(max_tokens=100, stop=(" The answer",), scores=0)
    with Server(spec_of(url, tmp_path, api=api), display=False) as server:
        ((reply,),) = server.answers(asked, sampling)
    assert reply.finish == "stop"
    assert "The answer" not in reply.text
    spelt = "".join(score.text for score in reply.scores)
    assert spelt.startswith(reply.text)
    assert "The answer" in spelt
    scores = [[score.text, score.logp] for score in reply.scores]
    row = Row(id="s", prompt=asked[0].prompt, completion=reply.text, notes={SCORES: scores})
    tokens = written_tokens(row)
    assert not isinstance(tokens, str), tokens
    assert tokens[-1].end == len(reply.text)


def test_it_reads_given_text_as_the_model_does_here(url, tmp_path, teacher):
    samples = [
        Sample(id=f"p{k}", turns=(Turn(text=one.prompt), Turn(text=one.completion, learn=True)))
        for k, one in enumerate(problems(0, "test", 6))
    ]
    needs = frozenset({"chosen", "sparse"})
    spec = spec_of(url, tmp_path, api="completions", top_logprobs=MOST_LOGPROBS)
    with ServerReader(spec, teacher.tokenizer, max_length=256) as reader:
        reader.check(needs)
        view = reader.collate([reader.encode(sample) for sample in samples])
        said = reader.read(view, needs)
    with torch.no_grad():
        here = teacher.read(view, frozenset({"logits", "chosen"}))
    torch.testing.assert_close(said.chosen, here.chosen, atol=1e-3, rtol=0)
    assert sparse_kl(here.logits, said.sparse).abs().max() < 1e-3


def test_too_many_likely_tokens_are_refused_with_its_reason(url, tmp_path, teacher):
    spec = spec_of(url, tmp_path, api="completions", top_logprobs=MOST_LOGPROBS + 5)
    with (
        ServerReader(spec, teacher.tokenizer, max_length=256) as reader,
        pytest.raises(ServerError, match="max_logprobs|max-logprobs|greater than"),
    ):
        reader.check(frozenset({"sparse"}))
