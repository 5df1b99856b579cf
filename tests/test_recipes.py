"""Presets are put after every recipe, and the arms that recipes name in their comments can be typed."""

import shlex
from pathlib import Path

import pytest

from dsdistill.config import load

RECIPES = Path(__file__).parents[1] / "configs" / "recipes"
METHODS = ("multi_stage", "multi_level", "feature_alignment", "trajectory", "domain_mapping")
ALL = [f"{method}{size}" for method in METHODS for size in ("", "_small")]
# After any recipe: the terms of each stage.
PRESETS = {
    "none": [["task"]],
    "lora": [["task"]],
    "logits": [["task", "soft_label"]],
    "distilbert": [["task", "soft_label", "feature"]],
    "tinybert": [["hidden", "attention"], ["soft_label"]],
    "minilm": [["attention"], ["task"]],
    "minilmv2": [["attention"], ["task"]],
    "mobilebert": [["feature_map", "attention"]] * 3 + [["task", "soft_label"]],
    "ckd": [["soft_label", "ckd"]],
    "bert_emd": [["task", "soft_label", "hidden", "attention"]],
    "pkd": [["task", "soft_label", "feature"]],
    "skew_kl": [["soft_label"]],
    "akl": [["soft_label"]],
    "logit_mse": [["task", "soft_label"]],
}
CLASSES = {"skew_kl", "akl"}  # divergences of distributions, which scores do not have
# Arms of one recipe's ablation.
ARMS = {
    ("domain_none", "domain_mapping"): [["task"]],
    ("domain_logits", "domain_mapping"): [["task", "soft_label"]],
    ("distillation_only", "feature_alignment"): [["soft_label"]],
    ("feature_only", "feature_alignment"): [["task", "hidden", "feature", "attention", "contrastive"]],
}


def after(recipe: str, *sources: str):
    return load([str(RECIPES / f"{recipe}.yaml"), *sources])


def preset(name: str) -> str:
    return str(RECIPES / "presets" / f"{name}.yaml")


@pytest.mark.parametrize("recipe", ALL)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_leaves_nothing_of_the_recipes_terms(name, recipe):
    found, alone = (after(base, preset(name)) for base in (recipe, "multi_level_small"))
    assert [list(stage.terms.named()) for stage in found.run_stages] == PRESETS[name]
    # Nothing is left of their weights and divergences, or of the recipe's stages.
    assert [stage.terms for stage in found.run_stages] == [stage.terms for stage in alone.run_stages]
    assert found.stages == alone.stages
    assert found.train.distill_weight == alone.train.distill_weight == (0.5 if name == "logits" else None)
    assert found.student.domain is None


@pytest.mark.parametrize("recipe", ALL)
def test_soft_labels_come_from_a_head_that_is_trained_first(recipe, monkeypatch):
    """Published weights may have no head for the task, or a random one, like hfl/chinese-roberta-wwm-ext-large."""
    monkeypatch.chdir(RECIPES.parents[1])
    config = after(recipe)
    if config.teacher.recipe is None:  # an instruct model, unchanged
        assert config.teacher.path.endswith("-Instruct") and config.data.layout == "template"
        return
    teacher = load([config.teacher.recipe])
    assert teacher.task == config.task and list(teacher.terms.named()) == ["task"]
    assert teacher.data.max_length == config.data.max_length
    if not recipe.endswith(
        "_small"
    ):  # `plan` reads the shape without the hub; it must be that of the trained model
        assert teacher.student.config == config.teacher.config
        assert config.data.tokenizer == teacher.student.path


@pytest.mark.parametrize("size", ["", "_small"])
@pytest.mark.parametrize(("name", "recipe"), ARMS)
def test_an_arm_of_an_ablation(name, recipe, size):
    found = after(recipe + size, preset(name))
    assert [list(stage.terms.named()) for stage in found.run_stages] == ARMS[name, recipe]
    assert (found.student.domain is None) and found.data.sampler == "uniform"


@pytest.mark.parametrize("recipe", ["multi_stage", "multi_level", "multi_stage_small", "multi_level_small"])
@pytest.mark.parametrize("others", [[], ["stsb"]], ids=["classes", "scores"])
def test_mixed_texts(recipe, others):
    """presets/mixkd.yaml follows recipes for classes and for scores."""
    config = after(recipe, preset("mixkd"), *map(preset, others))
    assert list(config.terms.named()) == ["task", "soft_label"] and config.data.mixup == 0.4
    assert config.terms.soft_label.divergence == "logit_mse" and len(config.run_stages) == 1


def test_domains_that_are_weighed_by_the_gap():
    """presets/ddk.yaml follows domain_mapping_small: each source has a dev set of its name."""
    config = after("domain_mapping_small", preset("ddk"))
    assert list(config.terms.named()) == ["task", "soft_label"] and config.data.sampler == "ddk"
    assert [part.name for part in config.data.train] == list(config.data.dev)


def test_the_other_reading_of_structure():
    """presets/learned_structure.yaml follows multi_stage_small: the same stages, with components instead of pairs."""
    first, second = after("multi_stage_small"), after("multi_stage_small", preset("learned_structure"))
    assert [stage.name for stage in second.run_stages] == [stage.name for stage in first.run_stages]
    for mine, other in zip(first.run_stages, second.run_stages, strict=True):
        terms, others = mine.terms.named(), other.terms.named()
        assert terms.keys() - {"pairwise"} == others.keys() - {"feature"}
        assert others["feature"].layers == terms["pairwise"].layers and others["feature"].components == 64
        assert all(others[name] == terms[name] for name in terms.keys() - {"pairwise"})


@pytest.mark.parametrize("recipe", ["multi_stage_small", "multi_level_small"])
@pytest.mark.parametrize("name", [None, *(name for name in PRESETS if name not in CLASSES)])
def test_another_task_keeps_the_terms(name, recipe):
    """presets/stsb.yaml follows a recipe and a preset, as in `compare`."""
    sources = [preset(name)] if name else []
    first, second = after(recipe, *sources), after(recipe, *sources, preset("stsb"))
    assert second.task == "regression" and second.data.subset == "stsb"
    assert second.run_stages == first.run_stages and second.train.distill_weight == first.train.distill_weight


@pytest.mark.parametrize(
    ("recipe", "arm"),
    [
        ("domain_mapping_small", "data.sampler=uniform"),
        (
            "domain_mapping_small",
            "data.sampler=hard_negative 'terms.contrastive={}' train.group_by_length=false",
        ),
        ("trajectory", "terms.soft_label.divergence=forward_kl 'terms.fdd={}'"),
    ],
)
def test_an_arm_named_in_a_comment_can_be_typed(recipe, arm):
    comments = [
        x for x in (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines() if x[:1] == "#"
    ]
    assert arm in "\n".join(comments)
    assert after(recipe, *shlex.split(arm)) != after(recipe)


@pytest.mark.parametrize("size", ["", "_small"])
def test_a_sentence_encoder_learns_without_labels(size):
    """The large recipe contrasts pairs; the small one scores against people, whose pairs cannot be contrasted."""
    config = after(f"embedding{size}")
    assert config.task == "embedding" and config.rows == 2
    assert {"embedding", "hidden", "attention", "pkt"} <= config.terms.named().keys()
    assert ("task" in config.terms.named()) == (config.data.label is None) == (not size)
