"""Sparse kernels for pruned Linear and Conv2d layers, and `sparsify`, which uses them wherever they were measured faster."""
