"""What is said before a run of data that its teacher does not know."""

from pathlib import Path

import pytest
import yaml

from dsdistill.config import load
from dsdistill.config.load import build
from dsdistill.engine.prepare import prepare, recipe_of, tell_other_data

ROOT = Path(__file__).parents[2]
WITH_RECIPE = [
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "configs").glob("**/*.yaml"))
    if path.parent.name in ("configs", "recipes") and "\n  recipe: " in path.read_text(encoding="utf-8")
]


@pytest.fixture
def told(caplog, monkeypatch):
    monkeypatch.chdir(ROOT)

    def tell(*sources: str) -> list[str]:
        config = load(sources)
        caplog.clear()
        with caplog.at_level("WARNING", "dsdistill"):
            tell_other_data(config, recipe_of(config))
        return caplog.messages

    return tell


@pytest.mark.parametrize("path", WITH_RECIPE)
def test_shipped_configs_have_teachers_of_their_data(told, path):
    assert told(path, "data.max_train=10") == []


def test_a_teacher_of_other_data_is_told(told):
    recipe = "configs/recipes/sst2_teacher_small.yaml"
    (line,) = told("configs/recipes/multi_level_small.yaml", "data.subset=cola", "data.train=./train")
    assert line == f"{recipe} makes a teacher of other data: data.subset: cola here, sst2 there"
    (line,) = told(
        "configs/recipes/multi_level_small.yaml", "data.subset=mrpc", "data.text=[sentence1, sentence2]"
    )
    assert line.endswith(
        "data.subset: mrpc here, sst2 there; data.text: sentence1, sentence2 here, sentence there"
    )
    for preset in ("cola", "mrpc", "rte", "stsb"):
        assert told("configs/recipes/multi_level_small.yaml", f"configs/recipes/presets/{preset}.yaml") == []


def test_most_configs_have_one():
    assert len(WITH_RECIPE) >= 10


def test_a_run_says_so(settings, tmp_path, data_dir, caplog):
    student = {"path": settings["teacher"]["path"]}
    recipe = settings | {"teacher": None, "student": student, "terms": {"task": {}}}
    recipe["data"] = settings["data"] | {"train": str(data_dir / "dev.tsv")}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(recipe))
    settings["teacher"] = {"recipe": str(tmp_path / "teacher.yaml")}
    with caplog.at_level("WARNING", "dsdistill"):
        prepare(build(settings), 1)
    (line,) = (message for message in caplog.messages if "other data" in message)
    assert "train.tsv here" in line and "dev.tsv there" in line
