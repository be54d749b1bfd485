"""The student's own words as a source: who wrote what, again after a stop, and watched."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from limbeck.core.errors import DataError, RecipeError
from limbeck.core.schedule import Ramp
from limbeck.core.types import Sample, Turn, Written
from limbeck.models.load import load_student
from limbeck.recipe.run import run
from limbeck.sources.dataset import Dataset
from limbeck.sources.replay import Buffer, Replay, from_json, to_json
from limbeck.sources.rollouts import GIVEN, WROTE, Adaptive, Rollouts

CPU = torch.device("cpu")


@pytest.fixture
def student(make_recipe):
    return load_student(make_recipe().student, make_recipe().teachers, CPU, 0)


def opened(student, tiny_data, **fields):
    spec = Rollouts(of=Dataset(path=str(tiny_data), holdout=4), max_tokens=6, batch=8, **fields)
    stream = spec.open(3)
    stream.bind(student, {})
    return stream


def take(stream, count):
    return [next(stream) for _ in range(count)]


def test_the_student_writes_its_share(student, tiny_data):
    assert {s.channel for s in take(opened(student, tiny_data, share=0.0), 40)} == {GIVEN}
    assert {s.channel for s in take(opened(student, tiny_data), 40)} == {WROTE}
    half = [s.channel for s in take(opened(student, tiny_data, share=0.5), 160)]
    assert 55 <= half.count(WROTE) <= 105


def test_what_it_wrote_is_its_own(student, tiny_data):
    """Its tokens have the probabilities that it gives them when it reads them."""
    for sample in take(opened(student, tiny_data), 8):
        assert sample.written is not None
        view = student.collate([student.encode(sample)])
        chosen = student.read(view, frozenset({"chosen"})).chosen
        assert chosen.tolist() == pytest.approx(list(sample.written.logp), abs=1e-4)
        assert view.labels.tolist() == list(sample.written.ids)
        assert sample.turns[-1].learn
        assert sample.prompt == sample.turns[:-1]


class Said:
    """A speaker that has nothing to say to a prompt, or one word."""

    def __init__(self, hears=lambda place: True):
        self.hears, self.asked = hears, 0

    def write(self, student, teachers, prompts, seeds, sampling):
        places = range(self.asked, self.asked + len(prompts))
        self.asked += len(prompts)
        word = SimpleNamespace(text="w", ids=[1, 2], logp=None, ended=True)
        return [word if self.hears(place) else None for place in places]


def spoken(path, speaker, **fields):
    stream = Rollouts(of=Dataset(path=str(path), holdout=0), speaker=speaker, **fields).open(0)
    stream.bind(SimpleNamespace(vocabulary="v"), {})
    return stream


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_answers_that_all_come_to_nothing_end_the_run(tiny_data, share):
    """Each of them may be paid for: it must not go on asking, with or without given rows."""
    speaker = Said(lambda place: False)
    stream = spoken(tiny_data, speaker, answers=2, share=share)
    with pytest.raises(DataError, match=r"answers in a row .*\(128\).* raise source\.max_tokens"):
        take(stream, 5000)
    assert 1000 <= speaker.asked < 1000 + 64


def test_an_answer_now_and_then_is_enough(tiny_data):
    stream = spoken(tiny_data, Said(lambda place: place % 900 == 0), replay=Replay(size=2))
    assert len(take(stream, 6)) == 6
    assert all(group for _, group in stream.buffer.kept)  # of nothing, nothing is kept


def test_a_step_is_told_of_answers_that_came_to_nothing(tiny_data):
    """A scorer is not asked about them."""
    stream = spoken(tiny_data, Said(lambda place: place >= 16), batch=8, answers=2)
    stream.scorer = SimpleNamespace(name="s", figures={}, judge=lambda given, groups: 1 / 0)
    stream._fill()
    metrics = {}
    stream.on_step(SimpleNamespace(number=1, last=9, metrics=metrics))
    assert (metrics["rollouts/asked"], metrics["rollouts/ended"]) == (16, 0)
    assert "rollouts/length_tokens" not in metrics


def test_what_is_written_has_not_the_score_of_the_given_answer(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "q ", "completion": "a", "score": 0.9}
    path.write_text((json.dumps(row) + "\n") * 20)
    samples = take(spoken(path, Said(), share=0.5), 64)
    assert {(s.channel, s.score) for s in samples} == {(WROTE, None), (GIVEN, 0.9)}


def test_given_rows_of_a_group_stay_together(tmp_path):
    """All of them are used as they are, or none; but what has no answer can only be written for."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": f"{p} ", "completion": None if k == p == 1 else f"{k}", "group": f"{p}"}
        for p in range(20)
        for k in range(1 if p == 2 else 3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = spoken(path, Said(), share=0.5, batch=4)
    whole = []
    for _ in range(200):
        bundle = [next(stream)]
        while bundle[-1].siblings:
            bundle.append(next(stream))
        assert [sample.siblings for sample in bundle] == [*range(len(bundle))][::-1]
        assert len({(sample.channel, sample.prompt) for sample in bundle}) == 1
        if bundle[0].channel == GIVEN:
            whole.append((bundle[0].group, len(bundle)))
    sizes = {f"{p}": {1: 2, 2: 1}.get(p, 3) for p in range(20)}
    assert whole
    assert all(sizes[group] == size for group, size in whole)


def test_answers_to_a_prompt_are_a_group(student, tiny_data):
    samples = take(opened(student, tiny_data, answers=3), 9)
    for place in range(0, 9, 3):
        family = samples[place : place + 3]
        assert len({sample.group for sample in family}) == 1
        assert [sample.siblings for sample in family] == [2, 1, 0]
        assert len({sample.id for sample in family}) == 3
        assert len({sample.prompt for sample in family}) == 1
    assert len({sample.group for sample in samples}) == 3


def test_a_prompt_without_an_answer_is_always_written_for(student, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"the cat {k} "}) + "\n" for k in range(20)))
    stream = Rollouts(of=Dataset(path=str(path), holdout=0), share=0.0, max_tokens=3).open(0)
    stream.bind(student, {})
    assert {sample.channel for sample in take(stream, 10)} == {WROTE}


def test_a_text_is_no_prompt(student, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"the cat {k} "}) + "\n" for k in range(20)))
    stream = Rollouts(of=Dataset(path=str(path), holdout=0)).open(0)
    stream.bind(student, {})
    with pytest.raises(DataError, match="without a prompt"):
        next(stream)


@pytest.mark.parametrize("taken", [0, 3, 8, 19])
@pytest.mark.parametrize("replay", [None, Replay(size=12, share=0.5)])
def test_a_stream_goes_on_where_it_stood(student, tiny_data, taken, replay):
    stream = opened(student, tiny_data, share=0.6, answers=2, replay=replay)
    take(stream, taken)
    stream.on_step(SimpleNamespace(number=2, last=9, metrics={}))
    state = json.loads(json.dumps(stream.state_dict()))
    expected = take(stream, 30)
    again = opened(student, tiny_data, share=0.6, answers=2, replay=replay)
    again.load_state_dict(state)
    assert take(again, 30) == expected


def test_the_share_may_follow_a_ramp(student, tiny_data):
    stream = opened(student, tiny_data, share=Ramp(from_=0.0, to=1.0))
    assert {sample.channel for sample in take(stream, 8)} == {GIVEN}
    stream.on_step(SimpleNamespace(number=10, last=10, metrics={}))
    assert {sample.channel for sample in take(stream, 8)} == {WROTE}


def test_the_share_may_grow_when_the_student_gets_no_better(student, tiny_data):
    stream = opened(student, tiny_data, share=0.1, adaptive=Adaptive(threshold=0.05, increase=0.2))
    shares = []
    for number, measured in enumerate([1.0, 0.8, None, 0.84, 0.9, 1.5, 0.2]):
        metrics = {} if measured is None else {"eval/kl_nats": measured}
        stream.on_step(SimpleNamespace(number=number, last=9, metrics=metrics))
        shares.append(round(stream.share, 3))
    assert shares == [0.1, 0.1, 0.1, 0.1, 0.3, 0.5, 0.5]
    again = opened(student, tiny_data, share=0.1, adaptive=Adaptive())
    again.load_state_dict(stream.state_dict())
    assert again.share == stream.share


def test_a_share_cannot_follow_what_is_not_measured(make_recipe, tiny_data, tmp_path):
    source = {"kind": "rollouts", "of": {"path": str(tiny_data), "holdout": 0}, "adaptive": {}}
    with pytest.raises(RecipeError) as error:
        run(make_recipe(source=source), tmp_path / "out")
    assert error.value.field == "source.adaptive"


def test_a_step_is_told_what_was_written(student, tiny_data):
    stream = opened(student, tiny_data, share=1.0, replay=Replay(size=100, share=0.5))
    samples = take(stream, 8)
    metrics = {}
    stream.on_step(SimpleNamespace(number=1, last=9, metrics=metrics))
    wrote = sum(len(sample.written.ids) for sample in samples)
    assert metrics["rollouts/tokens"] <= wrote
    assert metrics["rollouts/share"] == 1.0
    assert 0 < metrics["rollouts/length_tokens"] <= 6
    assert metrics["rollouts/age_steps"] == 0
    for number in range(2, 6):
        take(stream, 8)
        stream.on_step(SimpleNamespace(number=number, last=9, metrics=metrics))
    assert metrics["rollouts/age_steps"] > 0  # some came from the buffer


def test_a_buffer_forgets_the_old_and_the_many():
    def group(k):
        return [Sample(id=str(k), turns=(Turn(text="a"),))] * 2

    buffer = Buffer(Replay(size=6, age_steps=10))
    for step in range(5):
        buffer.add(step, group(step))
    assert [step for step, _ in buffer.kept] == [2, 3, 4]
    generator = torch.Generator().manual_seed(0)
    assert {buffer.draw(13, generator)[0] for _ in range(40)} == {3, 4}
    assert buffer.draw(15, generator) is None


def test_a_sample_survives_as_json():
    sample = Sample(
        id="x",
        turns=(Turn(text="é", role="user"), Turn(text="b", role="assistant", learn=True)),
        privileged=(Turn(text="p"),),
        weight=0.5,
        channel="c",
        parts=((1, "answer"),),
        group="g",
        siblings=2,
        score=-1.5,
        answer="7",
        written=Written(vocabulary="v", ids=(1, 2), logp=(-0.1, -0.2)),
    )
    assert from_json(json.loads(json.dumps(to_json(sample)))) == sample
    bare = Sample(id="y", turns=(Turn(text="a"),))
    assert from_json(json.loads(json.dumps(to_json(bare)))) == bare


@pytest.mark.parametrize(
    "fields",
    [
        {"share": {"from": 0.0, "to": 1.0}},
        {"share": 0.0, "adaptive": {"threshold": 0.0, "increase": 0.25}},
        {"share": 0.8, "replay": {"size": 40, "share": 0.6, "age_steps": 1}},
        {"share": 1.0, "batch": 30, "scorer": {"kind": "critic"}},
    ],
    ids=["ramp", "adaptive", "replay", "critic"],
)
def test_what_a_step_tells_the_source_is_in_its_checkpoint(
    fields, make_recipe, tiny_data, tiny_teacher, tmp_path
):
    of = {"path": str(tiny_data), "holdout": 4}
    recipe = make_recipe(
        {"steps": 5, "save_every": 1, "keep": 5, "learning_rate": 0.3, "warmup": 0},
        source={"kind": "rollouts", "of": of, "max_tokens": 8, "batch": 6, **fields},
        student={"name": str(tiny_teacher)},
        terms=[{"objective": "cross_entropy"}],
    )
    run(recipe, tmp_path / "whole")
    for step in (1, 3):
        again = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole", again)
        for later in range(step + 1, 6):
            shutil.rmtree(again / "checkpoints" / f"step-{later}")
        run(recipe, again, resume=True)
        assert _figures(again) == _figures(tmp_path / "whole")
        a, b = (load_file(x / "student" / "model.safetensors") for x in (tmp_path / "whole", again))
        assert all(torch.equal(a[name], b[name]) for name in a)


def _figures(out):
    """Of each step, without its times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def test_a_run_that_is_killed_while_it_writes_ends_with_the_same_weights(rollout_recipe, tmp_path):
    from limbeck.recipe.resolve import dump

    recipe = rollout_recipe(steps=12, save_every=3)
    run(recipe, tmp_path / "a")
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    command = [sys.executable, "-m", "limbeck", "run", str(tmp_path / "recipe.yaml")]
    command += ["--out", str(tmp_path / "b")]
    for delay in (0.02, 0.3):
        child = subprocess.Popen(
            [*command, "--resume"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        metrics = tmp_path / "b" / "metrics.jsonl"
        began = time.time()
        before = metrics.read_text() if metrics.exists() else ""
        while time.time() - began < 60 and child.poll() is None:
            if metrics.exists() and metrics.read_text() != before:
                break
            time.sleep(0.01)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
    run(recipe, tmp_path / "b", resume=True)
    a, b = (load_file(tmp_path / x / "student" / "model.safetensors") for x in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
