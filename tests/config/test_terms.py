"""Settings of terms: what each says that it needs of a run."""

import pytest

from dsdistill.config.terms import Terms

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
