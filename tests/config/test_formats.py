"""Formats of config.yaml: how it names its format, how an earlier one is completed, and how teachers are named."""

from pathlib import Path

import pytest
import yaml

from dsdistill.config import UserError, as_begun, dump, formats, load, load_saved
from dsdistill.config.load import make_config
from dsdistill.config.resume import check_same

MINIMAL = {"teacher": {"path": "t"}, "student": {"path": "s"}, "terms": {"task": {}, "hidden": {}}}


@pytest.fixture
def write(tmp_path):
    def write(settings: dict) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        return str(path)

    return write


def saved(**changes: object) -> dict:
    """Return a run folder's config.yaml with other top-level keys; None removes a key."""
    settings = yaml.safe_load(dump(make_config(MINIMAL))) | changes
    return {key: value for key, value in settings.items() if value is not None or key == "teacher"}


class TestFormat:
    def test_a_dump_names_it_first(self, write):
        text = dump(make_config(MINIMAL))
        assert text.startswith("format: 4\n")
        path = write(yaml.safe_load(text))
        assert load([path]) == load([path, "format=4"]) == load_saved(path) == make_config(MINIMAL)

    @pytest.mark.parametrize("named", [1, 5, "2", 2.0, True, [2], None])
    def test_a_config_of_another_is_refused(self, write, named):
        path = write(MINIMAL | {"format": named})
        with pytest.raises(UserError) as caught:
            load([path])
        assert str(caught.value).startswith(f"{path}: format: got {named!r}, expected 2 to 4 (")

    @pytest.mark.parametrize("named", [5, 0, "1"])
    def test_a_run_folder_of_a_newer_one_is_refused(self, write, named):
        path = write(saved(format=named) | {"setting_of_then": 5})
        for read in (load_saved, lambda path: check_same(path, make_config(MINIMAL))):
            with pytest.raises(UserError) as caught:
                read(path)
            assert str(caught.value).startswith(f"{path}: format: got {named!r}, expected 1 to 4 (")

    def test_an_earlier_one_is_completed_by_the_defaults_of_its_time(self, write, monkeypatch):
        monkeypatch.setitem(formats.DEFAULTS, 1, {"train.clip": 2.5, "terms.hidden.embedding": False})
        stages = [{"name": "a", "terms": {"attention": {}, "hidden": None}}, {"name": "b"}]
        settings = yaml.safe_load(dump(make_config(MINIMAL | {"stages": stages})))
        del settings["train"]["clip"], settings["terms"]["hidden"]["embedding"]
        del settings["stages"][1]["terms"]["hidden"]["embedding"]
        now = load_saved(write(settings))  # it names its format
        assert (now.train.clip, now.terms.hidden.embedding) == (1.0, True)
        del settings["format"]
        path = write(settings)
        before = load_saved(path)
        assert (before.train.clip, before.terms.hidden.embedding) == (2.5, False)
        assert before.stages[0].terms.hidden is None and before.terms.attention is None
        assert before.stages[1].terms.hidden.embedding is False
        check_same(path, before)
        with pytest.raises(UserError, match=r"embedding: got True, expected False as at this run's start"):
            check_same(path, now)

    def test_text_runs_on_as_the_run_began(self, write):
        """A run from before packing laid texts end to end, and its user's config does not mention it."""
        settings = yaml.safe_load(dump(make_config(MINIMAL)))
        del settings["data"]["packing"], settings["data"]["layout"]
        path = write(settings | {"format": 3})
        assert (load_saved(path).data.packing, load_saved(path).data.layout) == (False, "separator")
        mine = make_config(MINIMAL)
        assert (mine.data.packing, mine.data.layout) == ("auto", None)
        assert as_begun(mine, path).data.packing is False
        check_same(path, as_begun(mine, path))

    def test_the_last_layer_is_read_as_the_run_began(self, write):
        """A run from before final_norm read it before the norm, and its user's config does not mention it."""
        settings = yaml.safe_load(dump(make_config(MINIMAL)))
        del settings["terms"]["hidden"]["final_norm"]
        del settings["data"]["packing"], settings["data"]["layout"]
        path = write(settings | {"format": 2})
        assert load_saved(path).terms.hidden.final_norm == load([path]).terms.hidden.final_norm == "before"
        mine = make_config(MINIMAL)
        assert mine.terms.hidden.final_norm == "after"
        assert as_begun(mine, path).terms.hidden.final_norm == "before"
        check_same(path, as_begun(mine, path))
        given = make_config(MINIMAL | {"terms": {"task": {}, "hidden": {"final_norm": "after"}}})
        with pytest.raises(UserError, match="final_norm: got after, expected before as at this run's start"):
            check_same(path, as_begun(given, path))

    def test_what_an_earlier_one_says_stays(self, write, monkeypatch):
        monkeypatch.setitem(formats.DEFAULTS, 1, {"train.clip": 2.5, "teacher.recipe": "x.yaml"})
        found = load_saved(write(saved(format=None, teacher=None)))
        assert found.train.clip == 1.0 and found.teacher is None


SETTINGS = {
    "run": {"name": "tuned", "seed": 3, "save_minutes": 5.0, "grace": 10.0, "save_every": 7},
    "data": {
        "source": "files",
        "train": ["a.tsv", "b.tsv"],
        "dev": "dev.tsv",
        "root": "somewhere",
        "cache": "there",
        "max_file": "2GiB",
        "labels": ["nein", "ja"],
    },
    "teacher": {"path": "t", "config": {"hidden_dropout_prob": 1e-5}},
    "student": {
        "from_teacher": [1, 3],
        "deepspeed": {"comet": {"enabled": False, "api_key": "s3cr3t"}},
        "freeze": ["*embeddings*"],
    },
    "terms": {
        "task": {"weight": 0.5},
        "attention": {"layers": [[1, 2], [2, 4]]},
        "soft_label": {"temperature": 4.0},
    },
    "stages": [
        {
            "name": "first",
            "terms": {"soft_label": None, "hidden": {"layers": "skip", "final_norm": "before"}},
        },
        {
            "name": "second",
            "share": 2.0,
            "terms": {"smooth": {"final_norm": "before"}},
            "learning_rate": 1e-5,
        },
    ],
}


class TestNamesOfTeachers:
    def test_the_text_is_that_of_format_1(self):
        """The text must be the first version's, byte for byte, or existing teachers would be trained again."""
        recorded = Path(__file__).with_name("identity_format_1.yaml").read_text(encoding="utf-8")
        assert formats.teacher_identity(make_config(SETTINGS)) == recorded

    def test_a_new_setting_counts_once_it_is_used(self, monkeypatch):
        """Assume that train.clip, student.freeze, terms.smooth and the stages' learning rate came after format 1."""
        new = {"train.clip", "student.freeze", "terms.smooth", "stages.terms.smooth", "stages.learning_rate"}
        monkeypatch.setattr(formats, "FORMAT_1", formats.FORMAT_1 - new)
        found = yaml.safe_load(formats.teacher_identity(make_config(SETTINGS)))
        assert "clip" not in found["train"] and found["student"]["freeze"] == ["*embeddings*"]
        assert "smooth" not in found["terms"]
        assert [stage.get("learning_rate") for stage in found["stages"]] == [None, 1e-5]
        assert ["smooth" in stage["terms"] for stage in found["stages"]] == [False, True]
        assert "learning_rate" not in found["stages"][0]
