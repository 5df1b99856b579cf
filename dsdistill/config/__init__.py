"""Configuration: YAML and key=value in, one typed frozen object out."""

from dsdistill.config.errors import UserError
from dsdistill.config.load import dump, load
from dsdistill.config.schema import Config

__all__ = ["Config", "UserError", "dump", "load"]
