"""Whatever the config loader and the data readers are given, they take it or refuse it in one line."""

import contextlib
import gzip
import json
import string
import types
from typing import Annotated, Literal, Union, get_args, get_origin

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsdistill.config import Config, UserError, dump, load
from dsdistill.config.load import build
from dsdistill.config.schema import Data as Section
from dsdistill.config.section import Section as AnySection
from dsdistill.data import files, read

# The same examples in every run: a failure here is a bug, never chance.
FUZZ = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["uniform", "files", "docstrings", "auto", "bert", "x.tsv", "${run.name}", "${nowhere}", "???"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


RIGHT = {
    int: st.integers(1, 4),
    float: st.floats(0.1, 0.9),
    bool: st.booleans(),
    str: st.sampled_from(["x", "minilm"]),
    types.NoneType: st.none(),
}


def right(annotation: object) -> st.SearchStrategy:
    """Mostly values of a field's type."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation in RIGHT:
        return RIGHT[annotation]
    if isinstance(annotation, type) and issubclass(annotation, AnySection):
        return like(annotation)
    if origin is Literal:
        return st.sampled_from(parts)
    if origin is Annotated:
        return right(parts[0])
    if origin in (Union, types.UnionType):
        return st.one_of(*map(right, parts))
    return st.lists(right(parts[0]), max_size=2) if origin is tuple else VALUES


def like(section: type[AnySection]) -> st.SearchStrategy[dict]:
    """Mappings with a few of the section's keys, one value in sixteen of any kind."""
    fields = {name: right(field.annotation) for name, field in section.model_fields.items()}
    anyhow = {name: st.one_of(*[fields[name]] * 15, VALUES) for name in fields}
    some = st.sets(st.sampled_from(sorted(fields)), max_size=3)
    return some.flatmap(lambda names: st.fixed_dictionaries({name: anyhow[name] for name in sorted(names)}))


# What a config needs, so that the rest decides.
CONFIGS = like(Config).map(lambda found: {"student": {"path": "x"}} | found)


def one_line(error: UserError) -> None:
    message = str(error)
    assert "\n" not in message and ": got " in message and ", expected " in message, message


@FUZZ
@given(CONFIGS)
def test_settings(given_settings):
    try:
        config = build(given_settings, "fuzz.yaml")
    except UserError as error:
        one_line(error)
        assert str(error).startswith("fuzz.yaml")
        return
    assert build(yaml.safe_load(dump(config))) == config


@FUZZ
@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(str.encode)
    | CONFIGS.map(lambda found: yaml.dump(found).encode())
)
def test_config_files(tmp_path, content):
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(content)
    try:
        load([str(path)])
    except UserError as error:
        one_line(error)


KEYS = st.sampled_from(
    ["train.steps", "terms.hidden.layers", "run", "student.config", "data.text", "a.b", "train."]
)


@FUZZ
@given(st.lists(st.tuples(KEYS | st.text(max_size=6), st.text(max_size=12)), min_size=1, max_size=3))
def test_overrides(tmp_path, pairs):
    path = tmp_path / "fuzz.yaml"
    path.write_text("student: {path: x}")
    try:
        load([str(path), *(f"{key}={value}" for key, value in pairs)])
    except UserError as error:
        one_line(error)


CELLS = st.text(st.sampled_from(string.ascii_letters + '"\t,\r\n \0é\u2028'), max_size=10)
ROWS = st.lists(st.lists(CELLS, max_size=4).map("\t".join), max_size=5).map("\n".join)
OBJECTS = st.lists(
    st.dictionaries(st.sampled_from(["text", "label", "id"]), VALUES, max_size=3).map(json.dumps), max_size=4
).map("\n".join)
CONTENTS = st.one_of(
    st.binary(max_size=80),
    ROWS.map(str.encode),
    ROWS.map(lambda rows: f"text\tlabel\n{rows}".encode()),
    ROWS.map(lambda rows: f"text,label\n{rows}".encode("utf-16")),
    ROWS.map(lambda rows: ("text,label\n" + rows.replace("\t", ",")).encode()),
    OBJECTS.map(str.encode),
    ROWS.map(lambda rows: gzip.compress(rows.encode())),
)


@FUZZ
@given(
    st.sampled_from([name + packed for name in files.READERS for packed in ("", ".gz")]),
    CONTENTS,
    st.sampled_from(["classification", "regression", "causal_lm", "masked_lm"]),
)
def test_data_files(tmp_path, suffix, content, task):
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(content)
    section = Section(source="files", train=str(path), dev=str(path), cache=str(tmp_path))
    try:
        found = read(section, task)
    except UserError as error:
        one_line(error)
        assert str(path) in str(error)
        return
    for rows in (found.train, found.dev):
        assert rows.texts and all(isinstance(text, str) for texts in rows.texts for text in texts)


def test_configs_are_accepted_too():
    """Else the tests above would only ever see refusals."""
    accepted = set()

    @FUZZ
    @given(CONFIGS)
    def reach(found):
        with contextlib.suppress(UserError):
            accepted.add(dump(build(found)))

    reach()
    assert len(accepted) > 10
