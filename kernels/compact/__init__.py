"""Bitmap storage: fewer bytes at rest, decoded to dense for every product; see README.md."""
