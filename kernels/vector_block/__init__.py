"""Blocks of output rows that share a list of kept input columns; see README.md."""
