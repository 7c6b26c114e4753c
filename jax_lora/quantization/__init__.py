"""Formats of quantized weights: NF4 and one byte per element."""
