"""Convolution as an implicit matrix product over kept groups of input channels; see README.md."""
