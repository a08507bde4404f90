"""The report page: one file that a person can send to others."""

from lightning_cl.evaluation.page.page import format_page, write_page

__all__ = ["format_page", "write_page"]
