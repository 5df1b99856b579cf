"""What is said before a run of data that its teacher does not know."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dsdistill.config import UserError, load
from dsdistill.config.checks import check_ranks
from dsdistill.config.load import make_config, recipe_of
from dsdistill.engine import checkpoint
from dsdistill.engine.prepare import Prepared, prepare, tell_other_data
from tests.conftest import merge
from tests.engine.test_resume import make_checkpoint

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
    assert line == f"{recipe} trains the teacher on other data: data.subset: cola here, sst2 there"
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
        prepare(make_config(settings), 1)
    (line,) = (message for message in caplog.messages if "other data" in message)
    assert "train.tsv here" in line and "dev.tsv there" in line


class TestHeads:
    def masked(self, settings: dict, tokenizer_dir: Path, **changes) -> Prepared:
        data = settings["data"] | {"label": None, "tokenizer": str(tokenizer_dir)}
        student = settings["student"] | {"new_head": True}  # the same holds for a classifier's folder
        settings |= {"task": "masked_lm", "data": data, "student": student}
        settings |= {"terms": {"task": {}, "hidden": {}}} | changes
        return prepare(make_config(settings), world_size=1)

    def test_of_a_classifier_says_nothing_of_words(self, settings, tokenizer_dir):
        prepared = self.masked(settings, tokenizer_dir)
        assert not prepared.judged and set(prepared.evaluation.terms) == {"task"}
        settings["data"]["sampler"] = "entropy"
        with pytest.raises(
            UserError, match=r"data.sampler: got entropy with a teacher whose head is not trained"
        ):
            self.masked(settings, tokenizer_dir)

    def test_of_words(self, mapping, tokenizer_dir):
        prepared = self.masked(mapping, tokenizer_dir, student=mapping["student"] | {"domain": None})
        assert prepared.judged and set(prepared.evaluation.terms) == {"task", "soft_label"}

    def test_of_a_discriminator(self, mapping, tokenizer_dir):
        """It tells replaced tokens from others and predicts no words, although it was made for pre-training."""
        path = Path(mapping["teacher"]["path"], "config.json")
        path.write_text(path.read_text().replace("BertForMaskedLM", "ElectraForPreTraining"))
        assert not self.masked(
            mapping, tokenizer_dir, student=mapping["student"] | {"domain": None}, evaluation={}
        ).judged


@pytest.mark.parametrize("evaluation", [{"rcs": 2}, {"structure": True}], ids=["rcs", "structure"])
def test_states_that_evaluation_alone_reads_are_probed(settings, tokenizer_dir, evaluation):
    """ALBERT's layers are one module that is called again and again, so there is nothing to hook."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    model = {"config": {"model_type": "albert", "vocab_size": 64, "embedding_size": 16} | sizes}
    settings |= {"teacher": model, "student": model, "terms": {"task": {}, "soft_label": {}}}
    settings["data"]["tokenizer"] = str(tokenizer_dir)
    prepare(make_config(settings), world_size=1)
    with pytest.raises(UserError, match="albert"):
        prepare(make_config(settings | {"evaluation": evaluation}), world_size=1)


class TestOneExampleAtOnce:
    """A term that relates examples has no meaning for a single example."""

    def check(self, settings: dict, **term) -> None:
        settings["terms"] = {"task": {}, "domain": term}
        config = make_config(settings)
        check_ranks(config.train, config.run_stages, config.data.sampler, 1)

    def test_is_refused_where_sequences_are_related(self, mapping):
        mapping["train"] |= {"micro_batch_size": 1}
        with pytest.raises(UserError, match=r"terms.domain: got one example at a time"):
            self.check(mapping)
        self.check(mapping, sequences=0.0)

    def test_resumes_with_as_many_alone(self, mapping, tmp_path):
        make_checkpoint(tmp_path, 1)
        mapping["train"] |= {"micro_batch_size": 4}
        for sequences, refusal in (
            (1.0, pytest.raises(UserError, match=r"terms.domain compares")),
            (0.0, nullcontext()),
        ):
            mapping["terms"] = {"task": {}, "domain": {"sequences": sequences}}
            with refusal:
                checkpoint.check(str(tmp_path), make_config(mapping), world_size=1)


def test_a_teacher_whose_classes_have_no_names(settings, tmp_path):
    """Nobody can guess its order; if the data's labels are numbers, they are the teacher's classes."""
    made = AutoModelForSequenceClassification.from_pretrained(settings["teacher"]["path"])
    made.config.id2label = {i: f"LABEL_{i}" for i in range(3)}
    made.save_pretrained(tmp_path / "unnamed")
    AutoTokenizer.from_pretrained(settings["teacher"]["path"]).save_pretrained(tmp_path / "unnamed")
    given = merge(settings, {"teacher.path": str(tmp_path / "unnamed")})
    with pytest.raises(
        UserError, match=r"^teacher: got a teacher whose classes have no names, .*data\.labels with"
    ):
        prepare(make_config(given), 1)
    named = prepare(make_config(merge(given, {"data.labels": ["c", "a", "b"]})), 1)
    assert named.data.labels == ("c", "a", "b")
    for name in ("train", "dev"):
        text = Path(settings["data"][name]).read_text(encoding="utf-8")
        numbers = re.sub("\t([abc])\t", lambda match: f"\t{'abc'.index(match[1])}\t", text)
        (tmp_path / f"{name}.tsv").write_text(numbers, encoding="utf-8")
    files = {f"data.{name}": str(tmp_path / f"{name}.tsv") for name in ("train", "dev")}
    assert prepare(make_config(merge(given, files)), 1).data.labels == ("0", "1", "2")


def test_the_class_of_f1_is_one_of_two(settings):
    with pytest.raises(UserError, match=r"positive_class: got a with 3 classes, expected two classes"):
        prepare(make_config(merge(settings, {"evaluation.positive_class": "a"})), 1)


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ([1, 2.5, 0], (1, 2.5, 0)),
        ({"c": 3}, (1, 1, 3)),
        ({"b": 0, "a": 0.5, "c": 2}, (0.5, 0, 2)),
        (None, ()),
    ],
    ids=str,
)
def test_weights_of_classes(settings, given, weights):
    train = settings["train"] | {"class_weights": given, "label_smoothing": 0.1}
    prepared = prepare(make_config(settings | {"train": train}), 1)
    assert prepared.pair.class_weights == weights and prepared.pair.smoothing == 0.1
    assert prepared.objectives[0].terms["task"].pair.smoothing == 0.1
    assert prepared.evaluation.terms["task"].pair.smoothing == 0  # perplexity has no smoothing


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 2], "train.class_weights: got 2 weights, expected one for each of the classes a, b, c"),
        ({"d": 1}, "train.class_weights.d: got no class, expected one of the classes a, b, c"),
        ([0, 0, 0], "train.class_weights: got only weights of 0, expected at least one above 0"),
    ],
)
def test_weights_of_other_classes(settings, given, message):
    with pytest.raises(UserError) as caught:
        prepare(make_config(merge(settings, {"train.class_weights": given})), 1)
    assert str(caught.value) == message
