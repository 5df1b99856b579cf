"""Choose the class whose F1 is scored."""

import re
from collections.abc import Sequence

from dsdistill.config import UserError

PLACE = "evaluation.positive_class"
_NEGATIONS = ("not_", "non_", "no_")


def positive_class(names: Sequence[str], wanted: str | None) -> int | None:
    """Return the index of the class whose F1 is scored; None unless there are two classes.

    This is the second class, unless its name is the first's name after not_, non_ or no_: of equivalent and
    not_equivalent it is the first. Capitals do not matter, and a space or a hyphen counts as an underscore.

    Args:
        names: the classes' names, in order.
        wanted: `evaluation.positive_class`.

    Raises:
        UserError: the wanted class does not exist, or there are not two classes.
    """
    if wanted is not None and (len(names) != 2 or wanted not in names):
        listed = ", ".join(names[:8]) + ", …" * (len(names) > 8)
        expected = f"one of the classes {listed}" if len(names) == 2 else "two classes, or none named"
        got = wanted if len(names) == 2 else f"{wanted} with {len(names)} classes"
        raise UserError(PLACE, got, expected)
    if len(names) != 2:
        return None
    if wanted is not None:
        return names.index(wanted)
    first, second = (re.sub(r"[\s-]+", "_", name.strip().lower()) for name in names)
    return 0 if second in {negation + first for negation in _NEGATIONS} else 1
