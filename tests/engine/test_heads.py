"""Heads of language models: a cut student has its teacher's, and a random head is never used silently."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from dsdistill.config import UserError
from dsdistill.config.load import make_config
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.module import make_student
from dsdistill.engine.prepare import prepare
from dsdistill.engine.teacher import LazyTeacher
from tests.conftest import BERT, merge
from tests.engine.launch import run_configs
from tests.engine.test_resume import losses
from tests.models.families import peaked

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def save(folder: Path, tokenizer_dir: Path, *, tied: bool, masked: bool = False) -> Path:
    """Write a peaked language model of random weights and the tests' tokenizer."""
    torch.manual_seed(0)
    if masked:
        sizes = {key: value for key, value in BERT.items() if key != "model_type"}
        config = AutoConfig.for_model("bert", **sizes, tie_word_embeddings=tied)
        model = AutoModelForMaskedLM.from_config(config)
    else:
        config = AutoConfig.for_model("llama", **LLAMA, tie_word_embeddings=tied)
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases too, which begin at 0
            parameter.add_(0.1 * torch.randn_like(parameter))
    peaked(model, 4.0).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
    return folder


def without(folder: Path, part: str) -> Path:
    """Take the weights of these names out of a folder."""
    path = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if part not in name}
    save_file(kept, path, metadata={"format": "pt"})
    return folder


@pytest.fixture
def causal(settings, data_dir, tmp_path):
    """Settings of one step of a causal pair whose teacher lies in `teacher`."""
    files = {"source": "files", "train": str(data_dir / "train.txt"), "dev": str(data_dir / "dev.txt")}
    files |= {"max_length": 16, "max_train": 8, "max_dev": 8, "cache": str(tmp_path / "cache")}
    return settings | {
        "task": "causal_lm",
        "data": files,
        "teacher": {"path": str(tmp_path / "teacher"), "zero_stage": 0},
        "student": {"from_teacher": [1, 2, 3, 4]},
        "terms": {"soft_label": {}},
        "train": settings["train"] | {"steps": 1},
    }


def write(folder: Path, settings: dict, name: str) -> str:
    path = folder / f"{name}.yaml"
    settings = merge(settings, {"run.name": name, "run.dir": str(folder / name)})
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_a_student_of_all_layers_is_its_teacher(causal, data_dir, tokenizer_dir, tmp_path):
    """Before the first step its soft labels differ by rounding only; a random head would give several nats."""
    save(tmp_path / "teacher", tokenizer_dir, tied=True)
    save(tmp_path / "words", tokenizer_dir, tied=True, masked=True)
    untied = {"student.config": {"tie_word_embeddings": False}}
    words = {"task": "masked_lm", "teacher.path": str(tmp_path / "words")}
    words |= {"data.train": str(data_dir / "train.tsv"), "data.dev": str(data_dir / "dev.tsv")}
    random = {"path": None, "config": {"model_type": "llama", **LLAMA}, "zero_stage": 0}
    cases = {
        "same": {},
        "untied": untied,
        "masked": words | untied,
        "random": {"teacher": {**random}, "data.tokenizer": str(tokenizer_dir)},
    }
    run_configs([write(tmp_path, merge(causal, change), name) for name, change in cases.items()], ranks=1)
    for name in cases:
        (first,) = losses(tmp_path / name)
        assert abs(first["terms"]["soft_label"]["raw"]) < 1e-5, name
    head = load_file(tmp_path / "untied" / "init" / "model.safetensors")["lm_head.weight"]
    embeddings = load_file(tmp_path / "teacher" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(head, embeddings)


class TestTies:
    @pytest.fixture
    def config(self, causal, tokenizer_dir, tmp_path):
        """Write a config of a student that ties a head which its teacher does not tie."""
        save(tmp_path / "teacher", tokenizer_dir, tied=False)
        return write(tmp_path, merge(causal, {"student.config": {"tie_word_embeddings": True}}), "run")

    def test_are_refused_where_the_weights_differ(self, refused, config):
        line = refused("train", config)
        assert "student.config.tie_word_embeddings: got tied weights, but" in line
        assert "lm_head.weight" in line and "model.embed_tokens.weight" in line

    @pytest.mark.parametrize("model", ["teacher", "student"])
    def test_of_a_folder_that_has_both_are_refused_too(self, refused, causal, tokenizer_dir, tmp_path, model):
        """The folder's config.json ties them: the library loads both, but an export could hold only one."""
        folder = save(tmp_path / "teacher", tokenizer_dir, tied=True)
        path = folder / "model.safetensors"
        weights = load_file(path)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
        save_file(weights, path, metadata={"format": "pt"})
        change = {"student": {"path": str(folder)}} if model == "student" else {}
        line = refused("train", write(tmp_path, merge(causal, change), "run"))
        assert "student.config.tie_word_embeddings: got tied weights, but" in line
        assert f"of the {model} differ" in line
        change["student.config"] = {"tie_word_embeddings": False}
        run_configs([write(tmp_path, merge(causal, change), "run")], ranks=1)
        assert abs(losses(tmp_path / "run")[0]["terms"]["soft_label"]["raw"]) < 1e-5

    def test_are_welcome_where_they_are_equal(self, config, tmp_path):
        path = tmp_path / "teacher" / "model.safetensors"
        weights = load_file(path)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, path, metadata={"format": "pt"})
        run_configs([config], ranks=1)
        assert abs(losses(tmp_path / "run")[0]["terms"]["soft_label"]["raw"]) < 1e-5


def test_a_cut_student_is_the_teachers_outside_its_layers(refused, causal, tokenizer_dir, tmp_path):
    """With fewer positions all positions would become random."""
    save(tmp_path / "teacher", tokenizer_dir, tied=True, masked=True)
    causal["data"] |= {"train": causal["data"]["train"].replace(".txt", ".tsv")}
    change = {"task": "masked_lm", "student.config": {"max_position_embeddings": 32}}
    change |= {"data.dev": causal["data"]["dev"].replace(".txt", ".tsv")}
    line = refused("train", write(tmp_path, merge(causal, change), "run"))
    assert "student.from_teacher: got bert.embeddings.position_embeddings.weight of shape [32, 48]" in line


class TestMissingHeads:
    def judged(self, settings: dict) -> bool:
        return prepare(make_config(settings), world_size=1).judged

    def test_of_a_causal_teacher_are_not_reported(self, causal, tokenizer_dir, tmp_path):
        """This teacher's head is untied; a tied teacher's files rightly have no head."""
        folder = save(tmp_path / "teacher", tokenizer_dir, tied=False)
        hidden = merge(
            causal, {"terms": {"hidden": {}}, "student": {"config": {"model_type": "llama", **LLAMA}}}
        )
        assert self.judged(hidden)
        without(folder, "lm_head")
        prepared = prepare(make_config(hidden), world_size=1)
        assert not prepared.judged and set(prepared.evaluation.terms) == {"task"}
        shutil.rmtree(folder)
        save(folder, tokenizer_dir, tied=True)
        assert "lm_head.weight" not in load_file(folder / "model.safetensors")
        assert self.judged(hidden)

    def test_are_found_below_other_prefixes(self, causal, tokenizer_dir, tmp_path):
        """A body saved by AutoModel has names without `model.`, and no head."""
        folder = save(tmp_path / "teacher", tokenizer_dir, tied=False)
        path = folder / "model.safetensors"
        weights = load_file(path)
        bare = {name.removeprefix("model."): value for name, value in weights.items()}
        hidden = merge(
            causal, {"terms": {"hidden": {}}, "student": {"config": {"model_type": "llama", **LLAMA}}}
        )
        save_file(bare, path, metadata={"format": "pt"})
        assert self.judged(hidden)
        del bare["lm_head.weight"]
        save_file(bare, path, metadata={"format": "pt"})
        assert not self.judged(hidden)

    def test_of_a_masked_teacher_are_not_reported(self, mapping, tokenizer_dir):
        change = {"student.domain": None, "terms": {"hidden": {}}, "evaluation": {}}
        hidden = merge(mapping, change)
        assert self.judged(hidden)
        without(Path(mapping["teacher"]["path"]), "cls.predictions.transform")
        assert not self.judged(hidden)

    @pytest.mark.parametrize("change", ["missing", "other classes"])
    def test_of_a_classifier_are_not_reported(self, settings, models_dir, tmp_path, change):
        folder = shutil.copytree(models_dir / "teacher", tmp_path / "copy")
        hidden = merge(settings, {"terms": {"hidden": {}}, "teacher.path": str(folder)})
        assert self.judged(hidden)
        path = folder / "model.safetensors"
        weights = load_file(path)
        if change == "missing":
            del weights["classifier.weight"]
        else:
            weights["classifier.weight"] = weights["classifier.weight"][:2].clone()
        save_file(weights, path, metadata={"format": "pt"})
        assert not self.judged(hidden)

    def test_are_refused_where_a_term_reads_them(self, refused, causal, tokenizer_dir, tmp_path):
        without(save(tmp_path / "teacher", tokenizer_dir, tied=False), "lm_head")
        own = {"student": {"config": {"model_type": "llama", **LLAMA}}}
        line = refused("train", write(tmp_path, merge(causal, own), "run"))
        assert "teacher.path: got " in line and "without weights for lm_head.weight" in line

    def test_are_not_cut_out_of_a_teacher(self, refused, causal, tokenizer_dir, tmp_path):
        without(save(tmp_path / "teacher", tokenizer_dir, tied=False), "lm_head")
        path = write(tmp_path, merge(causal, {"terms": {"hidden": {}}}), "run")
        assert "got teacher weights without lm_head.weight" in refused("train", path)
        tied = merge(causal, {"terms": {"hidden": {}}, "student.config": {"tie_word_embeddings": True}})
        prepare(make_config(tied), world_size=1)  # its head is the teacher's embeddings

    def test_of_a_student_are_new_where_that_is_said(self, refused, causal, tokenizer_dir, tmp_path):
        save(tmp_path / "teacher", tokenizer_dir, tied=True)
        without(save(tmp_path / "student", tokenizer_dir, tied=False), "lm_head")
        own = merge(causal, {"student": {"path": str(tmp_path / "student")}})
        line = refused("train", write(tmp_path, own, "run"))
        assert "student.path: got " in line and "without weights for lm_head.weight" in line
        assert line.endswith("student.new_head=true")
        path = write(tmp_path, merge(own, {"student.new_head": True}), "run")
        run_configs([path], ranks=1)
        assert losses(tmp_path / "run")[0]["terms"]["soft_label"]["raw"] > 0.1

    def test_of_a_tied_student_are_its_embeddings(self, causal, tokenizer_dir, tmp_path):
        save(tmp_path / "teacher", tokenizer_dir, tied=True)
        prepare(make_config(merge(causal, {"student": {"path": str(tmp_path / "teacher")}})), world_size=1)


class TestHub:
    """A downloaded model reports what it lacks once it is loaded; here it is in the cache."""

    @pytest.fixture
    def hub(self, causal, tokenizer_dir, tmp_path, monkeypatch):
        """Put an untied model without its head into a cache of the hub; return its id."""
        home = tmp_path / "hub" / "models--some--model"
        commit = "0" * 40
        folder = home / "snapshots" / commit
        without(save(folder, tokenizer_dir, tied=False), "lm_head")
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(commit)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        return "some/model"

    def test_a_judge_without_a_head_is_refused(self, causal, hub, tokenizer_dir):
        own = {"config": {"model_type": "llama", **LLAMA}}
        change = {"teacher.path": hub, "student": own, "terms": {"hidden": {}}}
        prepared = prepare(make_config(merge(causal, change)), world_size=1)
        ranks = Ranks(0, 1, torch.device("cpu"))
        with pytest.raises(UserError, match=r"teacher.path: got some/model without weights for lm_head"):
            LazyTeacher(
                prepared.config, prepared.teacher, prepared.objectives, ranks, judged=prepared.judged
            ).tracer(())

    def test_a_student_without_one_is_refused(self, causal, hub, tokenizer_dir, tmp_path):
        save(tmp_path / "teacher", tokenizer_dir, tied=True)

        def make(**student):
            settings = merge(causal, {"student": {"path": hub, **student}})
            prepared = prepare(make_config(settings), world_size=1)
            config, evaluation = prepared.config, prepared.evaluation
            return make_student(
                *(config, config.run_stages[0], prepared.student, hub, prepared.pair),
                *(prepared.objectives[0], evaluation, ()),
                checkpointing=False,
            )

        with pytest.raises(UserError, match=r"student.path: got some/model without weights for lm_head"):
            make()
        make(new_head=True)
