"""Index-run format for unstructured masks and few columns; see README.md."""
