"""A teacher's server to try things on: it costs nothing, and misbehaves as often as it is told."""

from limbeck.teachers.mock.faults import KINDS, Faults
from limbeck.teachers.mock.http import MockTeacher

__all__ = ["KINDS", "Faults", "MockTeacher"]
