"""Backbones and heads: plain arguments in, tensors out."""
