"""A config may name modules, and these may add terms."""

import importlib
import sys

import pytest
import yaml
from pydantic import Field

from dsdistill.config import UserError, dump, load, load_saved
from dsdistill.config.added_terms import add_term
from dsdistill.config.load import make_config
from dsdistill.config.resume import check_same
from dsdistill.config.terms import Hidden, Task, Term, Terms

MINIMAL = {"teacher": {"path": "t"}, "student": {"path": "s"}, "terms": {"task": {}}}
PLUGIN = """
from pydantic import Field
from dsdistill.config.added_terms import add_term
from dsdistill.config.terms import Term

class Mine(Term):
    strength: float = Field(default=2.0, gt=0)

add_term("mine", Mine)
"""


pytestmark = pytest.mark.usefixtures("terms_of_before")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module into the current directory, which Python does not search; remove it again at the end."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    names = []

    def write(text: str, name: str) -> str:
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        importlib.invalidate_caches()
        names.append(name)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def write(tmp_path):
    def write(settings: dict) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return str(path)

    return write


def refusal(path: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load([path, *overrides])
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


class Sharp(Term):
    """Sharp holds the settings of a term without a teacher."""

    power: int = Field(default=2, ge=1)

    @property
    def needs_teacher(self) -> bool:
        return False


class TestPlugins:
    def test_one_that_adds_a_term(self, module, write, tmp_path):
        path = write(
            MINIMAL | {"plugins": [module(PLUGIN, "my_terms")], "terms": {"mine": {"strength": 3.0}}}
        )
        search = list(sys.path)
        config = load([path])
        assert sys.path == search
        assert config.plugins == ("my_terms",) and config.terms.named()["mine"].strength == 3.0
        saved = tmp_path / "saved.yaml"
        saved.write_text(dump(config), encoding="utf-8")
        assert load([str(saved)]) == load_saved(str(saved)) == config
        check_same(str(saved), config)
        with pytest.raises(UserError, match=r"terms\.mine\.strength: got 4\.0, expected 3\.0"):
            check_same(str(saved), load([path, "terms.mine.strength=4.0"]))

    def test_a_module_that_is_imported_once_more(self, module, write):
        path = write(MINIMAL | {"plugins": [module(PLUGIN, "my_terms")], "terms": {"mine": {}}})
        load([path])
        del sys.modules["my_terms"]
        assert type(load([path]).terms.mine) is sys.modules["my_terms"].Mine

    def test_the_current_directory_comes_last(self, module, write):
        """A file json.py beside the config must not hide Python's own module."""
        module("raise RuntimeError", "colorsys")
        load([write(MINIMAL | {"plugins": ["colorsys"]})])
        assert sys.modules["colorsys"].rgb_to_hls

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (
                ["no_such_module"],
                "plugins: got no_such_module (ModuleNotFoundError: No module named 'no_such_",
            ),
            (["a/b.py"], "plugins: got 'a/b.py', expected a dotted name"),
            ([""], "plugins: got '', expected a dotted name"),
            (["os", ".os"], "plugins: got '.os', expected a dotted name"),
            (["colorsys.x"], "plugins: got colorsys.x (ModuleNotFoundError: "),
            ([3], "plugins.0: got 3, expected string"),
            ("os", "plugins: got 'os', expected tuple"),
            ({"a": 1}, "plugins: got {'a': 1}, expected tuple"),
        ],
    )
    def test_what_is_no_module(self, write, names, message):
        assert refusal(write(MINIMAL | {"plugins": names})).startswith(message)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("import", "plugins: got broken (SyntaxError: "),
            (
                "1 / 0",
                "plugins: got broken (ZeroDivisionError: division by zero), expected a module that can",
            ),
            (
                "raise SystemExit(3)",
                "plugins: got broken (SystemExit: 3), expected a module that can be imported",
            ),
            ("raise ValueError('two\\nlines')", "plugins: got broken (ValueError: two lines), expected"),
            (
                PLUGIN.replace('"mine"', '"hidden"'),
                "plugins: broken: register_term: name: got hidden, which is dsd",
            ),
        ],
    )
    def test_a_module_that_breaks(self, module, write, text, message):
        path = write(MINIMAL | {"plugins": [module(text, "broken")]})
        assert refusal(path).startswith(message)


class TestAddedTerms:
    def test_it_is_as_any_other(self, write):
        add_term("sharp", Sharp)
        path = write(MINIMAL | {"terms": {"task": {}, "sharp": {"power": 3}}})
        assert load([path]).terms.sharp == Sharp(power=3)
        assert list(load([path]).terms.named()) == ["task", "sharp"]
        assert list(load([path, "terms.sharp.weight=0"]).terms.named()) == ["task"]
        assert "sharp: null" in dump(load([path, "terms.sharp=null"]))
        assert refusal(path, "terms.sharp.powr=2").endswith("(did you mean power?)")
        assert refusal(path, "terms.shrap={}").endswith("(did you mean sharp?)")
        assert (
            refusal(path, "terms.sharp.power=0")
            == "terms.sharp.power: got 0, expected greater than or equal to 1"
        )

    def test_whether_it_needs_a_teacher(self, write):
        add_term("sharp", Sharp)
        add_term("near", type("Near", (Term,), {"__module__": __name__}))
        path = write(MINIMAL | {"teacher": None, "terms": {"sharp": {}}})
        assert list(load([path]).terms.named()) == ["sharp"]
        assert refusal(path, "terms.near={}").startswith("terms.near: got no teacher")

    def test_in_stages(self, write):
        add_term("sharp", Sharp)
        stages = [{"name": "a", "terms": {"sharp": None}}, {"name": "b", "terms": {"sharp": {"weight": 0.5}}}]
        path = write(MINIMAL | {"terms": {"task": {}, "sharp": {"power": 3}}, "stages": stages})
        first, second = load([path, "stages.1.terms.sharp.power=4"]).run_stages
        assert first.terms.sharp is None and second.terms.sharp == Sharp(power=4, weight=0.5)
        assert load([path]).stages[1].terms.sharp.power == 3

    def test_configs_without_it_are_as_they_were(self):
        before = dump(
            make_config({"student": {"path": "s"}, "stages": [{"name": "a", "terms": {"task": {}}}]})
        )
        add_term("sharp", Sharp)
        config = make_config({"student": {"path": "s"}, "stages": [{"name": "a", "terms": {"task": {}}}]})
        assert config.terms.sharp is None and list(config.terms.named()) == ["task"]
        assert dump(config).replace("    sharp: null\n", "").replace("  sharp: null\n", "") == before

    def test_again(self):
        add_term("sharp", Sharp)
        add_term("sharp", Sharp)
        add_term("hidden", Hidden)
        with pytest.raises(
            UserError, match=r"register_term: name: got sharp, which is .*Sharp, expected a name that no"
        ):
            add_term("sharp", Task)

    @pytest.mark.parametrize("name", ["a-b", "3", "", "class", "_mine", "a.b", 5])
    def test_a_name_that_is_no_key(self, name):
        with pytest.raises(UserError, match=r"register_term: name: got .*, expected an identifier"):
            add_term(name, Sharp)

    @pytest.mark.parametrize("name", ["named", "model_dump", "copy"])
    def test_a_name_of_something_else(self, name):
        with pytest.raises(
            UserError, match=f"register_term: name: got {name}, which the class Terms uses already"
        ):
            add_term(name, Sharp)

    @pytest.mark.parametrize("settings", [dict, Terms, Sharp(), "Sharp", None])
    def test_settings_that_are_none(self, settings):
        with pytest.raises(
            UserError, match=r"register_term: settings of mine: got .*, expected a subclass of"
        ):
            add_term("mine", settings)
