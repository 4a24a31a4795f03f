"""What people see of a run: one HTML file with its curves, its numbers and its episodes."""

from rehearsal.reports.page import write_report
from rehearsal.reports.sections import SECTIONS, Section, section

__all__ = ["SECTIONS", "Section", "section", "write_report"]
