"""A model's generation settings go with it, through RUN/init into the export."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from dsdistill.engine.export import export
from dsdistill.models.settings import GENERATION, carry_generation
from tests.conftest import merge
from tests.engine.launch import run_configs
from tests.engine.test_heads import causal, save, write  # noqa: F401  (a fixture)

SETTINGS = {
    "eos_token_id": [3, 1],
    "pad_token_id": 0,
    "bos_token_id": 2,
    "max_new_tokens": 7,
    "temperature": 0.5,
}


def test_an_export_has_its_teachers_or_its_own(causal, tokenizer_dir, tmp_path):  # noqa: F811
    """A temperature without sampling is no reason to lose the other settings: the library only warns of it."""
    folder = save(tmp_path / "teacher", tokenizer_dir, tied=True)
    plain = shutil.copytree(folder, tmp_path / "plain")
    (plain / GENERATION).unlink()
    (folder / GENERATION).write_text(json.dumps(SETTINGS | {"forced_bos_token_id": 64}))
    cases = {
        "cut": {"student": {"from_teacher": [1, 4]}},
        "own": {"student": {"path": str(folder)}, "teacher.path": str(plain)},
        "none": {"student": {"path": str(plain)}},
    }
    run_configs([write(tmp_path, merge(causal, change), name) for name, change in cases.items()], ranks=1)
    for name in cases:
        export(str(tmp_path / name), str(tmp_path / f"{name}-exported"))
    for name in ("cut", "own"):
        found = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-exported").generation_config
        assert {key: getattr(found, key) for key in SETTINGS} == SETTINGS
        assert found.forced_bos_token_id is None  # there is no such token
    untouched = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(plain))
    untouched.save_pretrained(tmp_path / "expected")  # no other settings are added
    expected, got = (
        json.loads((tmp_path / name / GENERATION).read_text()) for name in ("expected", "none-exported")
    )
    assert got == expected


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"eos_token_id": 3, "suppress_tokens": [1, 70]}, {"eos_token_id": 3}),
        ({"eos_token_id": [3, 64], "max_new_tokens": 100}, {"max_new_tokens": 100}),
        ({"bad_words_ids": [[1], [2, 64]], "num_beams": 2}, {"num_beams": 2}),
        ({"pad_token_id": -1, "top_k": 9}, {"top_k": 9}),
        ({"sequence_bias": [[[1, 2], -0.5]]}, {"sequence_bias": [[[1, 2], -0.5]]}),
        ({"to_dict": 5, "save_pretrained": "x", "__class__": 1, "top_k": 9}, {"top_k": 9}),
        ({"max_new_tokens": -5}, None),
    ],
)
def test_what_others_wrote(tmp_path, settings, kept):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    (source / GENERATION).write_text(json.dumps(settings))
    carry_generation(str(source), str(target), 64)
    if kept is None:
        assert not list(target.iterdir())
        return
    made = json.loads((target / GENERATION).read_text())
    assert {key: value for key, value in made.items() if key != "transformers_version"} == kept
    GenerationConfig.from_pretrained(target)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000])
def test_what_is_no_mapping(tmp_path, text):
    source = Path(tmp_path, "source")
    source.mkdir()
    (source / GENERATION).write_text(text)
    carry_generation(str(source), str(tmp_path), 64)
    assert not (tmp_path / GENERATION).exists()
