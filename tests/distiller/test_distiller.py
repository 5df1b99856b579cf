"""The loss of a batch is compared with definitions, and the models before and after with each other."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertLMHeadModel,
    T5ForConditionalGeneration,
)

import dsdistill
from dsdistill import Distiller, UserError, terms
from dsdistill.config.terms import Term
from tests.distiller import loops
from tests.models.families import FAMILIES, peaked


def classifiers(**student):
    made = []
    for seed, changes in ((1, {"num_labels": 3}), (2, {"num_labels": 3, "num_hidden_layers": 2} | student)):
        torch.manual_seed(seed)
        config = AutoConfig.for_model("bert", **FAMILIES["bert"] | changes)
        made.append(peaked(AutoModelForSequenceClassification.from_config(config), 4.0))
    return made


def batch(rows: int = 5, width: int = 8, labels: bool = True) -> dict:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, width + 1, (rows,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).long()
    made = {
        "input_ids": torch.randint(2, 60, (rows, width), generator=generator) * mask,
        "attention_mask": mask,
    }
    return made | ({"labels": torch.randint(0, 3, (rows,), generator=generator)} if labels else {})


def test_by_definition():
    """Every term is compared with plain PyTorch on the library's own outputs."""
    teacher, student = classifiers(hidden_size=24)
    plain = [copy.deepcopy(model).eval() for model in (teacher, student)]
    for model in plain:
        model.set_attn_implementation("eager")
    given = {
        "task": {"weight": 0.5},
        "soft_label": {"temperature": 3.0},
        "hidden": {"layers": "last", "embedding": False},
        "attention": {"layers": "last"},
    }
    distiller = Distiller(teacher, student, given)
    distiller.eval()
    inputs = batch()
    out = distiller(inputs)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    asked = {key: value for key, value in inputs.items() if key != "labels"}
    theirs, mine = (model(**asked, **wanted) for model in plain)
    valid = inputs["attention_mask"].bool()
    task = F.cross_entropy(mine.logits, inputs["labels"])
    soft = 9 * F.kl_div(
        (mine.logits / 3).log_softmax(-1), (theirs.logits / 3).softmax(-1), reduction="batchmean"
    )
    projector = distiller.objective.terms["hidden"].projectors["2-3"].weight
    hidden = (mine.hidden_states[2] @ projector.T - theirs.hidden_states[3])[valid].square().mean()
    rows = (theirs.attentions[2] * (theirs.attentions[2] / mine.attentions[1]).nan_to_num(1).log()).sum(-1)
    attention = rows.transpose(1, 2)[valid].mean()
    expected = {"task": task, "soft_label": soft, "hidden": hidden, "attention": attention}
    assert {name: term.raw.item() for name, term in out.terms.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-4
    )
    total = 0.5 * task + soft + hidden + attention
    assert out.loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert out.terms["task"].weighted.item() == pytest.approx(0.5 * task.item(), rel=1e-5)


def test_dicts_and_objects_are_the_same():
    values = []
    for given in (
        {"hidden": {"layers": "last", "divergence": "cosine"}, "attention": {"weight": 0.3}},
        {
            "hidden": terms.Hidden(layers="last", divergence="cosine"),
            "attention": terms.Attention(weight=0.3),
        },
        terms.Terms(
            hidden=terms.Hidden(layers="last", divergence="cosine"), attention=terms.Attention(weight=0.3)
        ),
    ):
        distiller = Distiller(*classifiers(), given)
        distiller.eval()
        values.append(distiller(batch(labels=False)).loss.item())
    assert values[0] == values[1] == values[2] > 0


class TestTheModels:
    def test_the_teacher_is_no_part_of_the_module(self):
        teacher, student = classifiers()
        distiller = Distiller(teacher, student, {"hidden": {"projector": "linear"}})
        own = {id(parameter) for parameter in distiller.parameters()}
        assert own >= {id(parameter) for parameter in student.parameters()}
        assert not own & {id(parameter) for parameter in teacher.parameters()}
        assert not any("teacher" in name for name in distiller.state_dict())
        assert len(distiller.state_dict()) == len(student.state_dict()) + 3
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())

    def test_the_teacher_moves_along_and_keeps_its_type(self):
        teacher, student = classifiers()
        distiller = Distiller(teacher.to(torch.bfloat16), student, {"hidden": {}})
        distiller.to(torch.float64)
        assert student.dtype == torch.float64 and teacher.dtype == torch.bfloat16
        torch.nn.ModuleList([distiller]).to("meta")  # as a wrapper moves its modules
        assert teacher.device.type == student.device.type == "meta" and teacher.dtype == torch.bfloat16

    def test_the_saved_student_is_plain(self, tmp_path):
        """The saved folder must be that of a student that was never distilled, except for the weights."""
        teacher, student = classifiers()
        student.config.use_cache = True
        student.save_pretrained(tmp_path / "before")
        distiller = Distiller(teacher, student, {"task": {}, "hidden": {}, "attention": {}})
        distiller(batch()).loss.backward()
        student.save_pretrained(tmp_path / "after")
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name

    @pytest.mark.parametrize("terms", [{"hidden": {}}, {"attention": {}}], ids=["hidden", "attention"])
    def test_attention_is_the_models_own(self, terms):
        """Capture wraps whatever attention function runs."""
        teacher, student = classifiers()
        student.set_attn_implementation("eager")
        distiller = Distiller(teacher, student, {"task": {}, **terms})
        used = []
        module = sys.modules[type(student).__module__]
        with pytest.MonkeyPatch.context() as patch:
            eager = module.eager_attention_forward
            patch.setattr(module, "eager_attention_forward", lambda *a, **k: used.append(1) or eager(*a, **k))
            distiller(batch())
        assert len(used) == student.config.num_hidden_layers
        assert student.config._attn_implementation == "eager"
        assert teacher.config._attn_implementation == "sdpa"

    def test_a_refusal_changes_nothing(self):
        teacher, student = classifiers(num_labels=2)
        implementation, hooks = (
            student.config._attn_implementation,
            len(student.bert.encoder.layer[0]._forward_hooks),
        )
        with pytest.raises(UserError, match="Distiller: teacher: got 3 classes, expected the student's 2"):
            Distiller(teacher, student, {"soft_label": {}, "hidden": {}, "attention": {}})
        assert student.config._attn_implementation == implementation
        assert len(student.bert.encoder.layer[0]._forward_hooks) == hooks
        assert any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("how", ["wrapper", "in place"])
@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_a_compiled_student(how, task):
    """Graphs that contain our hooks compute the same as the plain student."""
    torch._dynamo.reset()
    if task == "causal_lm":
        pair, given, inputs = (loops.teacher, loops.student), loops.TERMS, loops.micro_batches(0)
    else:
        pair, inputs = tuple(lambda i=i: classifiers()[i] for i in (0, 1)), [batch(), batch(3)]
        given = {"task": {}, "hidden": {}, "attention": {}, "pairwise": {}}
    results = []
    for compiled in (False, True):
        student = pair[1]()
        if compiled and how == "in place":
            student.compile(backend="eager")
        elif compiled:
            student = torch.compile(student, backend="eager")
        torch.manual_seed(3)
        distiller = Distiller(pair[0](), student, given)
        distiller.eval()
        for each in inputs:
            distiller(each).loss.backward()
        results.append({name: p.grad for name, p in distiller.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys() and len(results[0]) > 20
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def test_autocast():
    teacher, student = classifiers()
    distiller = Distiller(teacher, student, {"task": {}, "soft_label": {}, "hidden": {}, "attention": {}})
    distiller.eval()
    exact = distiller(batch()).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = distiller(batch()).loss
    assert rounded.dtype == torch.float32 and rounded != exact
    assert rounded.item() == pytest.approx(exact.item(), rel=0.05)


def test_moving_layer_weights_follow_update():
    teacher, student = classifiers()
    distiller = Distiller(teacher, student, {"hidden": {"layer_weights": "dynamic"}})
    distiller.objective.begin(20)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    before = list(distiller.objective.terms["hidden"].weighting.values)
    for _ in range(4):
        out = distiller(batch())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        distiller.update([out])
    weighting = distiller.objective.terms["hidden"].weighting
    assert weighting.values != before and weighting.seen == 4
    again = Distiller(*classifiers(), {"hidden": {"layer_weights": "dynamic"}})
    again.objective.restore(json.loads(json.dumps(distiller.objective.state())))
    assert again.objective.terms["hidden"].weighting.values == weighting.values


def test_an_output_can_be_sent():
    out = Distiller(*classifiers(), {"task": {}, "hidden": {}})(batch())
    assert pickle.loads(pickle.dumps(out.terms))["task"].raw == out.terms["task"].raw
    assert not out.terms["task"].raw.requires_grad


def test_padding_is_each_models_own():
    """Decoders that classify look for the last token that is not their padding, whatever the other model's is."""
    made = []
    for seed, pad in ((1, 0), (2, 0)):
        torch.manual_seed(seed)
        config = AutoConfig.for_model("llama", **FAMILIES["llama"] | {"num_labels": 3, "pad_token_id": pad})
        made.append(peaked(AutoModelForSequenceClassification.from_config(config), 4.0))
    distiller = Distiller(*made, {"soft_label": {"temperature": 1.0}})
    distiller.eval()
    expected = distiller(batch(labels=False)).loss.item()
    made[0].config.pad_token_id = 1
    other = Distiller(*made, {"soft_label": {"temperature": 1.0}})
    other.eval()
    assert other(batch(labels=False)).loss.item() == pytest.approx(expected, rel=1e-5)
    made[0].config.pad_token_id = None
    with pytest.raises(UserError, match="Distiller: teacher: got a classifier without pad_token_id"):
        Distiller(*made, {"soft_label": {}})


def test_rows_without_a_class_count_for_nothing():
    distiller = Distiller(*classifiers(), {"task": {}})
    distiller.eval()
    inputs = batch()
    fewer = {key: values[1:] for key, values in inputs.items()}
    inputs["labels"][0] = -100
    assert distiller(inputs).loss.item() == pytest.approx(distiller(fewer).loss.item(), rel=1e-6)


def test_a_model_without_a_head():
    """Sentence encoders have no head, and terms over states, attention and pairs need none."""
    torch.manual_seed(0)
    made = [AutoModel.from_config(AutoConfig.for_model("bert", **FAMILIES["bert"])) for _ in range(2)]
    given = {"hidden": {}, "attention": {}, "pairwise": {}, "sp": {}}
    with pytest.raises(UserError, match="student: got class BertModel, expected a model for"):
        Distiller(*made, given)
    with pytest.raises(UserError, match=r"student: got class BertModel, which has no head for terms.task"):
        Distiller(*made, given | {"task": {}}, task="classification")
    with pytest.raises(
        UserError, match="student: got class BertModel for task masked_lm, expected a class for masked_lm"
    ):
        Distiller(*made, given, task="masked_lm")
    distiller = Distiller(*made, given, task="classification")
    distiller(batch(labels=False)).loss.backward()
    assert made[1].encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0


def test_copies_and_pickles():
    """A copy of the whole distils independently; a student under capture can still be saved whole."""
    distiller = Distiller(*classifiers(), {"task": {}, "hidden": {}, "attention": {}})
    distiller.eval()
    twin = copy.deepcopy(distiller)
    assert twin(batch()).loss == distiller(batch()).loss and twin.model is not distiller.model
    again = pickle.loads(pickle.dumps(distiller.model))
    assert torch.equal(again(**batch()).logits, distiller.model(**batch()).logits)


def test_detach():
    teacher, student = classifiers()
    layer = student.bert.encoder.layer[0]
    for _ in range(3):
        distiller = Distiller(teacher, student, {"hidden": {}})
        assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1
        distiller.detach()
    assert not layer._forward_hooks and not layer._forward_pre_hooks


class TestRefusals:
    def test_of_shared_weights(self):
        teacher, student = classifiers()
        with pytest.raises(
            UserError, match=r"teacher: got one that shares .* with the student, expected a separate model"
        ):
            Distiller(student, student, {"hidden": {}})
        assert all(parameter.requires_grad for parameter in student.parameters())
        teacher.bert.embeddings.word_embeddings = student.bert.embeddings.word_embeddings
        with pytest.raises(
            UserError, match=r"shares bert.embeddings.word_embeddings.weight with the student"
        ):
            Distiller(teacher, student, {"hidden": {}})

    def test_of_tasks(self):
        for task, line in (
            ("regression", "class BertForSequenceClassification for task regression, expected task class"),
            ("causal_lm", "class BertForSequenceClassification for task causal_lm"),
            ("ranking", "task: got ranking, expected classification, regression"),
        ):
            with pytest.raises(UserError, match=line):
                Distiller(*classifiers(), {"hidden": {}}, task=task)

    def test_of_counts_and_backends(self):
        distiller = Distiller(*classifiers(), {"task": {}, "attention": {}}, backend="cuda")
        for given in (batch(), [], None):
            with pytest.raises(UserError, match=r"counts: got .*, expected a list of a step's micro-batches"):
                distiller.counts(given)
        with pytest.raises(
            UserError, match=r"Distiller: backend: got .*, expected auto, or a backend that runs every term"
        ):
            distiller(batch())

    @pytest.mark.parametrize(
        ("given", "line"),
        [
            (
                {"hiden": {}},
                "Distiller: terms.hiden: got an unknown key with value {}, expected a known key (did you",
            ),
            (
                {"hidden": {"layers": "unifrm"}},
                "Distiller: terms.hidden.layers: got 'unifrm', expected uniform, skip",
            ),
            (
                {"hidden": {"layers": [[1, 9]]}},
                "Distiller: terms.hidden.layers: got teacher layer 9, expected 1 to 3",
            ),
            ({"hidden": {"layers": "cka_offline"}}, "Distiller: terms.hidden.layers: got cka_offline"),
            (
                {"feature": {"components": 4}},
                "Distiller: terms.feature.components: got 4, which are fitted on",
            ),
            ({}, "Distiller: terms: got no term with a weight above 0"),
            (["task"], "Distiller: terms: got list, expected a dict of terms by name"),
            ({"smooth": {}, "task": {}}, "Distiller: terms.smooth: got no stage before this one"),
            ({"domain": {}}, "Distiller: terms.domain: got no student.domain"),
            ({"fdd": {}}, "Distiller: terms.fdd: got task classification"),
        ],
    )
    def test_of_terms(self, given, line):
        with pytest.raises(UserError) as refused:
            Distiller(*classifiers(), given)
        assert line in str(refused.value) and "\n" not in str(refused.value)

    def test_of_typed_terms(self):
        with pytest.raises(UserError, match=r"terms.hidden.layers: got 'unifrm', expected uniform, skip"):
            terms.Hidden(layers="unifrm")

    def test_of_models(self):
        teacher, student = classifiers()
        with pytest.raises(
            UserError, match="student: got Linear, expected a transformers model without a wrapper"
        ):
            Distiller(teacher, torch.nn.Linear(2, 2), {"task": {}})
        with pytest.raises(
            UserError, match="teacher: got a model for causal_lm, expected a model for classification"
        ):
            Distiller(loops.teacher(), student, {"hidden": {}})
        with pytest.raises(UserError, match=r"terms.hidden: got no teacher"):
            Distiller(None, student, {"hidden": {}})
        small = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        other = T5ForConditionalGeneration(AutoConfig.for_model("t5", **small))
        with pytest.raises(
            UserError, match="student: got class T5ForConditionalGeneration, expected a model for"
        ):
            Distiller(None, other, {"task": {}})

    def test_a_causal_class_around_an_encoder(self):
        config = AutoConfig.for_model("bert", **FAMILIES["bert"])
        with pytest.raises(UserError, match="Distiller: student: got model type bert"):
            Distiller(None, BertLMHeadModel(config), {"task": {}})

    def test_of_inputs_that_terms_need(self):
        with pytest.raises(UserError, match=r"batch: got no labels, expected labels, which terms.task reads"):
            Distiller(*classifiers(), {"task": {}})(batch(labels=False))
        pairs = {"trajectory": {"word_layers": [[1, 1]]}}
        with pytest.raises(
            UserError, match=r"batch: got no spans, expected spans \(S, 4\), which terms.trajectory"
        ):
            Distiller(*classifiers(), pairs)(batch())

    def test_reentrant_checkpointing(self):
        """It first runs layers without gradients, so what is captured then has none."""
        student = loops.student()
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        distiller = Distiller(loops.teacher(), student, loops.TERMS)
        with pytest.raises(
            UserError, match="student: got gradient checkpointing with use_reentrant=True, expected"
        ):
            distiller(loops.micro_batches(0)[0])


class Sharp(Term):
    """Sharp holds the settings of a term that is made here."""

    power: float = 2.0


class SharpTerm(dsdistill.AlignmentTerm):
    """Compute the mean of |H_S − H_T|^power over valid tokens of the last layers."""

    def __init__(self, config, pair):
        super().__init__(config, pair)
        self.student_hidden, self.teacher_hidden = (
            frozenset([pair.student.depth]),
            frozenset([pair.teacher.depth]),
        )

    def counts(self, batch, geometry):
        return (batch.mask.sum() * self.pair.teacher.width).double()[None]

    def sums(self, student, teacher, batch):
        mine, other = student.hidden[self.pair.student.depth], teacher.hidden[self.pair.teacher.depth]
        return (mine - other)[batch.mask].abs().pow(self.config.power).sum()[None]


@pytest.mark.usefixtures("terms_of_before")
def test_a_term_from_outside():
    dsdistill.register_term("sharp_here", Sharp, SharpTerm)
    with pytest.raises(UserError, match=r"register_term: name: got hidden, which is HiddenTerm"):
        dsdistill.register_term("hidden", Sharp, SharpTerm)
    with pytest.raises(UserError, match=r"expected a subclass of dsdistill.AlignmentTerm"):
        dsdistill.register_term("sharp_too", Sharp, torch.nn.Linear)
    needy = type("Needy", (SharpTerm,), {"needs_spans": True})
    line = r"register_term: needy: got Sharp.reads_spans False and Needy.needs_spans True, expected the same of both"
    with pytest.raises(UserError, match=line):
        dsdistill.register_term("needy", Sharp, needy)
    with pytest.raises(UserError, match="got Bare without counts, sums, expected both defined"):
        dsdistill.register_term("bare", Sharp, type("Bare", (dsdistill.AlignmentTerm,), {}))
    teacher, student = classifiers()
    both = {"sharp_here": {"power": 2.0}, "hidden": {"layers": "last", "embedding": False}}
    distiller = Distiller(teacher, student, both)
    distiller.eval()
    out = distiller(batch())
    assert out.terms["sharp_here"].raw.item() == pytest.approx(out.terms["hidden"].raw.item(), rel=1e-5)
    with pytest.raises(UserError, match=r"Distiller: terms.sharp_here.power: got 'x'"):
        Distiller(*classifiers(), {"sharp_here": {"power": "x"}})


def test_public_names_are_found_lazily():
    script = (
        "import sys, dsdistill; light = set(sys.modules) & {'torch', 'transformers', 'deepspeed', 'pydantic'};"
        "assert not light, light; assert {'Distiller', 'train', 'terms', 'load_config'} <= set(dir(dsdistill));"
        "from dsdistill import Distiller, terms, register_term, load_config; import dsdistill.terms;"
        "assert 'torch' in sys.modules and 'deepspeed' not in sys.modules; import torch;"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    for name in dsdistill.__all__:
        assert getattr(dsdistill, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Distller'"):
        _ = dsdistill.Distller
