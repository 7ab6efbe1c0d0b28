"""The student."""

from opd.policies.base import Policy, Student

__all__ = ["Policy", "Student"]
