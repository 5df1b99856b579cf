"""F1 is computed for one of two classes."""

import pytest

from dsdistill.config import UserError
from dsdistill.evaluation.positive import positive_class


@pytest.mark.parametrize(
    ("names", "wanted", "expected"),
    [
        (("0", "1"), None, 1),
        (("negative", "positive"), None, 1),
        (("equivalent", "not_equivalent"), None, 0),
        (("not_equivalent", "equivalent"), None, 1),
        (("entailment", "Not Entailment"), None, 0),
        (("toxic", "non-toxic"), None, 0),
        (("sarcasm", "no_sarcasm"), None, 0),
        (("equivalent", "not_equivalent"), "not_equivalent", 1),
        (("negative", "positive"), "negative", 0),
        (("ice", "notice"), None, 1),  # "notice" is not "ice" after not_
        (("no", "yes"), None, 1),
        (("a", "b", "c"), None, None),
        ((), None, None),
    ],
)
def test_choice(names, wanted, expected):
    assert positive_class(names, wanted) == expected


def test_refusals():
    with pytest.raises(UserError, match=r"positive_class: got good, expected one of the classes bad, fine"):
        positive_class(("bad", "fine"), "good")
    with pytest.raises(UserError, match=r"positive_class: got a with 3 classes, expected two classes"):
        positive_class(("a", "b", "c"), "a")
