"""DistillTrainer is the loss of a Distiller in the Trainer of transformers, on one rank and on two."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dsdistill import Distiller, UserError
from dsdistill.integrations import DistillTrainer
from dsdistill.integrations.distill_trainer import MOVING, PROJECTORS
from tests.distiller import loops, trainers
from tests.distiller.test_distiller import classifiers
from tests.engine.launch import launch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train in every way on two ranks; return the folder of the results."""
    out = tmp_path_factory.mktemp("trainers")
    loops.teacher().save_pretrained(out / "teacher")
    loops.student().save_pretrained(out / "student")
    done = launch(trainers.__file__, out, *trainers.WAYS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out


@pytest.fixture(scope="module")
def truth():
    """Return what one process trains to by a Distiller's own recipe, and its losses by step."""
    return {"": trainers.expected(loops.TERMS), "moving": trainers.expected(loops.MOVING)}


def scores_of(weights: dict, state: dict, terms: dict, rows: list[dict]) -> dict[str, float]:
    """Return each term's value over rows, and KL(teacher‖student), by a Distiller that takes them as one batch.

    state: layer weights that moved.
    """
    made = loops.distiller(terms=terms)
    made.objective.restore(state)
    made.load_state_dict(weights, strict=False)
    batch = trainers.collate(rows)
    with torch.no_grad():
        found = {name: float(value.raw) for name, value in made.eval()(batch).terms.items()}
        counts = (batch["labels"][:, 1:] != -100) & (batch["attention_mask"][:, :-1] == 1)
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        mine, theirs = (
            model(**inputs, position_ids=positions).logits[:, :-1].double().log_softmax(-1)
            for model in (made.model, loops.teacher())
        )
        found["kl"] = float(((theirs.exp() * (theirs - mine)).sum(-1)[counts]).mean())
    return found


@pytest.mark.parametrize("way", trainers.WAYS)
def test_ranks_train_to_the_same(trained, truth, way):
    """Compare weights, each term of each step, and the scores of seven rows, one of which two ranks repeat."""
    terms = loops.MOVING if way.endswith("moving") else loops.TERMS
    weights, told = truth["moving" if way.endswith("moving") else ""]
    found = torch.load(trained / f"{way}.pt")
    assert found["weights"].keys() == weights.keys() - {"means"}
    for name, value in found["weights"].items():
        torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-7)
    for mine, step in zip(found["log"], told, strict=False):
        assert {name: mine[name] for name in step} == pytest.approx(step, rel=1e-5)
    expected = scores_of(weights, found["state"], terms, trainers.examples(7))
    assert {name: found["scores"][f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(trained / way / "saved", dtype=torch.float32)
    assert not (trained / way / "saved" / PROJECTORS).exists()
    for name, value in saved.named_parameters():
        torch.testing.assert_close(value.data, weights[f"body.model.{name}"], rtol=1e-5, atol=1e-7)


def test_one_rank_accumulates(tmp_path, truth):
    weights, told = truth["moving"]
    made = trainers.trainer(tmp_path, loops.MOVING)
    made.train()
    found = loops.weights(made.distiller)
    for name, value in found.items():
        torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-7)
    for mine, step in zip(made.state.log_history, told, strict=False):
        assert {name: mine[name] for name in step} == pytest.approx(step, rel=1e-5)


def test_steps_between_two_logs_are_averaged(tmp_path, truth):
    made = trainers.trainer(tmp_path, logging_steps=3)
    made.train()
    mean = {name: sum(step[name] for step in truth[""][1]) / 3 for name in [*loops.TERMS, "loss"]}
    assert {name: made.state.log_history[0][name] for name in mean} == pytest.approx(mean, rel=1e-5)


def test_resumes(tmp_path, truth):
    """Projectors and layer weights come back; a resumed run ends where an uninterrupted run does."""
    first = trainers.trainer(tmp_path, loops.MOVING, save_strategy="steps", save_steps=2)
    first.train()
    folder = tmp_path / "checkpoint-2"
    assert {PROJECTORS, MOVING, "model.safetensors"} <= {path.name for path in folder.iterdir()}
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 24
    for spoilt in ("nothing", "projectors", "weights"):
        second = trainers.trainer(tmp_path, loops.MOVING)
        if spoilt == "weights":  # the layer weights of a run that forgot them
            state = json.loads((folder / MOVING).read_text())
            state["pairwise"]["mean"] = [5.0 * value for value in state["pairwise"]["mean"]]
            (folder / MOVING).write_text(json.dumps(state))
        if spoilt == "projectors":
            second._load_from_checkpoint = lambda *given: None
        second.train(resume_from_checkpoint=str(folder))
        assert second.state.global_step == trainers.STEPS
        off = max((v - truth["moving"][0][n]).abs().max() for n, v in loops.weights(second.distiller).items())
        means = second.distiller.objective.terms["pairwise"].weighting.mean
        same = off < 1e-6 and means == pytest.approx(truth["moving"][0]["means"].tolist(), rel=1e-5)
        assert same == (spoilt == "nothing"), (spoilt, off, means)


def test_checkpoints_of_others_are_refused(tmp_path):
    trainers.trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    folder = tmp_path / "checkpoint-3"
    (folder / PROJECTORS).rename(folder / "elsewhere")
    with pytest.raises(UserError, match=f"got no {PROJECTORS}, expected a checkpoint of a DistillTrainer"):
        trainers.trainer(tmp_path).train(resume_from_checkpoint=str(folder))
    (folder / "elsewhere").rename(folder / PROJECTORS)
    other = trainers.trainer(tmp_path, {"hidden": {"layers": "last"}})
    with pytest.raises(UserError, match=r"got projectors terms\.hidden.*expected those of these terms"):
        other.train(resume_from_checkpoint=str(folder))


def test_the_best_student_comes_back(tmp_path):
    """At a large learning rate scores get worse; at the end the best checkpoint is loaded."""
    made = trainers.trainer(
        tmp_path,
        eval_dataset=trainers.examples(4),
        learning_rate=30.0,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="kl",
        greater_is_better=False,
    )
    made.train()
    scores = [row["eval_kl"] for row in made.state.log_history if "eval_kl" in row]
    assert len(scores) == 3 and min(scores) < scores[-1]
    assert made.evaluate()["eval_kl"] == pytest.approx(min(scores), rel=1e-5)


class Rows(torch.utils.data.Dataset):
    """Hold random rows for a classifier of three classes."""

    def __init__(self, count: int, labelled: bool = True):
        generator = torch.Generator().manual_seed(count)
        self.rows = []
        for index in range(count):
            ids = torch.randint(2, 60, (9,), generator=generator)
            self.rows.append({"input_ids": ids, "attention_mask": torch.ones(9, dtype=torch.long)})
            if labelled:
                self.rows[-1]["labels"] = index % 3

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


CLASSES = {"task": {}, "soft_label": {}, "hidden": {}, "attention": {}}


def classifier(tmp_path, cls=DistillTrainer, **given):
    settings = {
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 2,
    }
    settings |= {"per_device_eval_batch_size": 4, "logging_steps": 1}
    names = ("eval_dataset", "callbacks", "compute_metrics", "compute_loss_func")
    extra = {name: given.pop(name) for name in names if name in given}
    extra |= {} if cls is Trainer else {"terms": given.pop("terms", CLASSES)}
    teacher, student = classifiers()
    extra |= {} if cls is Trainer else {"teacher": teacher}
    args = TrainingArguments(str(tmp_path), **settings | given)
    return cls(student, args, train_dataset=Rows(16), **extra)


def test_evaluates_as_a_trainer_does(tmp_path):
    """Loss, logits and compute_metrics are those of the student in a plain Trainer."""

    def accuracy(found):
        return {"right": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    plain, ours = (
        classifier(tmp_path, cls, eval_dataset=Rows(6), compute_metrics=accuracy)
        for cls in (Trainer, DistillTrainer)
    )
    expected, found = plain.evaluate(), ours.evaluate()
    for name in ("eval_loss", "eval_right"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    assert {f"eval_{name}" for name in [*CLASSES, "kl"]} <= found.keys()
    truth, other = plain.predict(Rows(6)), ours.predict(Rows(6))
    assert torch.equal(torch.tensor(truth.predictions), torch.tensor(other.predictions))
    assert other.metrics["test_kl"] == pytest.approx(found["eval_kl"]) and other.metrics["test_kl"] > 0


def test_sets_without_labels(tmp_path):
    """Terms that need no labels are measured; if one term needs labels, evaluation reports no term."""
    unlabelled = {name: value for name, value in CLASSES.items() if name != "task"}
    found = classifier(tmp_path, terms=unlabelled).evaluate(Rows(6, labelled=False))
    assert {f"eval_{name}" for name in [*unlabelled, "kl"]} <= found.keys() and "eval_loss" not in found
    assert "eval_hidden" not in classifier(tmp_path).evaluate(Rows(6, labelled=False))


class Told(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


SETTINGS = {
    "bf16": True,
    "neftune_noise_alpha": 5.0,
    "gradient_checkpointing": True,
    "torch_compile_backend": "eager",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_trainer(tmp_path, name):
    told, plain = Told(), Told()
    classifier(tmp_path, callbacks=[plain]).train()
    made = classifier(tmp_path, callbacks=[told], **{name: SETTINGS[name]})
    made.train()
    assert set(CLASSES) < told.logs[0].keys()
    near = {"bf16": 0.02, "neftune_noise_alpha": 0.5}.get(name, 1e-5)
    assert told.logs[0]["loss"] == pytest.approx(plain.logs[0]["loss"], rel=near)
    if near > 1e-5:
        assert told.logs[0]["loss"] != plain.logs[0]["loss"]
    made.save_model(str(tmp_path / "saved"))
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert all(
        torch.equal(p, q) for p, q in zip(saved.parameters(), made.distiller.model.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"compute_loss_func": lambda *given: 0},
            "DistillTrainer: compute_loss_func: got one, expected terms",
        ),
        ({"label_smoothing_factor": 0.1}, "args.label_smoothing_factor: got 0.1, expected 0"),
        ({"terms": {"hiden": {}}}, "terms.hiden"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "got gradient checkpointing with use_reentrant=True",
        ),
    ],
)
def test_refuses(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        classifier(tmp_path, **given).train()


def test_other_columns_are_left_out(tmp_path):
    """A data set of the datasets library keeps the columns that the student, the terms and TRL's collator read."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([row | {"title": "x", "seq_lengths": [9]} for row in Rows(4).rows])
    kept = classifier(tmp_path)._remove_unused_columns(rows).column_names
    assert sorted(kept) == ["attention_mask", "input_ids", "labels", "seq_lengths"]


def test_the_trainer_distiller_answers_as_its_student(tmp_path):
    made = classifier(tmp_path)
    assert isinstance(made.model, Distiller) and made.model.config is made.distiller.model.config
    assert made.model.get_input_embeddings() is made.distiller.model.get_input_embeddings()
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = made.model.no_such_thing


TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}A {% generation %}{{ message.content }} E"
    "{% endgeneration %}{% else %}U {{ message.content }} E {% endif %}{% endfor %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "U", "A", "E", *(f"w{index}" for index in range(50))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="E", chat_template=TEMPLATE
    )


def chats(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(count):
        texts = [
            " ".join(f"w{word}" for word in torch.randint(50, (length,), generator=generator).tolist())
            for length in torch.randint(1, 7, (2,), generator=generator).tolist()
        ]
        made.append([{"role": r, "content": t} for r, t in zip(("user", "assistant"), texts, strict=True)])
    return made


@pytest.mark.parametrize("padding_free", [False, True])
def test_chats_that_trl_prepares(tmp_path, padding_free):
    """TRL's data set and collator work unchanged: only answers have labels, and a row's documents stay apart."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    settings = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "learning_rate": 0.01,
    }
    conversations = chats(12)
    prepared = trl.SFTTrainer(
        model=loops.student(),
        args=trl.SFTConfig(
            str(tmp_path), assistant_only_loss=True, padding_free=padding_free, max_length=None, **settings
        ),
        train_dataset=datasets.Dataset.from_list([{"messages": chat} for chat in conversations]),
        processing_class=chat_tokenizer(),
    )
    terms = {"task": {}, "soft_label": {"temperature": 1.0}, "hidden": {}}
    made = trainers.InOrder(
        loops.student(),
        TrainingArguments(str(tmp_path), **settings),
        teacher=loops.teacher(),
        terms=terms,
        train_dataset=prepared.train_dataset,
        data_collator=prepared.data_collator,
    )
    made.train()
    # By hand: U … E A … E; the answer and its end are predicted.
    tokenizer, rows = chat_tokenizer(), []
    for user, assistant in conversations[:6]:
        prompt = tokenizer.encode(f"U {user['content']} E A", add_special_tokens=False)
        answer = tokenizer.encode(f"{assistant['content']} E", add_special_tokens=False)
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    torch.manual_seed(0)
    plain = Distiller(
        loops.teacher(), loops.student(), {name: terms[name] for name in ("task", "soft_label")}
    )
    with torch.no_grad():
        expected = plain.eval()(trainers.collate(rows)).terms
    for name, value in expected.items():
        assert made.state.log_history[0][name] == pytest.approx(float(value.raw), rel=1e-5)
