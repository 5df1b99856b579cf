"""Import plugins: the user's own modules that a config names, before its other settings are checked."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from dsdistill.config.errors import UserError


def import_plugins(names: Any, origin: str) -> None:
    """Import the modules that `plugins` names, in their order; `origin` names the config in messages.

    The current directory is searched after all other places that Python imports from. Names that are not strings are
    left to the type check. Raises UserError for an invalid dotted name and for a module that cannot be imported.
    """
    for name in names if isinstance(names, list | tuple) else ():
        if not isinstance(name, str):
            continue
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(
                f"{origin}: plugins", repr(name), "a dotted name of a module, such as my_package.terms"
            )
        try:
            with _current_directory():
                importlib.import_module(name)
        except UserError as error:  # a term that the module adds was refused
            raise error.within(f"{origin}: plugins: {name}") from error
        except (Exception, SystemExit) as error:  # the module's own code may raise anything
            reason = f"{name} ({type(error).__name__}: {error})"
            raise UserError(f"{origin}: plugins", reason, "a module that can be imported") from error


@contextlib.contextmanager
def _current_directory() -> Iterator[None]:
    """Make Python search for modules in the current directory too, after all other places."""
    here = os.getcwd()
    if here in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the module may have removed it itself
            sys.path.remove(here)
