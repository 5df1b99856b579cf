"""Verification and benchmarks: of every operator, of kernels compiled ahead of time, and of a whole step."""
