"""Verify and time every operator, kernels compiled ahead of time, and a whole step."""
