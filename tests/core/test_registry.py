"""Open slots: names are unique, unknown ones are answered with a near one."""

import pytest

from limbeck.core import registry


@pytest.fixture
def slot():
    yield "a-slot-of-the-tests"
    registry._kinds.pop("a-slot-of-the-tests", None)


def test_a_class_is_found_under_its_name(slot):
    @registry.register(slot, "b")
    class B:
        pass

    @registry.register(slot, "a")
    class A:
        pass

    assert registry.kinds(slot) == {"a": A, "b": B}
    assert list(registry.kinds(slot)) == ["a", "b"]
    assert (A.kind, B.kind) == ("a", "b")
    assert registry.register(slot, "a")(A) is A  # once more is no harm


def test_a_name_is_given_once(slot):
    registry.register(slot, "a")(type("A", (), {}))
    with pytest.raises(ValueError, match="kind 'a' is already A"):
        registry.register(slot, "a")(type("B", (), {}))


def test_plug_ins_are_found(slot, monkeypatch):
    loaded = []

    class Point:
        name = "theirs"

        def load(self):
            loaded.append(self)
            return Point

    monkeypatch.setattr(registry, "entry_points", lambda group: [Point()] if slot in group else [])
    assert registry.kinds(slot) == {"theirs": Point}
    registry.kinds(slot)
    assert len(loaded) == 1


def test_did_you_mean():
    assert registry.did_you_mean("stps", ["steps", "seed"]) == "did you mean 'steps'?"
    assert registry.did_you_mean("zzz", ["b", "a"]) == "one of: a, b"
    assert registry.did_you_mean("zzz", []) == "one of: "
