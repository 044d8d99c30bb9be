"""Frozen teachers: what scores the student's tokens."""

from kdrl_pl.teacher.base_of_student import BaseTeacher
from kdrl_pl.teacher.frozen import FrozenTeacher

__all__ = ["BaseTeacher", "FrozenTeacher"]
