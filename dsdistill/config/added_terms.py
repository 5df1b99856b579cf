"""Add terms from outside the package: their settings become fields of a config like those of any other term."""

import keyword
from typing import Any

from pydantic.fields import FieldInfo

from dsdistill.config import schema
from dsdistill.config.errors import UserError
from dsdistill.config.terms import Term, Terms, settings_of


def add_term(name: str, settings: type[Term]) -> None:
    """Let configs have a term `terms.NAME` with these settings; like any term, it is off unless a config names it.

    The same class may be added again, also if its module was imported again and has defined it anew. Configs that were
    loaded before do not know the term. Raises UserError for a name that is taken or cannot be a key, and for settings
    that are not a subclass of Term.
    """
    if not (isinstance(settings, type) and issubclass(settings, Term)):
        raise UserError(
            f"register_term: settings of {name}", settings, f"a subclass of {Term.__module__}.Term"
        )
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name[0] == "_":
        raise UserError("register_term: name", repr(name), "an identifier that does not begin with _")
    if name in Terms.model_fields:
        taken = settings_of(name)
        if taken is settings:
            return
        if (taken.__module__, taken.__qualname__) != (settings.__module__, settings.__qualname__):
            got = f"{name}, which is {taken.__module__}.{taken.__qualname__}"
            raise UserError("register_term: name", got, "a name that no other term has")
    elif hasattr(Terms, name):
        raise UserError("register_term: name", f"{name}, which the class Terms uses already", "another name")
    annotation: Any = settings | None  # a type that no type checker can know
    Terms.model_fields[name] = FieldInfo(annotation=annotation, default=None)
    Terms.__annotations__[name] = annotation
    Terms.model_rebuild(force=True)
    schema.take_over_terms()
