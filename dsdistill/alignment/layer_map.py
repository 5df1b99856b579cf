"""Choose which student layer learns from which teacher layer."""

from dsdistill.config import UserError


def layer_map(
    layers: str | tuple[tuple[int, int], ...], student_depth: int, teacher_depth: int, place: str = "layers"
) -> tuple[tuple[int, int], ...]:
    """Return the (student, teacher) pairs of layers that a layer map describes; layers are counted from 1.

    uniform: student layer l learns from teacher layer round(l·L_T/L_S), so the last learns from the last.
    skip: PKD's map (Sun et al. 2019): student layers 1 to L_S−1 learn from every ⌊L_T/L_S⌋-th teacher layer. The last
        student layer learns from none, because the soft labels guide it.
    last: the last student layer learns from the last teacher layer (MiniLM).
    cka_offline: as uniform, until engine/passes/layer_similarity.py has compared the models and replaces it by pairs.
    emd: every pair, with the teacher's layer changing fastest (weighting.EarthMover weighs them).
    explicit pairs: these pairs, after a check.

    Raises UserError for a layer out of range, a student deeper than its teacher, or a map without a pair.
    """
    if student_depth > teacher_depth and isinstance(layers, str):
        raise UserError(
            place,
            f"a student of {student_depth} layers and a teacher of {teacher_depth}",
            "a student with at most as many layers, or explicit [student, teacher] pairs",
        )
    if layers in ("uniform", "cka_offline"):
        # Half rounds up: Python's round would move halves to the even neighbour and so skip layers unevenly.
        return tuple((s, int(s * teacher_depth / student_depth + 0.5)) for s in range(1, student_depth + 1))
    if layers == "skip":
        if student_depth < 2:
            raise UserError(place, "skip for a student of 1 layer", "a student of 2 layers or more")
        stride = teacher_depth // student_depth
        return tuple((s, s * stride) for s in range(1, student_depth))
    if layers == "emd":
        return tuple((s, t) for s in range(1, student_depth + 1) for t in range(1, teacher_depth + 1))
    if layers == "last":
        return ((student_depth, teacher_depth),)
    assert not isinstance(layers, str)  # every name has its branch above
    for student, teacher in layers:
        if not 1 <= student <= student_depth:
            raise UserError(place, f"student layer {student}", f"1 to {student_depth}")
        if not 1 <= teacher <= teacher_depth:
            raise UserError(place, f"teacher layer {teacher}", f"1 to {teacher_depth}")
    if len(set(layers)) < len(layers):
        raise UserError(place, "a pair twice", "each [student, teacher] pair once")
    return layers
