"""Compressed sparse rows, the format of the CPU path; see README.md."""
