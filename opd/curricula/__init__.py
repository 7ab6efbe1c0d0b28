"""What to practise next."""

from opd.curricula.base import Asker, Course, Curriculum, Draw, Foreseen, MustAskError, NobodyToAsk

__all__ = ["Asker", "Course", "Curriculum", "Draw", "Foreseen", "MustAskError", "NobodyToAsk"]
