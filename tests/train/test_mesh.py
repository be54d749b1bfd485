"""Which device a process takes, and what it asks of its memory allocator."""

import platform

import pytest
import torch

from limbeck.core.errors import RecipeError
from limbeck.train import mesh


class Library:
    """Notes what it is told."""

    def __init__(self):
        self.told = []

    def mallopt(self, name, value):
        self.told.append((name, value))


@pytest.fixture
def library(monkeypatch):
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    library = Library()
    monkeypatch.setattr(mesh.ctypes, "CDLL", lambda name: library)
    return library


def test_freed_memory_is_kept(library):
    mesh.keep_freed_memory()
    assert library.told == [(-1, mesh.KEPT_BYTES), (-3, mesh.LARGEST_KEPT_BYTES)]


def test_what_the_environment_says_holds(library, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    mesh.keep_freed_memory()
    assert library.told == []


def test_another_library_is_left_alone(library, monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    mesh.keep_freed_memory()
    assert library.told == []


@pytest.fixture
def two_gpus(monkeypatch):
    """As far as a mesh asks; the first tensor there is refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    return taken


@pytest.mark.parametrize(("place", "device"), [(None, "auto"), (None, "cuda"), ("1", "auto")])
def test_a_process_takes_a_gpu_by_its_number(two_gpus, monkeypatch, place, device):
    """`cuda` alone names none, and torch refuses to make that one its own."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if place:
        monkeypatch.setenv("LOCAL_RANK", place)
    expected = torch.device(f"cuda:{place or 0}")
    assert mesh.Mesh(device=device).device == expected
    assert two_gpus == [expected]


def test_a_process_without_a_gpu_of_its_own_says_how_many_there_are(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        RecipeError, match=r"number 2, there are 2; .*start at most 2 processes"
    ) as refused:
        mesh.Mesh()
    assert refused.value.field == "train.device"
