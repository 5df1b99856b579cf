"""Which student layer learns from which teacher layer."""

import pytest

from dsdistill.alignment.layer_map import layer_map
from dsdistill.config import UserError


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "expected"),
    [
        ("uniform", 2, 4, ((1, 2), (2, 4))),
        ("uniform", 4, 12, ((1, 3), (2, 6), (3, 9), (4, 12))),
        ("uniform", 3, 3, ((1, 1), (2, 2), (3, 3))),
        ("uniform", 4, 6, ((1, 2), (2, 3), (3, 5), (4, 6))),  # 1.5 and 4.5 round up alike
        ("uniform", 1, 24, ((1, 24),)),
        ("skip", 6, 12, ((1, 2), (2, 4), (3, 6), (4, 8), (5, 10))),  # PKD's table: BERT-base to 6 layers
        ("skip", 5, 12, ((1, 2), (2, 4), (3, 6), (4, 8))),
        ("last", 3, 12, ((3, 12),)),
        (((1, 4), (1, 2)), 1, 4, ((1, 4), (1, 2))),
        (((5, 1),), 6, 2, ((5, 1),)),  # explicit pairs may map a deeper student
    ],
)
def test_maps(layers, student, teacher, expected):
    assert layer_map(layers, student, teacher) == expected


def test_uniform_reaches_the_last_and_never_turns_back():
    for teacher in range(1, 30):
        for student in range(1, teacher + 1):
            pairs = layer_map("uniform", student, teacher)
            assert [s for s, _ in pairs] == list(range(1, student + 1)) and pairs[-1][1] == teacher
            chosen = [t for _, t in pairs]
            assert chosen == sorted(set(chosen)) and chosen[0] >= 1


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "message"),
    [
        ("uniform", 5, 4, "a student of 5 layers and a teacher of 4"),
        ("last", 5, 4, "a student of 5 layers and a teacher of 4"),
        ("skip", 1, 4, "skip for a student of 1 layer"),
        (((3, 1),), 2, 4, "student layer 3, expected 1 to 2"),
        (((0, 1),), 2, 4, "student layer 0, expected 1 to 2"),
        (((1, 5),), 2, 4, "teacher layer 5, expected 1 to 4"),
        (((1, 2), (1, 2)), 2, 4, "a pair twice"),
    ],
)
def test_refused(layers, student, teacher, message):
    with pytest.raises(UserError, match=message) as caught:
        layer_map(layers, student, teacher, "terms.hidden.layers")
    assert str(caught.value).startswith("terms.hidden.layers: got ")
