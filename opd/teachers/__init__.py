"""Who supervises."""

from opd.teachers.base import Answering, LiveTeacher, Teacher, answers_of, failures_of, reasons, unanswered

__all__ = ["Answering", "LiveTeacher", "Teacher", "answers_of", "failures_of", "reasons", "unanswered"]
