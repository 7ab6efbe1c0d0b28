"""Who supervises."""

from opd.teachers.base import LiveTeacher, Teacher

__all__ = ["LiveTeacher", "Teacher"]
