"""The evidence of a run, for people: table, sentences, files and picture."""

from lightning_cl.evaluation.report import build_report, format_report, write_report

__all__ = ["build_report", "format_report", "write_report"]
