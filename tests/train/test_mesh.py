"""What a process asks of its memory allocator."""

import platform

import pytest

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
