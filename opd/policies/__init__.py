"""The student."""

from opd.policies.base import LIVE, Policy, Student

__all__ = ["LIVE", "Policy", "Student"]
