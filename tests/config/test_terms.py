"""Settings of terms: what each needs of a run, and mistakes in them."""

import pickle

import pytest

from dsdistill.config import UserError
from dsdistill.config.load import make_config
from dsdistill.config.terms import Attention, Feature, Hidden, Layered, SoftLabel, Task, Term, Terms

ASKED = {
    "relates": {"contrastive", "sp", "rkd", "cka", "pkt", "domain"},
    "contrasts": {"contrastive"},
    "needs_head": {"soft_label"},
    "needs_previous": {"smooth"},
    "needs_domain": {"domain"},
    "reads_spans": {"trajectory", "domain"},
    "reads_labels": {"task"},
    "needs_teacher": Terms.model_fields.keys() - {"task", "smooth"},
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_terms_need(asked):
    every = Terms(**{name: {} for name in Terms.model_fields})
    assert {name for name, term in every.named().items() if getattr(term, asked)} == ASKED[asked]


@pytest.mark.parametrize(
    ("make", "settings", "line"),
    [
        (
            Hidden,
            {"layers": "unifrm"},
            "terms.hidden.layers: got 'unifrm', expected uniform, skip, last, emd, ",
        ),
        (Feature, {"layers": []}, "terms.feature.layers: got "),
        (
            Hidden,
            {"weigth": 2.0},
            "terms.hidden.weigth: got an unknown key with value 2.0, expected a known key (did ",
        ),
        (SoftLabel, {"temperature": 0}, "terms.soft_label.temperature: got 0, expected greater than 0"),
        (
            Attention,
            {"relations": ("query_keys",)},
            "terms.attention.relations.0: got 'query_keys', expected ",
        ),
        (Attention, {"relation_heads": True}, "terms.attention.relation_heads: got True, expected "),
        (
            Terms,
            {"hiden": {}},
            "terms.hiden: got an unknown key with value {}, expected a known key (did you mean hidden?)",
        ),
        (
            Terms,
            {"hidden": {"weigth": 2}},
            "terms.hidden.weigth: got an unknown key with value 2, expected a known key",
        ),
        (Terms, {"hidden": 5}, "terms.hidden: got 5, expected "),
        (Terms, {"task": {"weight": -1.0}}, "terms.task.weight: got -1.0, expected "),
    ],
)
def test_a_mistake_is_told_as_in_a_config(make, settings, line):
    with pytest.raises(UserError) as caught:
        make(**settings)
    assert str(caught.value).startswith(line)
    terms = settings if make is Terms else {line.split(".")[1]: settings}
    with pytest.raises(UserError) as in_a_config:
        make_config({"teacher": {"path": "t"}, "student": {"path": "s"}, "terms": terms}, "x.yaml")
    assert str(in_a_config.value) == f"x.yaml: {caught.value}"


def test_a_class_that_no_config_has():
    for make, name in ((Layered, "Layered"), (Term, "Term")):
        with pytest.raises(UserError, match=rf"^{name}\.weight: got 'a', expected "):
            make(weight="a")


def test_what_is_right_is_as_it_was():
    terms = Terms(task=Task(weight=0.5), hidden={"layers": [[1, 2]]})
    assert terms.hidden == Hidden(layers=((1, 2),)) and terms.task.weight == 0.5
    assert pickle.loads(pickle.dumps(terms)) == terms == terms.model_copy(deep=True)
    assert terms.hidden.model_fields_set == {"layers"}
