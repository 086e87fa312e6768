"""The self-contained report of a run: one HTML file, no network, no scripts."""

from trainer.report.page import write_report

__all__ = ["write_report"]
