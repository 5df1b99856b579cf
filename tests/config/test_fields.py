"""config/FIELDS.md must have everything that the schema says."""

import re
import subprocess
import sys

from dsdistill.config import fields
from dsdistill.config.schema import Config
from dsdistill.config.section import Section


def test_the_reference_is_current():
    """A separate process writes it, because terms that other tests register are in this process's schema."""
    code = "from dsdistill.config import fields; print(fields.reference(), end='')"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert fields.FILE.read_text(encoding="utf-8") == made, "run python -m dsdistill.config.fields"


def test_every_setting_of_every_section_has_a_line():
    text = fields.FILE.read_text(encoding="utf-8")
    tables = dict(re.findall(r"^## `([^`]+)`\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    found = {place: set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) for place, table in tables.items()}
    for place in ("run", "data", "student", "train", "evaluation"):
        section = Config.model_fields[place].annotation
        assert issubclass(section, Section) and found[place] == set(section.model_fields)
    assert {"query_key"} < set(re.findall(r"`(\w+)`", tables["terms.attention"]))
    assert found["terms.task"] >= {"weight", "temperature"} and "name" in found["data.train.N"]


def test_a_line_says_limits_default_and_meaning():
    text = fields.FILE.read_text(encoding="utf-8")
    assert "| `max_length` | whole number ≥ 2 | `128` | length of the longest sequence, in tokens |" in text
    assert re.search(r"^\| `name` \| text \| needed \| name in the log", text, re.MULTILINE)
