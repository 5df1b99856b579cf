"""What is said before a run of data that its teacher does not know."""

from pathlib import Path

import pytest

from dsdistill.config import load
from dsdistill.engine.prepare import recipe_of, tell_other_data

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
    (line,) = told("configs/recipes/multi_level_small.yaml", "data.subset=cola")
    assert line.startswith(
        "data.subset: cola, but the teacher's recipe has sst2 (configs/recipes/sst2_teacher"
    )
    for preset in ("cola", "mrpc", "rte", "stsb"):
        assert told("configs/recipes/multi_level_small.yaml", f"configs/recipes/presets/{preset}.yaml") == []


def test_most_configs_have_one():
    assert len(WITH_RECIPE) >= 10
