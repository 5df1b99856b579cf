"""Students with low-rank adapters train as peft's own models do, and are saved, merged and written for peft."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from dsdistill.config import UserError, load
from dsdistill.config.load import make_config
from dsdistill.config.schema import Lora
from dsdistill.data import Loader
from dsdistill.distributed import deepspeed
from dsdistill.engine import checkpoint
from dsdistill.engine.evaluate import evaluate_run
from dsdistill.engine.export import export, find_checkpoint, load_student, read_config
from dsdistill.engine.prepare import prepare
from dsdistill.models.adapters import add_adapters, merge, target_names
from dsdistill.models.build import auto_class, skeleton
from dsdistill.planner import host, zero_memory
from dsdistill.planner.plan import Forecast
from tests.conftest import BERT, small_run
from tests.conftest import merge as changed
from tests.engine.launch import run_configs
from tests.engine.plain import plain_run
from tests.engine.test_heads import save, write
from tests.engine.test_resume import losses
from tests.models import tiny
from tests.models.families import peaked

CASES = ["zero1", "zero2", "zero3", "one"]
LORA = {"rank": 4, "alpha": 8}
IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, models_dir, data_dir, tokenizer_dir):
    """Return run folders by name: every term under each ZeRO stage, stages with dropout, and a tied language model."""
    folder = tmp_path_factory.mktemp("lora")
    base = changed(small_run(models_dir, data_dir, folder), {"student.lora": LORA, "train.epochs": 1})
    cases = {f"zero{stage}": {"student.zero_stage": stage} for stage in (1, 2, 3)}
    cases["zero3"]["student.gradient_checkpointing"] = True
    cases["zero1"] |= {"run.save_every": 2, "run.keep": 9}
    staged = {
        "teacher.zero_stage": 0,
        "student": {
            "config": BERT | {"num_hidden_layers": 2},
            "lora": LORA | {"dropout": 0.1},
            "zero_stage": 3,
        },
        "terms": {"task": {}, "hidden": {}},
        "stages": [
            {"name": "first", "freeze": ["*layer.1*"]},
            {"name": "second", "freeze": ["*layer.0*"], "terms": {"smooth": {}}},
        ],
        "run.save_every": 2,
        "run.keep": 9,
    }
    paths = {name: write(folder, changed(base, case), name) for name, case in cases.items()}
    for name in ("whole", "back"):
        paths[name] = write(folder, changed(base, staged), name)
    moved = folder / "moved.yaml"
    there = {"run.dir": str(folder / "zero1"), "student.zero_stage": 2}
    moved.write_text(yaml.safe_dump(changed(base, there)))
    # In the middle and at the beginning of a later stage.
    run_configs([*paths.values(), f"{paths['back']}@4", f"{paths['back']}@2"])
    paths["one"] = write(folder, changed(base, {"run.baseline": True}), "one")
    save(folder / "causal", tokenizer_dir, tied=True)
    causal = {
        "task": "causal_lm",
        "data.train": str(data_dir / "train.txt"),
        "data.dev": str(data_dir / "dev.txt"),
        "teacher": {"path": str(folder / "causal"), "zero_stage": 0},
        "student": {"from_teacher": [1, 3], "lora": LORA | {"targets": ["q_proj", "down_proj"]}},
        "terms": {"task": {}, "soft_label": {}, "hidden": {}, "attention": {}},
        "train": {"steps": 4, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2, "dtype": "bf16"},
        "evaluation": {"latency": True},
    }
    paths["tied"] = write(folder, changed(base, causal), "tied")
    shutil.copytree(folder / "zero1", folder / "before")
    run_configs([paths["one"], paths["tied"], f"{moved}@2"], ranks=1)
    return folder


@pytest.fixture(scope="module")
def plain(runs):
    """Return losses of a plain loop around peft's own model; it adapts layers and trains the head as peft chooses."""
    one = load([str(runs / "one.yaml")])
    settings = json.loads(one.model_dump_json(exclude_defaults=True))
    settings |= {"student": {"path": one.student.path}, "train": {"learning_rate": one.train.learning_rate}}
    prepared = prepare(one, world_size=1)
    loader = Loader(prepared.data.train, 8, 8, 1, 0, seed=0, pad_id=0)
    batches = [loader.step(*divmod(step, loader.steps_per_epoch))[0] for step in range(5)]
    projectors = [p.weight.detach() for p in prepared.objectives[0].terms["hidden"].projectors.values()]

    def adapted(student):
        torch.manual_seed(0)
        return get_peft_model(student, LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8))

    return plain_run(settings, projectors, batches, adapted)


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_a_plain_loop_around_peft(runs, plain, case):
    found = losses(runs / case) if case != "zero1" else losses(runs / "before")
    assert len(found) == len(plain) == 5
    for expected, line in zip(plain, found, strict=True):
        got = {name: term["raw"] for name, term in line["terms"].items()}
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-7), f"step {line['step']}"
    assert any(abs(plain[-1][name] - plain[0][name]) > 1e-3 * plain[0][name] for name in plain[0])


def test_a_run_goes_on_exactly_and_elsewhere(runs, plain):
    assert losses(runs / "back") == losses(runs / "whole")
    for expected, line in zip(plain[2:], losses(runs / "zero1")[2:], strict=True):  # one rank, stage 2
        got = {name: term["raw"] for name, term in line["terms"].items()}
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-7), f"step {line['step']}"
    smooth = [line["terms"]["smooth"]["raw"] for line in losses(runs / "whole")[2:]]
    assert smooth[-1] > smooth[0] > 0  # at first from dropout alone


def saved(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    tag = find_checkpoint(str(run)) if step is None else checkpoint.tag_of(step)
    return deepspeed.whole_weights(str(run / checkpoint.FOLDER), tag)


@pytest.mark.parametrize("run", ["zero1", "zero2", "zero3", "whole", "tied"])
def test_checkpoints_hold_only_what_trains(runs, run):
    """They also hold what a stage has frozen after an earlier stage trained it; they have no base weights."""
    names = set(saved(runs / run))
    own = {name for name in names if name.startswith("body.")}
    head = {"body.classifier.weight", "body.classifier.bias"} if run != "tied" else set()
    assert own == head | {name for name in names if ".lora_" in name}
    assert len(own - head) == 2 * 2 * 2  # A and B of two weights in two layers
    pickled = (runs / run / "checkpoints" / find_checkpoint(str(runs / run))).glob("*model_states.pt")
    assert all(path.stat().st_size < 40_000 for path in pickled)


def test_stages_freeze_adapters(runs):
    first, last = saved(runs / "whole", 2), saved(runs / "whole")
    for name in last:
        if ".lora_B" in name:
            assert bool(first[name].any()) == ("layer.0" in name), name
            assert torch.equal(first[name], last[name]) == ("layer.0" in name), name


@pytest.fixture(params=["one", "tied", "whole"])
def exported(request, runs, tmp_path):
    """Return a run, its student from the newest checkpoint, and its exports: merged, and as an adapter."""
    run = str(runs / request.param)
    export(run, str(tmp_path / "merged"), dtype="fp32")
    export(run, str(tmp_path / "adapter"), dtype="fp32", adapter=True)
    config = read_config(run)
    student, _ = load_student(run, config, find_checkpoint(run))
    return config, student.eval(), tmp_path, run


def test_exports_compute_what_the_student_does(exported):
    config, student, folder, run = exported
    family = auto_class(config.task)
    merged, info = family.from_pretrained(folder / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["base_model_name_or_path"] in (config.student.path, f"{run}/init")
    base = family.from_pretrained(settings["base_model_name_or_path"])
    files = {path.name for path in (folder / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert "model.safetensors" not in files
    with torch.no_grad():
        before = base(input_ids=IDS).logits
        loaded = PeftModel.from_pretrained(base, folder / "adapter").eval()
        truth = student(input_ids=IDS).logits
        assert (merged.eval()(input_ids=IDS).logits - truth).abs().max() < 1e-5
        assert (loaded(input_ids=IDS).logits - truth).abs().max() < 1e-5
    assert (before - truth).abs().max() > 1e-3, "the adapter does something"
    again = load_student(run, config, find_checkpoint(run))[0]
    weights = {name: value for name, value in base.state_dict().items() if "base_layer" in name}
    assert weights and all(
        torch.equal(value, again.get_parameter(name)) for name, value in weights.items()
    ), "the weights below the adapters are the first ones"


def test_evaluation_scores_what_the_run_scored(runs):
    before = json.loads((runs / "tied" / "summary.json").read_text())["models"]["student"]
    found = evaluate_run(str(runs / "tied"))["models"]["student"]
    assert found["latency_ms"] > 0
    scores = {"perplexity", "kl"}
    assert {name: found[name] for name in scores} == {name: before[name] for name in scores}


def test_other_weights_below_the_adapters_are_refused(runs, tmp_path):
    shutil.copytree(runs / "tied", tmp_path / "run")
    path = tmp_path / "run" / "init" / "model.safetensors"
    save_file({name: 2 * value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="weights below the adapters: got other contents than this run began"):
        export(str(tmp_path / "run"), str(tmp_path / "out"))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "albert", "olmo2"])
def test_where_adapters_go(family):
    """They go where peft chooses, else into all linear layers of the layers; merged they compute the same."""
    task = "causal_lm" if family in tiny.CAUSAL else "masked_lm"
    settings = {**tiny.CAUSAL, **tiny.MASKED}[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    model = peaked(auto_class(task).from_config(config), 4.0).eval().double()
    chosen = {"bert": {"query", "value"}, "gpt2": {"c_attn"}, "llama": {"q_proj", "v_proj"}}.get(family)
    names = target_names(model, Lora())
    last = {name.rpartition(".")[2] for name in names}
    assert last == chosen if chosen else last > {"query", "value"} or last > {"q_proj", "down_proj"}
    assert not any("head" in name or "pooler" in name or "predictions" in name for name in names)
    with torch.no_grad():
        truth = model(input_ids=IDS).logits
        base = add_adapters(model, Lora(rank=2), task, 0)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(".lora_" in name for name in trained) and not trained & base
        assert torch.equal(model(input_ids=IDS).logits, truth)
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_()
        adapted = model(input_ids=IDS).logits
        assert (adapted - truth).abs().max() > 0.1
        plain = merge(model)
        assert (plain(input_ids=IDS).logits - adapted).abs().max() < 1e-9
    assert set(plain.state_dict()) == set(skeleton(config, task, "x").state_dict())


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (
                {"student.lora.targets": ["nothing"]},
                "targets: got nothing, which names nothing, expected auto, or",
            ),
            ({"student.lora.targets": ["classifier"]}, "targets: got classifier, which names nothing"),
            ({"student.lora.targets": []}, "student.lora.targets: got []"),
            ({"student.lora.rank": 0}, "student.lora.rank: got 0"),
            (
                {"student.freeze": ["*lora*", "classifier*"]},
                "student.freeze: got patterns that match every parameter, expected some",
            ),
            ({"student.freeze": ["*nothing*"]}, "student.freeze: got *nothing*, which matches no parameter"),
        ],
    )
    def test_settings(self, config, refused, change, told):
        assert told in refused("train", config({"student.lora": {}} | change))

    def test_patterns_may_name_what_is_frozen_anyway(self, config):
        prepare(load([config({"student.lora": {}, "student.freeze": ["*embeddings*", "*.query.weight"]})]), 1)

    def test_no_package(self, config, refused, monkeypatch):
        there = importlib.util.find_spec
        path = config({"student.lora": {}})
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else there(name))
        told = "student.lora: got no package peft, expected pip install 'dsdistill[adapters]'"
        for command in ("train", "plan"):
            assert told in refused(command, path)

    def test_an_adapter_is_no_student(self, runs, config, refused, tmp_path):
        export(str(runs / "one"), str(tmp_path / "adapter"), adapter=True)
        assert "an adapter" in refused("train", config({"student.path": str(tmp_path / "adapter")}))

    def test_no_adapters_to_write(self, runs, tmp_path):
        shutil.copytree(runs / "one" / "baseline", tmp_path / "run")
        path = tmp_path / "run" / "config.yaml"
        kept = yaml.safe_load(path.read_text())
        del kept["student"]["lora"]
        path.write_text(yaml.safe_dump(kept))
        with pytest.raises(UserError, match=r"--adapter: got .*, whose student has no adapters"):
            export(str(tmp_path / "run"), str(tmp_path / "out"), adapter=True)


def test_plans_count_the_adapters_alone(models_dir, data_dir, tmp_path):
    """Optimizer states, checkpoints and gradients are only the adapters'; the weights are all there."""
    settings = changed(small_run(models_dir, data_dir, tmp_path), {"data.labels": ["a", "b", "c"]})
    plans = {}
    for name, lora in (("all", None), ("adapters", LORA)):
        config = make_config(changed(settings, {"student.lora": lora} if lora else {}))
        forecast = Forecast(config, 1, gpu=True)
        (stage,) = config.run_stages
        plans[name] = forecast.phases(stage, 4, False), forecast
    found, forecast = plans["adapters"]
    student = AutoModelForSequenceClassification.from_pretrained(models_dir / "student")
    whole = sum(p.numel() for p in student.parameters())
    adapters = 2 * 2 * (4 * 32 + 32 * 4)
    own = sum(p.numel() for p in forecast.objectives[0].parameters()) + adapters
    own += sum(p.numel() for p in student.classifier.parameters())
    assert found["step"][zero_memory.MOMENTS] == 8 * own
    assert found["step"][zero_memory.MASTER] == 4 * own
    terms = own - adapters - sum(p.numel() for p in student.classifier.parameters())
    assert found["step"][zero_memory.WEIGHTS] == 4 * (whole + adapters + terms)
    disk = host.disk_space(forecast.config, forecast.parts, forecast.rank.zero)
    assert disk["a checkpoint"] == 4 * own + 12 * own
    assert plans["all"][1].parts.trained > whole > own
    needed = [plans[name][1].time(forecast.config.run_stages[0], 1e12).operations for name in plans]
    assert 0.6 < needed[1]["student"] / needed[0]["student"] < 1
