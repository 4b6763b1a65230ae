"""The report at the end of a run: numbers, table, plots and one HTML page, read from the artefacts."""

from minitron.report.data import ReportData, load_report
from minitron.report.table import print_table
from minitron.report.write import write_report

__all__ = ["ReportData", "load_report", "print_table", "write_report"]
