"""Who supervises."""

from opd.teachers.base import Answering, LiveTeacher, Teacher, answers_of

__all__ = ["Answering", "LiveTeacher", "Teacher", "answers_of"]
