"""What to practise next."""

from opd.curricula.base import Curriculum, Draw, Schedule

__all__ = ["Curriculum", "Draw", "Schedule"]
