"""The config loader and the data readers accept or refuse any input in one line."""

import contextlib
import gzip
import json
import string
import tempfile
import types
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dsdistill.config import Config, UserError, dump, load, load_saved
from dsdistill.config.load import make_config
from dsdistill.config.schema import Data as Section
from dsdistill.config.section import Section as AnySection
from dsdistill.data import Splits, files
from tests.data.rig import load as tokenized

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
    st.integers(300, 420).map(lambda digits: 10**digits),  # numbers too large for a float, too
    st.sampled_from(["\ud800", "ab\udfff", "9" * 5000]),  # halves of a character; digits that int() refuses
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
    """Mostly generate values of a field's type."""
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
    """Generate mappings with a few of the section's keys; one value in sixteen is of any kind."""
    fields = {name: right(field.annotation) for name, field in section.model_fields.items()}
    anyhow = {name: st.one_of(*[fields[name]] * 15, VALUES) for name in fields}
    some = st.sets(st.sampled_from(sorted(fields)), max_size=3)
    return some.flatmap(lambda names: st.fixed_dictionaries({name: anyhow[name] for name in sorted(names)}))


# The required settings, so that the other settings decide.
CONFIGS = like(Config).map(lambda found: {"student": {"path": "x"}} | found)


def one_line(error: UserError) -> None:
    message = str(error)
    assert "\n" not in message and ": got " in message and ", expected " in message, message


@FUZZ
@given(CONFIGS)
def test_settings(given_settings):
    try:
        config = make_config(given_settings, "fuzz.yaml")
    except UserError as error:
        one_line(error)
        assert str(error).startswith("fuzz.yaml")
        return
    try:
        json.dumps(config.model_dump(mode="json"), ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a character, which no file can hold
        return
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(dump(config))
        file.flush()
        assert load([file.name]) == load_saved(file.name) == config


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


CELLS = st.text(st.sampled_from(string.ascii_letters + '"\t,\r\n \0é\u2028'), max_size=10) | st.sampled_from(
    ["9" * 5000, "-" + "9" * 400, "1e999"]
)
WELL_FORMED = st.lists(
    st.tuples(st.sampled_from(["the sum", "é mean"]), st.sampled_from([1, 2, 10**400, "\ud800", "9" * 5000])),
    min_size=2,
    max_size=4,
).map(lambda rows: "\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
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
    WELL_FORMED.map(str.encode),
)
TASKS = ["classification", "regression", "causal_lm", "masked_lm"]


@FUZZ
@given(
    st.sampled_from([name + packed for name in files.READERS for packed in ("", ".gz")]),
    CONTENTS,
    st.sampled_from(TASKS),
)
def test_data_files(tmp_path, tokenizer, suffix, content, task):
    found = examples(tmp_path / f"fuzz{suffix}", content, task, tokenizer)
    for part in (found.train, found.dev) if found is not None else ():
        assert len(part) and part.lengths.min() > 0


def examples(path: Path, content: bytes, task: str, tokenizer) -> Splits | None:
    """Return the examples of a run, or None if it refuses them in one line that names the file."""
    path.write_bytes(content)
    section = Section(source="files", train=str(path), dev=str(path), cache=str(path.parent), max_length=8)
    try:
        return tokenized(section, task, tokenizer)
    except UserError as error:
        one_line(error)
        assert str(path) in str(error)
        return None


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def test_data_files_are_accepted_too(tmp_path, tokenizer):
    """Some are accepted for each task."""
    accepted = dict.fromkeys(TASKS, 0)

    @FUZZ
    @given(WELL_FORMED.map(str.encode), st.sampled_from(TASKS))
    def reach(content, task):
        accepted[task] += examples(tmp_path / "fuzz.jsonl", content, task, tokenizer) is not None

    reach()
    assert min(accepted.values()) > 5, accepted


def test_configs_are_accepted_too():
    """Otherwise the tests above would only see refusals."""
    accepted = set()

    @FUZZ
    @given(CONFIGS)
    def reach(found):
        with contextlib.suppress(UserError):
            accepted.add(dump(make_config(found)))

    reach()
    assert len(accepted) > 5
