"""The report: what was cut from a model, why, and what it was measured to cost, as one HTML file."""

from hesper.report.page import write_report

__all__ = ["write_report"]
