"""Who supervises."""

from opd.teachers.base import LiveTeacher, Teacher, answers_of

__all__ = ["LiveTeacher", "Teacher", "answers_of"]
