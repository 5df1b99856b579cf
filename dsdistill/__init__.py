"""dsdistill: distil large transformer teachers into small students, level by level."""

__version__ = "0.1.0"
