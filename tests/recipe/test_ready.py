"""Terms made ready before training: the folder in which objectives keep what they find out."""

from types import SimpleNamespace

import pytest

from limbeck.core.files import write_text
from limbeck.core.term import Term
from limbeck.recipe.ready import ready_terms


class Looks:
    """An objective that looks at the models, and keeps a note if it is told to."""

    kind, needs = "looks", frozenset()

    def __init__(self, note="", examples=0):
        self.note, self.examples = note, examples

    def finish(self, scene):
        self.found = (scene.folder / "note").exists()
        self.saw = len(scene.samples)
        if self.note:
            write_text(scene.folder / "note", self.note)
        return self


class Nothing:
    """A source whose samples nobody looks at."""

    def __next__(self):
        return None

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def ready(folder, rank, *objectives):
    terms = tuple(Term(objective=o, name=o.note or None) for o in objectives)
    recipe = SimpleNamespace(terms=terms, seed=0)
    mesh = SimpleNamespace(main=rank == 0, device="cpu", barrier=lambda: None)
    return ready_terms(recipe, None, {}, Nothing(), folder, mesh)


@pytest.mark.parametrize("rank", [0, 1])
def test_who_keeps_nothing_needs_no_folder(tmp_path, rank):
    """Processes that made and removed empty folders of the same run got in each other's way."""
    (tmp_path / "file").touch()
    ready(tmp_path / "file" / "terms", rank, Looks())


def test_the_first_process_keeps_notes_and_all_begin_with_them(tmp_path):
    looks = [[Looks("a"), Looks(), Looks("b")] for _ in range(3)]
    for rank, objectives in enumerate(looks):
        ready(tmp_path / "terms", rank, *objectives)
    kept = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert kept == ["terms/a/note", "terms/b/note"]
    assert [[looking.found for looking in o] for o in looks] == [[False] * 3] + 2 * [
        [True, False, True]
    ]


def test_an_objective_sees_as_many_samples_as_it_asks_for(tmp_path):
    few, many = Looks(examples=8), Looks(examples=100)
    ready(tmp_path, 0, few, many)
    assert (few.saw, many.saw) == (64, 100)
