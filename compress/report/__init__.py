"""Results of a run as files: `write_results` (results.json, results.csv) and `write_report` (report.html, figures/*.png)."""

from .page import write_report
from .results import entry_name, read_results, write_results

__all__ = ["entry_name", "read_results", "write_report", "write_results"]
