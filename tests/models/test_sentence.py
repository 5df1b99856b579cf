"""Settings of a sentence-transformers folder are read, written, and refused if they ask for more than pooling."""

import json

import pytest

from dsdistill.config import UserError
from dsdistill.models.build import locate
from dsdistill.models.sentence import Sentence, named_prompts, read_sentence, write_sentence


def change(folder, name, **values):
    path = folder / name
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | values))


@pytest.fixture
def folder(tmp_path):
    write_sentence(str(tmp_path), Sentence("mean", {"query": "q: ", "passage": "p: "}), 48, 32)
    return tmp_path


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("prompts", [{}, {"query": "find ", "document": ""}, {"text": "a "}])
def test_what_is_written_is_read(tmp_path, pooling, prompts):
    default = "text" if "text" in prompts else None
    sentence = Sentence(pooling, prompts, default)
    write_sentence(str(tmp_path), sentence, 48, 32)
    assert read_sentence(str(tmp_path), "teacher.path") == sentence


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_the_library_reads_it(tmp_path, pooling):
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    write_sentence(str(tmp_path), Sentence(pooling), 48, 32)
    made = modules.Pooling.load(str(tmp_path / "1_Pooling"))
    assert made.pooling_mode == {"mean": "mean", "cls": "cls", "last": "lasttoken"}[pooling]
    assert made.embedding_dimension == 48
    made.save(str(tmp_path / "1_Pooling"))  # as this version writes it
    assert read_sentence(str(tmp_path), "teacher.path").pooling == pooling


def test_a_real_encoder():
    assert read_sentence(locate("minilm", "teacher.path"), "teacher.path") == Sentence("mean")


def test_a_plain_model_says_nothing(models_dir):
    assert read_sentence(str(models_dir / "teacher"), "teacher.path") is None


def test_prompts_of_one_text_and_of_two(folder):
    found = read_sentence(str(folder), "teacher.path")
    assert found.prompts_of(2) == ("q: ", "p: ") and found.prompts_of(1) == ("",)
    change(folder, "config_sentence_transformers.json", default_prompt_name="query")
    assert read_sentence(str(folder), "teacher.path").prompts_of(1) == ("q: ",)
    assert Sentence("mean", *named_prompts(("a ", "b "))).prompts_of(2) == ("a ", "b ")
    assert Sentence("mean", *named_prompts(("a ",))).prompts_of(1) == ("a ",)
    assert named_prompts(("", "")) == ({}, None)


DENSE = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]
MISTAKES = {
    "a dense layer": ("modules.json", DENSE, "whose modules are Transformer, Pooling, Dense"),
    "no list": ("modules.json", {"a": 1}, "damaged modules.json"),
    "a path elsewhere": (
        "modules.json",
        [DENSE[0], DENSE[1] | {"path": "../x"}],
        r"with pooling in '\.\./x'",
    ),
    "largest values": (
        "1_Pooling/config.json",
        {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True},
        r"pools by \['max'\]",
    ),
    "two ways at once": ("1_Pooling/config.json", {"pooling_mode": ["mean", "cls"]}, r"\['mean', 'cls'\]"),
    "a mean without prompts": ("1_Pooling/config.json", {"include_prompt": False}, "leaves out prompts"),
    "prompts of numbers": ("config_sentence_transformers.json", {"prompts": {"query": 1}}, "with prompts"),
    "no such default": (
        "config_sentence_transformers.json",
        {"default_prompt_name": "web"},
        "default prompt 'web'",
    ),
}


@pytest.mark.parametrize("case", MISTAKES, ids=lambda name: name.replace(" ", "-"))
def test_what_is_not_made_here_is_refused(folder, case):
    name, content, message = MISTAKES[case]
    if name == "modules.json":
        (folder / name).write_text(json.dumps(content))
    else:
        change(folder, name, **content)
    with pytest.raises(UserError, match=message) as found:
        read_sentence(str(folder), "teacher.path")
    assert str(found.value).startswith("teacher.path: got ")


def test_lower_case_is_told(folder):
    """The setting is read here; resolve.py compares it with the tokenizer's behaviour."""
    assert not read_sentence(str(folder), "teacher.path").lower
    change(folder, "sentence_bert_config.json", do_lower_case=True)
    assert read_sentence(str(folder), "teacher.path").lower
