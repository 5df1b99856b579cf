"""YAML and key=value become a Config: merging, types, rules between fields, messages that name the place."""

import pytest
import yaml

from dsdistill.config import Config, UserError, dump, load, load_saved, schema
from dsdistill.config.checks import DEEPSPEED_KEYS, OWNED

MINIMAL = {"teacher": {"path": "t"}, "student": {"path": "s"}, "terms": {"task": {}, "hidden": {}}}


@pytest.fixture
def write(tmp_path):
    def write(settings, name="config.yaml"):
        path = tmp_path / name
        path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings), encoding="utf-8")
        return str(path)

    return write


def refusal(sources) -> str:
    with pytest.raises(UserError) as caught:
        load(sources)
    assert "\n" not in str(caught.value) and "pydantic" not in str(caught.value)
    return str(caught.value)


class TestLoading:
    def test_files_and_overrides_merge_from_left_to_right(self, write):
        first = write(MINIMAL | {"train": {"steps": 1, "batch_size": 16}}, "first.yaml")
        second = write({"train": {"steps": 2}, "student": {"zero_stage": 3}}, "second.yaml")
        config = load([first, second, "train.steps=3", "terms.hidden.weight=0.5", "terms.soft_label={}"])
        assert (config.train.steps, config.train.batch_size) == (3, 16)
        assert (config.student.path, config.student.zero_stage) == ("s", 3)
        assert list(config.terms.named()) == ["task", "soft_label", "hidden"]
        assert load([first, "train.steps=3", second]).train.steps == 2
        assert load([second, first]).train.steps == 1

    def test_into_a_list_by_number(self, write):
        path = write(MINIMAL | {"stages": [{"name": "a", "share": 1}, {"name": "b", "share": 1}]})
        config = load([path, "stages.1.learning_rate=0.5", "stages[0].terms.hidden={weight: 3}"])
        assert [stage.learning_rate for stage in config.stages] == [None, 0.5]
        assert [stage.name for stage in config.stages] == ["a", "b"]
        assert config.stages[0].terms.hidden.weight == 3

    @pytest.mark.parametrize(
        "change", ["stages.7.share=2", "stages.x=2", "stages={a: 1}", "stages.0=[", {"stages": {"a": 1}}]
    )
    def test_what_does_not_merge(self, write, change):
        path = write(MINIMAL | {"stages": [{"name": "a", "share": 1}]})
        change = change if isinstance(change, str) else write(change, "second.yaml")
        assert refusal([path, change]).startswith(f"{change}: got ")

    def test_a_list_replaces_a_list(self, write):
        path = write(MINIMAL | {"student": {"from_teacher": [1, 2, 3]}})
        assert load([path, "student.from_teacher=[4]"]).student.from_teacher == (4,)

    def test_a_file_replaces_whole_sections(self, write):
        first = write(MINIMAL | {"train": {"steps": 5}, "stages": [{"name": "a"}]}, "first.yaml")
        second = write({"replace": ["terms", "stages"], "terms": {"soft_label": {}}}, "second.yaml")
        config = load([first, second, "terms.pairwise={}"])
        assert list(config.terms.named()) == ["soft_label", "pairwise"] and config.stages == ()
        assert config.train.steps == 5
        assert list(load([second, first]).terms.named()) == ["task", "soft_label", "hidden"]

    @pytest.mark.parametrize("names", ["terms", ["term"], [["terms"]], {"terms": {}}, ["terms", 1], None])
    def test_what_cannot_be_replaced(self, write, names):
        path = write(MINIMAL | {"replace": names})
        assert refusal([path]).startswith(f"{path}: replace: got {names}, expected a list of task, run, ")

    def test_null_takes_a_term_away(self, write):
        assert list(load([write(MINIMAL), "terms.hidden=null"]).terms.named()) == ["task"]
        assert list(load([write(MINIMAL), "terms.hidden.weight=0"]).terms.named()) == ["task"]

    @pytest.mark.parametrize(
        ("text", "value"), [("1e-5", 1e-5), ("1E-5", 1e-5), ("0.00001", 1e-5), ("1", 1.0), ("2.5e+1", 25.0)]
    )
    def test_numbers(self, write, text, value):
        """YAML 1.1 reads 1e-5 as a text."""
        assert load([write(MINIMAL), f"train.learning_rate={text}"]).train.learning_rate == value
        path = write(yaml.safe_dump(MINIMAL) + f"train:\n  learning_rate: {text}\n")
        assert load([path]).train.learning_rate == value

    def test_a_file_whose_name_holds_an_equals_sign(self, write):
        assert load([write(MINIMAL, "a=b.yaml")]).student.path == "s"

    def test_interpolation(self, write):
        path = write(MINIMAL | {"run": {"name": "x", "dir": "out/${run.name}"}})
        assert load([path]).run_dir == "out/x"
        assert "interpolations that resolve" in refusal([path, "run.dir=${run.nmae}"])

    def test_frozen(self, write):
        config = load([write(MINIMAL)])
        with pytest.raises(ValueError, match="frozen"):
            config.train.steps = 3

    def test_round_trip(self, write):
        settings = MINIMAL | {
            "student": {
                "from_teacher": [2, 4],
                "config": {"hidden_dropout_prob": 1e-5},
                "deepspeed": {"dump_state": False},
            },
            "terms": {"attention": {"layers": [[1, 2], [2, 4]]}, "task": {"weight": 1e-5}},
            "data": {"text": ["a", "b"], "labels": ["nein", "ja"]},
        }
        config = load([write(settings)])
        again = load([write(dump(config), "again.yaml")])
        assert again == config and dump(again) == dump(config)
        assert again.terms.attention.layers == ((1, 2), (2, 4)) and again.data.text == ("a", "b")

    @pytest.mark.parametrize("loader", [lambda path: load([path]), load_saved], ids=["load", "load_saved"])
    def test_any_text_comes_back(self, write, loader):
        """This includes texts that only some YAML readers take for numbers, and texts that OmegaConf would fill in."""
        texts = "12e4567 1e1 -1 +.5 1:20 0o7 .inf NaN null ~ yes ??? ${a} \\${a} a${b}\\ $ ${ - # << *x &y !z % é ="
        labels = (
            *texts.split(),
            "a: b",
            " lead",
            "trail ",
            "two\nlines",
            "next\x85line",
            "1\x852",
            "\\\\${a}",
            "'",
            '"',
        )
        config = load([write(MINIMAL)])
        changes = {"data": {"labels": labels}, "run": {"name": "12e4567"}}
        config = config.model_copy(
            update={name: getattr(config, name).model_copy(update=new) for name, new in changes.items()}
        )
        again = loader(write(dump(config), "again.yaml"))
        assert again == config and again.run.name == "12e4567"

    def test_what_was_saved_need_not_keep_the_rules_between_fields(self, write):
        path = write(MINIMAL | {"data": {"sampler": "hard_negative"}, "terms": {"task": {}}})
        assert "got hard_negative without" in refusal([path])
        assert load_saved(path).data.sampler == "hard_negative"
        with pytest.raises(UserError, match="unknown key"):
            load_saved(write(MINIMAL | {"data": {"smapler": "uniform"}}))


class TestMessages:
    @pytest.mark.parametrize(
        ("override", "parts"),
        [
            ("train.stesp=3", ["train.stesp", "unknown key with value 3", "did you mean steps?"]),
            ("terms.atention={}", ["terms.atention", "did you mean attention?"]),
            ("terms.hidden.weigth=2", ["terms.hidden.weigth", "did you mean weight?"]),
            (
                "zzz=3",
                ["zzz", "unknown key", "task, run, data, teacher, student, terms, stages, train, evaluation"],
            ),
            ("train.steps=many", ["train.steps", "'many'", "integer"]),
            ("train.steps=2.5", ["train.steps", "2.5", "integer"]),
            ("train.steps=0", ["train.steps", "0", "greater than or equal to 1"]),
            ("train.steps=true", ["train.steps", "True", "integer"]),
            ("run.baseline=1", ["run.baseline", "1", "boolean"]),
            ("run.name=a/b", ["run.name", "'a/b'", "pattern"]),
            ("train.learning_rate=0", ["train.learning_rate", "greater than 0"]),
            ("train.learning_rate=.nan", ["train.learning_rate", "nan"]),
            ("train.learning_rate=.inf", ["train.learning_rate", "inf"]),
            ("train.warmup=1", ["train.warmup", "less than 1"]),
            ("terms.soft_label.temperature=0", ["terms.soft_label.temperature", "greater than 0"]),
            ("terms.soft_label.temperature=-1", ["terms.soft_label.temperature", "-1"]),
            ("terms.soft_label.divergence=kl", ["terms.soft_label.divergence", "'kl'", "'forward_kl'"]),
            ("terms.hidden.layers=every", ["terms.hidden.layers", "'every'", "uniform, skip, last"]),
            ("terms.hidden.layers=[[0,1]]", ["terms.hidden.layers", "counted from 1"]),
            ("terms.hidden.layers=[]", ["terms.hidden.layers", "counted from 1"]),
            ("terms.hidden.layers=[[1,2,3]]", ["terms.hidden.layers", "pairs"]),
            ("student.zero_stage=4", ["student.zero_stage", "4", "1, 2 or 3"]),
            ("teacher.zero_stage=2", ["teacher.zero_stage", "2", "0 or 3"]),
            ("data.text=text", ["data.text", "'text'", "tuple"]),
            ("data.text=[a,b,c]", ["data.text", "2 items"]),
            ("task=translation", ["task", "'translation'", "'classification'"]),
            ("train=5", ["train", "5"]),
            ("student=null", ["student", "None"]),
        ],
    )
    def test_one_line_with_place_got_and_expected(self, write, override, parts):
        path = write(MINIMAL)
        message = refusal([path, override])
        assert message.startswith(f"{path}: {parts[0]}: got ") and ", expected " in message
        for part in parts[1:]:
            assert part in message

    def test_a_missing_section(self, write):
        assert "student: got nothing, expected a value" in refusal([write({"terms": {"task": {}}})])

    @pytest.mark.parametrize(
        ("text", "part"),
        [
            ("a: [1", "(line "),
            ("- 1\n- 2\n", "expected a mapping of settings"),
            ("just words", "just words: got an unknown key"),
            ("3", "got "),
            (
                "studnet: {path: s}",
                "studnet: got an unknown key with value {'path': 's'}, expected a known key (did you mean student?)",
            ),
            ("student: {path: s}\nlearning-rate: 3", "learning-rate: got an unknown key"),
            ("train:\n\tsteps: 3\n", "(line 2)"),
            ("train: {steps: 1, steps: 2}", "steps"),
        ],
    )
    def test_yaml_that_cannot_be_read(self, write, text, part):
        path = write(text)
        message = refusal([path])
        assert message.startswith(path) and part in message

    def test_files(self, tmp_path):
        assert refusal(["nowhere.yaml"]) == "nowhere.yaml: got no such file, expected a YAML file"
        assert "no such file" in refusal([str(tmp_path)])
        (tmp_path / "latin.yaml").write_bytes(b"run: {name: caf\xe9}")
        assert "UTF-8" in refusal([str(tmp_path / "latin.yaml")])
        assert "a YAML file first" in refusal(["train.steps=3"])
        assert "a YAML file first" in refusal([])

    def test_an_empty_file_needs_a_student(self, write):
        assert "student: got nothing" in refusal([write("")])


class TestRulesBetweenFields:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["terms.task=null", "terms.hidden=null"], "terms: got no term with a weight above 0"),
            (["terms.task.weight=0", "terms.hidden.weight=0"], "terms: got no term"),
            (["teacher=null"], "terms.hidden: got no teacher"),
            (["teacher.path=null"], "teacher: got neither path, recipe nor config"),
            (["student.path=null"], "student: got neither path, config nor from_teacher"),
            (["student.from_teacher=[1]"], "student: got both path and from_teacher"),
            (
                ["teacher=null", "terms.hidden=null", "student.path=null", "student.from_teacher=[1]"],
                "student.from_teacher: got no teacher",
            ),
            (
                ["task=regression", "terms.soft_label={divergence: jsd}"],
                "terms.soft_label.divergence: got jsd with task regression",
            ),
            (
                ["train.batch_size=9", "train.micro_batch_size=4"],
                "train.batch_size: got 9, expected a multiple of",
            ),
            (
                ["student.deepspeed.fp16={}"],
                "student.deepspeed.fp16: got a key that dsdistill sets itself",
            ),
            (["teacher.deepspeed.optimizer={}"], "train.learning_rate and train.weight_decay instead"),
            (["student.deepspeed.zero_optimisation={}"], "did you mean zero_optimization?"),
            (["teacher.deepspeed.zero_optimization.stage=3"], "teacher.zero_stage instead"),
            (["student.deepspeed.zero_optimization=3"], "student.deepspeed.zero_optimization: got int"),
            (["teacher.recipe=x.yaml"], "teacher: got both path and recipe"),
            (
                ["teacher.zero_stage=0", "teacher.deepspeed.zero_optimization={}"],
                "teacher.deepspeed: got settings with teacher.zero_stage 0",
            ),
            (["teacher.zero_stage=0", "teacher.residency=tight"], "teacher.residency: got tight with"),
            (["teacher=null", "terms.hidden=null", "run.baseline=true"], "run.baseline: got true without a"),
            (["data.subset=sst2"], "data.subset: got sst2 with data.source docstrings"),
            (["data.subset=sst2", "data.source=files"], "data.subset: got sst2 with data.source files"),
            (["data.root=x"], "data.root: got x with data.source docstrings"),
            (
                ["student.domain.width=4", "terms.domain.layers=emd"],
                "terms.domain.layers: got emd, expected uniform, skip, last, or",
            ),
            (
                ["terms.hidden.layer_masses=shared"],
                "terms.hidden.layer_masses: got shared with layers: uniform, expected layers: emd beside it",
            ),
            (["evaluation.rcs=1"], "evaluation.rcs: got 1, expected 2 points or more"),
            (["teacher=null", "terms.hidden=null", "evaluation.rcs=3"], "evaluation.rcs: got 3 without a"),
            (
                ["train.distill_weight=0.5", "terms={task: {}}", "terms.hidden=null"],
                "train.distill_weight: got terms with only",
            ),
            (
                ["train.optimizer=sgd", "student.deepspeed.zero_optimization.offload_optimizer.device=cpu"],
                "train.optimizer: got sgd with offload_optimizer",
            ),
        ],
    )
    def test_contradictions(self, write, overrides, message):
        path = write(MINIMAL)
        found = refusal([path, *overrides])
        assert found.startswith(f"{path}: ") and message in found

    @pytest.mark.parametrize(
        "overrides",
        [
            ["terms.task=null"],
            ["teacher=null", "terms.hidden=null"],
            ["student.path=null", "student.from_teacher=[1]"],
            ["student.path=null", "student.config={model_type: bert}"],
            ["teacher.path=null", "teacher.recipe=x.yaml"],
            ["student.deepspeed.zero_optimization.offload_optimizer.device=cpu"],
            ["task=regression", "terms.soft_label={}"],
            ["teacher.zero_stage=0"],
            ["data.source=files", "data.root=x"],
            ["data.source=some/data", "data.root=x"],
            ["train.optimizer=sgd"],
            ["data.source=some/data", "data.subset=sst2"],
        ],
    )
    def test_what_is_allowed(self, write, overrides):
        assert isinstance(load([write(MINIMAL), *overrides]), Config)


SECTIONS = [
    value for value in vars(schema).values() if isinstance(value, type) and issubclass(value, schema.Section)
]


def test_every_field_says_what_it_means():
    """Fields that are a section of their own are described by its docstring."""
    silent = []
    for section in SECTIONS:
        for name, field in section.model_fields.items():
            types = [field.annotation, *getattr(field.annotation, "__args__", ())]
            described = any(
                isinstance(t, type) and issubclass(t, schema.Section) and t.__doc__ for t in types
            )
            if not field.description and not described:
                silent.append(f"{section.__name__}.{name}")
    assert not silent


def test_deepspeed_keys_are_those_it_reads():
    """DeepSpeed silently ignores top-level keys that it does not know, so ours must be exactly those it looks up."""
    config = pytest.importorskip("deepspeed.runtime.config")
    read = set()

    class Watched(dict):
        def get(self, key, default=None):
            return self.note(key) and super().get(key, default)

        def __getitem__(self, key):
            return self.note(key) and super().__getitem__(key)

        def __contains__(self, key):
            return self.note(key) and super().__contains__(key)

        def keys(self):
            return self  # some parts of DeepSpeed ask `key in settings.keys()`

        @staticmethod
        def note(key):
            read.add(key)
            return True

    config.DeepSpeedConfig(Watched(train_batch_size=1))
    assert len(read) > 50
    assert read == DEEPSPEED_KEYS | OWNED.keys()
    assert not DEEPSPEED_KEYS & OWNED.keys()
