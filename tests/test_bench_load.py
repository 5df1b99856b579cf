"""The benchmark of loading has a complete table, and counts what must be kept from the files."""

import json

import pytest
from transformers import AutoModelForCausalLM

from dsdistill.bench import loading
from dsdistill.bench.loading_jobs import make
from dsdistill.config import UserError

TINY = {"layers": 6, "width": 64, "vocabulary": 1000, "shards": 3}


def test_every_way_of_loading_has_its_rows(tmp_path, capsys):
    table = tmp_path / "load.json"
    assert loading.run_load(options=TINY, json_path=table) in (
        0,
        1,
    )  # the model is smaller than what a rank adds itself
    found = json.loads(table.read_text())
    kinds = ["sharded", "sharded", "replicated", "replicated", "cut", "student", "student"]
    assert [row["kind"] for row in found["rows"]] == kinds
    whole = found["teacher_mib"]
    assert found["largest_mib"] == 1000 * 64 * 2 / 2**20
    half = whole / 2  # the student has all six layers
    assert [row["keeps_mib"] for row in found["rows"]] == [half, half, whole, whole, whole, half, half]
    printed = capsys.readouterr().out
    assert found["machine"]["safetensors"] in printed and printed.count("replicated") == 2


def test_the_teacher_is_spread_over_files(tmp_path):
    make(str(tmp_path), loading.settings(TINY), 3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert sum(parameter.nbytes for parameter in model.parameters()) == sum(loading._sizes(tmp_path))
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"options": {"layers": 5}}, "bench layers: got 5, expected a number from 6"),
        ({"options": {"width": 100}}, "bench width: got 100, expected a multiple of 64"),
        ({"options": {"tokens": 3}}, "bench option: got 'tokens', expected one of 'layers'"),
        ({"dtype": "bfloat16"}, "bench --dtype: got a value for load, expected none"),
    ],
)
def test_what_cannot_be_measured_is_refused(given, message):
    with pytest.raises(UserError) as raised:
        loading.run_load(**given)
    assert message in str(raised.value)
