"""A student cut out of its teacher's files must equal one copied from the teacher's layers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from dsdistill.config import UserError
from dsdistill.models.build import architecture, auto_class, build_model, for_task
from dsdistill.models.cut import copy_layers, cut_architecture
from dsdistill.models.slices import cut_files
from dsdistill.models.weights import check_ties, stored_dtype
from tests.models import tiny
from tests.models.families import peaked

CASES = [(family, "masked_lm") for family in tiny.MASKED]
CASES += [(family, "causal_lm") for family in (*tiny.CAUSAL, *tiny.COMPOSITES)]
SETTINGS = tiny.MASKED | tiny.CAUSAL | tiny.COMPOSITES


def saved(folder: Path, family: str, task: str, dtype=torch.bfloat16, shard="40KB", **changes):
    """Save a random teacher in several files; return its architecture as a run reads it."""
    config = for_task(AutoConfig.for_model(family, **SETTINGS[family] | changes), task, ("a", "b", "c"), 0)
    torch.manual_seed(3)
    kind = AutoModelForImageTextToText if family == "mistral3" else auto_class(task)
    model = peaked(kind.from_config(config), 3.0).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return for_task(architecture(str(folder), None, "teacher"), task, ("a", "b", "c"), 0)


def both(folder: Path, teacher, layers, task: str, **overrides):
    """Return the student copied from the built teacher, and the student read from the cut files."""
    student = cut_architecture(teacher, layers, overrides, "student")
    whole = build_model(teacher, str(folder), task, "teacher", needs_head=True)
    copied = build_model(student, None, task, "student", needs_head=False)
    copy_layers(copied, whole, layers)
    target = folder / "cut"
    assert cut_files(str(folder), str(target), student, teacher, layers, task, {})
    read = build_model(student, str(target), task, "student", needs_head=True)
    assert architecture(str(target), None, "student").architectures == [type(read).__name__]
    return copied, read


def assert_equal(copied, read):
    mine, other = copied.state_dict(), read.state_dict()
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(("family", "task"), CASES)
def test_equals_the_copied_layers(family, task, tmp_path):
    teacher = saved(tmp_path, family, task)
    assert_equal(*both(tmp_path, teacher, tiny.CUT[family], task, **tiny.CONFIG.get(family, {})))


def test_values_and_types_are_those_of_the_files(tmp_path):
    teacher = saved(tmp_path, "qwen2", "causal_lm")
    both(tmp_path, teacher, (2, 4), "causal_lm")
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    sizes = 0
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "cut" / file, framework="pt") as written:
            value = written.get_tensor(name)
        sizes += value.nbytes
        assert value.dtype == torch.bfloat16
    assert index["metadata"]["total_size"] == sizes
    assert stored_dtype(str(tmp_path / "cut"), "student") == torch.bfloat16
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype="auto")
    assert plain.dtype == torch.bfloat16 and plain.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.float16, torch.float16), torch.float16),
        ((torch.float32, torch.float32), torch.float32),
        ((torch.bfloat16, torch.float32), None),
        ((torch.float64, torch.float64), None),
    ],
)
def test_stored_dtype(types, expected, tmp_path):
    weights = {str(place): torch.zeros(2, dtype=dtype) for place, dtype in enumerate(types)}
    save_file(weights, tmp_path / "model.safetensors")
    assert stored_dtype(str(tmp_path), "student") == expected


def test_files_of_a_base_model(tmp_path):
    """They lack the prefix of the body, and the head."""
    teacher = saved(tmp_path, "bert", "masked_lm", shard="1GB")
    path = tmp_path / "model.safetensors"
    body = {name.removeprefix("bert."): value for name, value in load_file(path).items() if "bert." in name}
    save_file(body, path, metadata={"format": "pt"})
    student = cut_architecture(teacher, (1, 4), None, "student")
    head = build_model(student, None, "masked_lm", "student", needs_head=False).state_dict()
    added = {name: value for name, value in head.items() if name.startswith("cls.")}
    assert cut_files(str(tmp_path), str(tmp_path / "cut"), student, teacher, (1, 4), "masked_lm", added)
    read = build_model(student, str(tmp_path / "cut"), "masked_lm", "student", needs_head=True).state_dict()
    for name, value in added.items():
        assert torch.equal(read[name], value), name
    layer = "encoder.layer.{}.attention.self.query.weight"
    assert torch.equal(read["bert." + layer.format(1)], body[layer.format(3)].float())


def test_a_head_for_other_classes_is_replaced(tmp_path):
    teacher = saved(tmp_path, "bert", "classification")
    other = for_task(architecture(str(tmp_path), None, "teacher"), "classification", ("a", "b"), 0)
    student = cut_architecture(other, (2, 3), None, "student")
    added = {"classifier.weight": torch.randn(2, 48), "classifier.bias": torch.randn(2)}
    assert teacher.num_labels == 3
    assert cut_files(str(tmp_path), str(tmp_path / "cut"), student, other, (2, 3), "classification", added)
    read = build_model(student, str(tmp_path / "cut"), "classification", "student", needs_head=True)
    assert torch.equal(read.classifier.weight, added["classifier.weight"])


def test_a_layer_may_be_taken_twice(tmp_path):
    teacher = saved(tmp_path, "llama", "causal_lm")
    assert_equal(*both(tmp_path, teacher, (2, 2, 3), "causal_lm"))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_student_that_ties_less_than_its_teacher(prefix, tmp_path):
    teacher = saved(tmp_path, "llama", "causal_lm", shard="1GB", tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    assert "lm_head.weight" not in weights
    save_file(
        {prefix + name.removeprefix("model."): value for name, value in weights.items()},
        path,
        metadata={"format": "pt"},
    )
    copied, read = both(tmp_path, teacher, (1, 2), "causal_lm", tie_word_embeddings=False)
    assert_equal(copied, read)
    assert read.lm_head.weight.data_ptr() != read.model.embed_tokens.weight.data_ptr()


def test_names_that_do_not_tell_the_layers(tmp_path):
    teacher = saved(tmp_path, "llama", "causal_lm", shard="1GB")
    path = tmp_path / "model.safetensors"
    weights = {name.replace("layers.", "layers_"): value for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    student = cut_architecture(teacher, (1, 2), None, "student")
    assert not cut_files(str(tmp_path), str(tmp_path / "cut"), student, teacher, (1, 2), "causal_lm", {})
    assert not (tmp_path / "cut").exists()


def test_a_composites_head_by_its_own_name(tmp_path):
    teacher = saved(tmp_path, "mistral3", "causal_lm", shard="1GB", tie_word_embeddings=False)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    (head,) = (name for name in weights if "lm_head" in name)
    weights["lm_head.weight"] = weights.pop(head)
    save_file(weights, path, metadata={"format": "pt"})
    assert_equal(*both(tmp_path, teacher, (2, 4), "causal_lm"))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_weights_that_differ_are_not_tied(prefix, tmp_path):
    """Files may lack the prefix; either way one of the two would be lost."""
    saved(tmp_path, "llama", "causal_lm", shard="1GB")
    path = tmp_path / "model.safetensors"
    named = {prefix + name.removeprefix("model."): value for name, value in load_file(path).items()}
    named["lm_head.weight"] = named.pop(f"{prefix}lm_head.weight")
    save_file(named, path, metadata={"format": "pt"})
    ties = [["lm_head.weight", "model.embed_tokens.weight"]]
    with pytest.raises(UserError, match="tied weights, but"):
        check_ties(str(tmp_path), ties, "teacher")
    named["lm_head.weight"] = named[f"{prefix}embed_tokens.weight"].clone()
    save_file(named, path, metadata={"format": "pt"})
    check_ties(str(tmp_path), ties, "teacher")
