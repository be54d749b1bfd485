"""Several sources with their shares: in proportion, groups whole, and again after a stop."""

import json

import pytest

from limbeck.core.errors import RecipeError
from limbeck.sources.dataset import Dataset
from limbeck.sources.mixture import Mixture, MixtureStream


def data(tmp_path, name, count, size=1):
    path = tmp_path / f"{name}.jsonl"
    rows = [
        {
            "id": f"{name}{k}.{j}",
            "prompt": "a ",
            "completion": "b",
            "channel": name,
            **({"group": f"{name}{k}"} if size > 1 else {}),
        }
        for k in range(count)
        for j in range(size)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Dataset(path=str(path), holdout=2)


def test_each_gives_its_share(tmp_path):
    spec = Mixture(of=(data(tmp_path, "new", 30), data(tmp_path, "old", 30)), shares=(3, 1))
    stream = spec.open(0)
    channels = [next(stream).channel for _ in range(1000)]
    assert 700 <= channels.count("new") <= 800
    assert {sample.channel for sample in stream.holdout} == {"new", "old"}
    assert stream.ahead


def test_groups_stay_together(tmp_path):
    stream = Mixture(of=(data(tmp_path, "a", 12, 3), data(tmp_path, "b", 12, 2))).open(0)
    previous = None
    for _ in range(300):
        sample = next(stream)
        if previous is not None and previous.siblings:
            assert sample.group == previous.group
        previous = sample


@pytest.mark.parametrize("taken", [0, 1, 7, 100])
def test_it_goes_on_where_it_stood(tmp_path, taken):
    spec = Mixture(of=(data(tmp_path, "a", 12, 3), data(tmp_path, "b", 12)))
    stream = spec.open(5)
    for _ in range(taken):
        next(stream)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = [next(stream) for _ in range(50)]
    again = spec.open(5)
    again.load_state_dict(state)
    assert [next(again) for _ in range(50)] == expected


def test_wrong_shares_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="2 numbers for 1"):
        Mixture(of=(data(tmp_path, "a", 12),), shares=(1, 2))
    with pytest.raises(RecipeError, match="no source"):
        Mixture(of=())


class Looking:
    """A source that is told of each step."""

    def __init__(self):
        self.ahead, self.holdout, self.told = True, [], []

    def on_step(self, step):
        self.told.append(step)


def test_it_looks_on_where_a_part_does(tmp_path):
    plain = data(tmp_path, "a", 12).open(0)
    assert not hasattr(MixtureStream([plain, plain], (1, 1), 0), "on_step")
    looking = Looking()
    MixtureStream([plain, looking], (1, 1), 0).on_step("a step")
    assert looking.told == ["a step"]
