"""Read a configuration: YAML and key=value in, one typed frozen object out."""

from dsdistill.config.errors import RunError, SharedError, Stopped, UserError
from dsdistill.config.load import as_begun, dump, holds_secrets, load, load_saved, make_config
from dsdistill.config.schema import Config

__all__ = [
    "Config",
    "RunError",
    "SharedError",
    "Stopped",
    "UserError",
    "as_begun",
    "dump",
    "holds_secrets",
    "load",
    "load_saved",
    "make_config",
]
