"""A run as one page: curves, recipe, and rollouts token by token; written to a file, or served while it trains."""

from opd.report.charts import Bars, Curves, Line, register_chart
from opd.report.layers import Layer, register
from opd.report.live import watch
from opd.report.page import write_report

__all__ = ["Bars", "Curves", "Layer", "Line", "register", "register_chart", "watch", "write_report"]
