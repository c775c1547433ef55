"""Any mask as a 2:4 matrix for the sparse tensor cores plus a small remainder; see README.md."""
