"""Frozen teachers: what scores the student's tokens."""

from kdrl_pl.teacher.base_of_student import BaseTeacher
from kdrl_pl.teacher.cache import TeacherCache
from kdrl_pl.teacher.frozen import FrozenTeacher
from kdrl_pl.teacher.remote import RemoteTeacher
from kdrl_pl.teacher.routed import RoutedTeacher
from kdrl_pl.teacher.vllm import VLLMTeacher

__all__ = ["BaseTeacher", "FrozenTeacher", "RemoteTeacher", "RoutedTeacher", "TeacherCache", "VLLMTeacher"]
