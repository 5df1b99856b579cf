"""Each term against its definition, computed from the library's own maps, states and logits."""

import math

import pytest
import torch
import torch.nn.functional as F

from dsdistill.config import UserError
from tests.alignment.rig import ALL_TERMS, LENGTHS, Rig, make_batch, with_filler

STUDENT = {
    "bert": {"hidden_size": 24, "num_hidden_layers": 2},
    "llama": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3},
    "mistral": {"num_hidden_layers": 2},
}
N, ROWS = sum(LENGTHS), len(LENGTHS)


def outputs(model, batch):
    """Return the library's outputs under eager attention: logits, hidden states, attention maps."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(
            input_ids=batch.input_ids,
            attention_mask=batch.mask.long(),
            output_hidden_states=True,
            output_attentions=True,
        )
    model.set_attn_implementation(implementation)
    return found.logits, found.hidden_states, found.attentions


def run(family, terms, task="classification", **options):
    rig = Rig(family, task, terms, STUDENT[family], **options)
    batch = make_batch(task)
    raw = rig.step(batch)[1]
    return rig, batch, raw, outputs(rig.student, batch), outputs(rig.teacher, batch)


def rows_of(values, batch):
    return values[batch.mask]


class TestTask:
    def test_classification(self):
        _, batch, raw, (logits, *_), _ = run("bert", {"task": {}})
        assert raw["task"] == pytest.approx(F.cross_entropy(logits, batch.labels).item(), rel=1e-5)

    def test_regression(self):
        rig = Rig("bert", "regression", {"task": {}}, STUDENT["bert"])
        batch = make_batch("regression")
        expected = F.mse_loss(outputs(rig.student, batch)[0][:, 0], batch.labels)
        assert rig.step(batch)[1]["task"] == pytest.approx(expected.item(), rel=1e-5)

    def test_causal_lm(self):
        _, batch, raw, (logits, *_), _ = run("llama", {"task": {}}, task="causal_lm")
        expected = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100
        )
        assert raw["task"] == pytest.approx(expected.item(), rel=1e-5)


WEIGHTS = (0.05, 0.3, 0.0)  # their sum in a step is below 1, and one class does not count


class TestSmoothedAndWeighed:
    """The loss of a step's micro-batches must be what plain PyTorch computes over all their examples at once."""

    @pytest.mark.parametrize("weights", [(), WEIGHTS], ids=["alike", "weighed"])
    @pytest.mark.parametrize("smoothing", [0.0, 0.3])
    def test_classification(self, smoothing, weights):
        rig = Rig("bert", terms={"task": {}}, smoothing=smoothing, class_weights=weights)
        batches = [make_batch("classification"), make_batch("classification", (5, 2), seed=1)]
        batches[0].labels[2] = -100
        filler = with_filler(batches[1], 2)
        _, raw, gradients = rig.step(batches[0], filler)
        logits = torch.cat([rig.student(of.input_ids, of.mask.long()).logits for of in batches])
        weight = torch.tensor(weights) if weights else None
        labels = torch.cat([of.labels for of in batches])
        expected = F.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing)
        assert raw["task"] == pytest.approx(expected.item(), rel=1e-5)
        true = torch.autograd.grad(expected, rig.student.classifier.weight)[0]
        torch.testing.assert_close(gradients["body.classifier.weight"], true, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(("family", "task"), [("llama", "causal_lm"), ("bert", "masked_lm")])
    def test_tokens(self, family, task):
        rig = Rig(family, task, {"task": {}}, smoothing=0.3)
        batch = make_batch(task)
        _, raw, gradients = rig.step(batch)
        logits, labels = rig.student(batch.input_ids, batch.mask.long()).logits, batch.labels
        if task == "causal_lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.3)
        assert raw["task"] == pytest.approx(expected.item(), rel=1e-5)
        head = rig.student.get_output_embeddings().weight
        (name,) = (name for name, parameter in rig.module.named_parameters() if parameter is head)
        true = torch.autograd.grad(expected, head)[0]
        torch.testing.assert_close(gradients[name], true, rtol=1e-4, atol=1e-6)

    def test_nothing_that_counts(self):
        rig = Rig("bert", terms={"task": {}}, class_weights=WEIGHTS)
        batch = make_batch("classification")
        batch.labels[:] = 2
        total, _, gradients = rig.step(batch)
        assert total == 0 and all(gradient.isfinite().all() for gradient in gradients.values())


def kl(teacher, student, temperature):
    """Return (…) KL of softmax(z/τ), summed over classes."""
    p, q = (F.log_softmax(z / temperature, -1) for z in (teacher, student))
    return (p.exp() * (p - q)).sum(-1)


class TestSoftLabel:
    @pytest.mark.parametrize(("scale_tau2", "factor"), [(True, 9.0), (False, 1.0)])
    def test_classification(self, scale_tau2, factor):
        terms = {"soft_label": {"temperature": 3.0, "scale_tau2": scale_tau2}}
        _, _, raw, student, teacher = run("bert", terms)
        assert raw["soft_label"] == pytest.approx(
            factor * kl(teacher[0], student[0], 3.0).mean().item(), rel=1e-4
        )

    def test_causal_lm(self):
        _, batch, raw, student, teacher = run("llama", {"soft_label": {}}, task="causal_lm")
        predicts = batch.mask[:, 1:]
        expected = 4 * kl(teacher[0][:, :-1], student[0][:, :-1], 2.0)[predicts].mean()
        assert raw["soft_label"] == pytest.approx(expected.item(), rel=1e-4)

    @pytest.mark.parametrize(("scale_tau2", "factor"), [(True, 1.0), (False, 1 / 9)])
    def test_regression(self, scale_tau2, factor):
        terms = {"soft_label": {"temperature": 3.0, "scale_tau2": scale_tau2}}
        _, _, raw, student, teacher = run("bert", terms, task="regression")
        expected = factor * F.mse_loss(student[0][:, 0], teacher[0][:, 0]).item()
        assert raw["soft_label"] == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("divergence", ["forward_kl", "logit_mse"])
    def test_squared_logits_are_the_same_at_every_temperature(self, divergence):
        """The factor τ² cancels the division by τ; only KL depends on τ."""
        terms = ({"soft_label": {"divergence": divergence, "temperature": t}} for t in (1.0, 3.0))
        (_, _, first, student, teacher), (_, _, second, *_) = (run("bert", each) for each in terms)
        same = first["soft_label"] == pytest.approx(second["soft_label"], rel=1e-5)
        assert same == (divergence == "logit_mse")
        if same:
            expected = F.mse_loss(student[0], teacher[0]).item()
            assert first["soft_label"] == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize(("student", "teacher"), [(64, 72), (72, 64)])
    def test_heads_padded_to_different_widths(self, student, teacher):
        """Padding rows of a head belong to no token: they take part in neither distribution."""
        rig = Rig(
            "llama",
            "causal_lm",
            {"soft_label": {}},
            STUDENT["llama"] | {"vocab_size": student},
            {"vocab_size": teacher},
            tokens=60,
        )
        batch = make_batch("causal_lm")
        mine, other = (outputs(model, batch)[0][:, :-1, :60] for model in (rig.student, rig.teacher))
        expected = 4 * kl(other, mine, 2.0)[batch.mask[:, 1:]].mean()
        assert rig.step(batch)[1]["soft_label"] == pytest.approx(expected.item(), rel=1e-4)

    def test_a_head_smaller_than_the_tokenizer(self):
        with pytest.raises(UserError, match=r"vocabularies of 64 \(student\) and 72 \(teacher\)"):
            Rig("llama", "causal_lm", {"soft_label": {}}, {}, {"vocab_size": 72}, tokens=70)


class TestHidden:
    @pytest.mark.parametrize("agg", ["mean", "sum"])
    @pytest.mark.parametrize("embedding", [True, False])
    @pytest.mark.parametrize("divergence", ["mse", "cosine"])
    def test_projected(self, divergence, embedding, agg):
        terms = {"hidden": {"divergence": divergence, "embedding": embedding, "layer_agg": agg}}
        rig, batch, raw, student, teacher = run("bert", terms)
        pairs = [(0, 0)] * embedding + [(1, 2), (2, 3)]  # 1.5 rounds up
        assert rig.objective.terms["hidden"].layers == tuple(pairs)
        projectors = list(rig.objective.terms["hidden"].projectors.values())
        assert len(projectors) == len(pairs)
        losses = []
        for (s, t), projector in zip(pairs, projectors, strict=True):
            mine, other = rows_of(student[1][s] @ projector.weight.T, batch), rows_of(teacher[1][t], batch)
            cosine = 1 - F.cosine_similarity(mine, other, dim=-1).mean()
            losses.append(F.mse_loss(mine, other) if divergence == "mse" else cosine)
        expected = torch.stack(losses).sum() / (len(pairs) if agg == "mean" else 1)
        assert raw["hidden"] == pytest.approx(expected.item(), rel=1e-4)

    def test_equal_width_needs_no_projector(self):
        rig, batch, raw, student, teacher = run("mistral", {"hidden": {"layers": "last", "embedding": False}})
        assert rig.objective.terms["hidden"].projectors is None
        expected = F.mse_loss(rows_of(student[1][2], batch), rows_of(teacher[1][3], batch))
        assert raw["hidden"] == pytest.approx(expected.item(), rel=1e-4)


class TestFeature:
    def test_beside_hidden(self):
        """Cosine and Euclidean distance of the same layers are used at once, each with projectors of its own."""
        terms = {"hidden": {"embedding": False}, "feature": {"weight": 0.5}}
        rig, batch, raw, student, teacher = run("bert", terms)
        losses = []
        for s, t in [(1, 2), (2, 3)]:
            weight = rig.objective.terms["feature"].projectors[f"{s}-{t}"].weight
            mine, other = rows_of(student[1][s] @ weight.T, batch), rows_of(teacher[1][t], batch)
            losses.append(1 - F.cosine_similarity(mine, other, dim=-1).mean().item())
        assert raw["feature"] == pytest.approx(sum(losses) / 2, rel=1e-4)
        alone = run("bert", {"hidden": {"embedding": False}})[2]
        assert raw["hidden"] == pytest.approx(alone["hidden"], rel=1e-6)

    def test_weights_of_layers(self):
        """Σ λ_l (1 − cos) with λ as given, whatever layer_agg says."""
        terms = {"feature": {"layer_weights": [0.25, 3.0], "layer_agg": "sum"}}
        rig, batch, raw, student, teacher = run("bert", terms)
        expected = 0.0
        for weight, s, t in [(0.25, 1, 2), (3.0, 2, 3)]:
            projection = rig.objective.terms["feature"].projectors[f"{s}-{t}"].weight
            mine, other = rows_of(student[1][s] @ projection.T, batch), rows_of(teacher[1][t], batch)
            expected += weight * (1 - F.cosine_similarity(mine, other, dim=-1).mean().item())
        assert raw["feature"] == pytest.approx(expected, rel=1e-4)
        with pytest.raises(UserError, match=r"^terms.feature.layer_weights: got 3 weights, expected 2"):
            Rig("bert", terms={"feature": {"layer_weights": [1, 2, 3]}}, student=STUDENT["bert"])

    def test_first_tokens(self):
        """The loss is a mean over sequences of their first tokens; a decoder's first token sees no other token."""
        terms = {"feature": {"positions": "first", "layers": "last", "divergence": "mse"}}
        rig, _, raw, student, teacher = run("bert", terms)
        projection = rig.objective.terms["feature"].projectors["2-3"].weight
        expected = F.mse_loss(student[1][2][:, 0] @ projection.T, teacher[1][3][:, 0])
        assert raw["feature"] == pytest.approx(expected.item(), rel=1e-4)
        line = r"^terms.hidden.positions: got first with task causal_lm, [^\n]*, expected all"
        with pytest.raises(UserError, match=line):
            Rig("llama", "causal_lm", {"hidden": {"positions": "first"}})

    def test_its_messages_name_it(self):
        with pytest.raises(UserError, match=r"^terms.feature.layers: got student layer 7"):
            Rig("bert", terms={"feature": {"layers": [[7, 1]]}})


class TestAttention:
    @pytest.mark.parametrize("family", ["bert", "mistral"])
    @pytest.mark.parametrize("heads", ["match", "mean"])
    @pytest.mark.parametrize("divergence", ["kl", "mse"])
    def test_probabilities(self, family, heads, divergence):
        terms = {"attention": {"divergence": divergence, "heads": heads}}
        rig, batch, raw, student, teacher = run(family, terms)
        found = []
        for s, t in rig.objective.terms["attention"].layers:
            mine, other = student[2][s - 1], teacher[2][t - 1]
            if heads == "mean":
                mine, other = mine.mean(1, keepdim=True), other.mean(1, keepdim=True)
            query, key = batch.mask[:, None, :, None], batch.mask[:, None, None, :]
            if divergence == "kl":
                ratio = (other.clamp_min(1e-30).log() - mine.clamp_min(1e-30).log()).masked_fill(
                    other == 0, 0.0
                )
                found.append(
                    (other * ratio).sum(-1).masked_fill(~batch.mask[:, None], 0).sum() / (N * mine.shape[1])
                )
            else:
                allowed = (query & key).expand_as(mine).clone()
                if family == "mistral":
                    distance = torch.arange(14)[:, None] - torch.arange(14)
                    allowed &= (distance >= 0) & (distance < 4)
                found.append((mine - other)[allowed].square().sum() / allowed.sum())
        assert raw["attention"] == pytest.approx(torch.stack(found).mean().item(), rel=1e-4)

    def test_raw_scores(self):
        """Log-probabilities equal scores up to a constant per row; raw scores tell a shifted map from an equal one."""
        rig, batch, raw, *_ = run("bert", {"attention": {"divergence": "score_mse", "layers": [[1, 3]]}})
        mine = rig.module.trace(batch).attention[1]
        other = rig.teacher_trace(batch).attention[3]
        scores = [
            trace.query @ trace.key.transpose(-1, -2) / math.sqrt(trace.query.shape[-1])
            for trace in (mine, other)
        ]
        allowed = (batch.mask[:, None, :, None] & batch.mask[:, None, None, :]).expand_as(scores[0])
        expected = (scores[0] - scores[1])[allowed].square().mean()
        assert raw["attention"] == pytest.approx(expected.item(), rel=1e-4)

    def test_unequal_heads(self):
        with pytest.raises(UserError, match="match for 6 student and 4 teacher heads, expected heads: mean"):
            Rig("llama", terms={"attention": {}}, student=STUDENT["llama"])
        with pytest.raises(UserError, match="score_mse with heads: mean"):
            Rig("bert", terms={"attention": {"heads": "mean", "divergence": "score_mse"}})
        two = {"num_attention_heads": 2, "num_key_value_heads": 2}
        with pytest.raises(
            UserError, match="2 student and 4 teacher heads, expected heads: mean, heads: group"
        ):
            Rig("llama", terms={"attention": {}}, student=two)
        grouped = {"heads": "group"}
        with pytest.raises(
            UserError, match="heads: got group for 6 student and 4 teacher heads, expected heads"
        ):
            Rig("llama", terms={"attention": grouped}, student=STUDENT["llama"])
        with pytest.raises(
            UserError, match=r"group for 4 student and 2 teacher heads in value_value, expected"
        ):
            relations = grouped | {"relations": ["value_value"]}
            Rig("llama", terms={"attention": relations}, student={"num_key_value_heads": 4})
        with pytest.raises(
            UserError, match="divergence: got score_mse with heads: group, expected kl or mse"
        ):
            Rig("llama", terms={"attention": grouped | {"divergence": "score_mse"}}, student=two)
        with pytest.raises(UserError, match="heads: got group with relation_heads, expected match"):
            Rig("bert", terms={"attention": grouped | {"relation_heads": 4}})

    @pytest.mark.parametrize("family", ["bert", "llama"])
    @pytest.mark.parametrize("divergence", ["kl", "mse"])
    def test_groups_of_teacher_heads(self, family, divergence):
        """Two student heads learn from the means of four teacher heads, by the library's own maps."""
        student = {"num_hidden_layers": 2, "num_attention_heads": 2}
        if family == "llama":
            student |= {"num_key_value_heads": 1, "hidden_size": 24}
        rig = Rig(family, terms={"attention": {"divergence": divergence, "heads": "group"}}, student=student)
        batch = make_batch("classification")
        raw = rig.step(batch)[1]["attention"]
        mine, other = outputs(rig.student, batch)[2], outputs(rig.teacher, batch)[2]
        found = []
        for s, t in rig.objective.terms["attention"].layers:
            p, q = other[t - 1].unflatten(1, (2, 2)).mean(2), mine[s - 1]
            seen = batch.mask[:, None, :, None] & batch.mask[:, None, None, :]
            if family == "llama":
                seen = seen & torch.ones(14, 14, dtype=torch.bool).tril()
            seen = seen.expand_as(p)
            if divergence == "kl":
                found.append((p[seen] * (p[seen] / q[seen]).log()).sum() / (2 * N))
            else:
                found.append((p - q)[seen].square().mean())
        assert raw == pytest.approx(torch.stack(found).mean().item(), rel=1e-4)

    def test_groups_of_values(self):
        """softmax(V Vᵀ / √d) over key heads: one of the student, two of the teacher, which are averaged."""
        student = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
        terms = {"attention": {"heads": "group", "relations": ["query_key", "value_value"], "layers": "last"}}
        rig = Rig("llama", terms=terms, student=student)
        batch = make_batch("classification")
        raw = rig.step(batch)[1]["attention"]
        maps = []
        for trace, layer in ((rig.module.trace(batch), 2), (rig.teacher_trace(batch), 3)):
            values = trace.attention[layer].value.double()
            scores = values @ values.mT / math.sqrt(values.shape[-1])
            seen = batch.mask[:, None, None, :] & torch.ones(14, 14, dtype=torch.bool).tril()
            maps.append(scores.masked_fill(~seen, -1e9).softmax(-1).mean(1)[batch.mask])
        mine, other = maps
        values = (other * (other / mine.clamp_min(1e-30)).clamp_min(1e-30).log()).sum() / N
        rig = Rig(
            "llama", terms={"attention": terms["attention"] | {"relations": ["query_key"]}}, student=student
        )
        scores = rig.step(batch)[1]["attention"]
        assert raw == pytest.approx(scores + values.item(), rel=1e-4) and values > 1e-3

    @pytest.mark.parametrize(
        ("families", "student", "teacher"),
        [
            (("bert", "llama"), {}, {}),
            (("mistral", "mistral"), {"sliding_window": 3}, {}),
            (("mistral", "mistral"), {"sliding_window": None}, {}),
        ],
        ids=["order", "window", "no window"],
    )
    def test_layers_that_see_different_keys(self, families, student, teacher):
        rig = Rig(
            families[1], "classification", {"attention": {}}, student, teacher, student_family=families[0]
        )
        with pytest.raises(
            UserError, match=r"^terms.attention.layers: got student layer 1 with .* attention"
        ):
            rig.step(make_batch("classification"))


class TestPairwise:
    @pytest.mark.parametrize("relation", ["cosine", "dot"])
    def test_definition(self, relation):
        rig, batch, raw, student, teacher = run("bert", {"pairwise": {"relation": relation}})
        assert rig.objective.terms["pairwise"].layers == ((2, 3),)
        total = 0.0
        for mine, other, valid in zip(student[1][2], teacher[1][3], batch.mask, strict=True):
            grams = []
            for states in (mine[valid].double(), other[valid].double()):
                states = F.normalize(states, dim=-1) if relation == "cosine" else states
                grams.append(states @ states.T)
            total += (grams[0] - grams[1]).square().mean().item()
        assert raw["pairwise"] == pytest.approx(total / ROWS, rel=1e-4)

    @pytest.mark.parametrize("relation", ["cosine", "dot"])
    def test_centred(self, relation):
        """For L_struct each sequence's mean is subtracted; a single token has no structure."""
        rig, batch, raw, student, teacher = run("bert", {"pairwise": {"relation": relation, "center": True}})
        total = 0.0
        for mine, other, valid in zip(student[1][2], teacher[1][3], batch.mask, strict=True):
            if valid.sum() == 1:
                continue
            grams = []
            for states in (mine[valid].double(), other[valid].double()):
                states = states - states.mean(0)
                states = F.normalize(states, dim=-1) if relation == "cosine" else states
                grams.append(states @ states.T)
            total += (grams[0] - grams[1]).square().mean().item()
        assert raw["pairwise"] == pytest.approx(total / ROWS, rel=1e-4)
        alone = make_batch("classification", (1, 1))
        value, _, gradients = rig.step(alone)
        assert value == 0 and all(gradient.isfinite().all() for gradient in gradients.values())

    def test_centring_distances_changes_nothing(self):
        with pytest.raises(UserError, match="true with relation: distance"):
            Rig("bert", terms={"pairwise": {"relation": "distance", "center": True}})

    def test_rows_of_distances_are_refused(self):
        line = "terms.pairwise.rows: got 4 with relation: distance, [^\n]*, expected cosine or dot"
        with pytest.raises(UserError, match=line):
            Rig("bert", terms={"pairwise": {"relation": "distance", "rows": 4}})

    @pytest.mark.parametrize("terms", [{"pairwise": {"rows": 3}}, {"attention": {"rows": 3}}])
    def test_evaluation_takes_all_rows(self, terms):
        """So does training on shorter sequences, with draws or without."""
        found = []
        for given in (terms, {name: {} for name in terms}):
            rig = Rig("bert", terms=given)
            rig.objective.eval()
            found.append(rig.step(make_batch("classification"))[0])
            rig.objective.train()
            found.append(rig.step(make_batch("classification"))[0])
            found.append(rig.step(make_batch("classification", (3, 2, 3), width=9))[0])
        assert found[0] == found[3] and found[2] == pytest.approx(found[5], rel=1e-6)
        assert found[1] != pytest.approx(found[4], rel=1e-3)


class TestObjective:
    def test_weights_and_total(self):
        terms = {"task": {"weight": 2.0}, "hidden": {"weight": 0.5}, "pairwise": {"weight": 0.0}}
        rig = Rig("bert", terms=terms, student=STUDENT["bert"])
        assert rig.objective.weights == {"task": 2.0, "hidden": 0.5}
        total, raw, _ = rig.step(make_batch("classification"))
        assert total == pytest.approx(2 * raw["task"] + raw["hidden"] / 2, rel=1e-6)
        alone = Rig("bert", terms={"task": {}}, student=STUDENT["bert"])
        assert rig.objective.needs("teacher") and not alone.objective.needs("teacher")

    def test_layers_to_capture(self):
        terms = {
            "hidden": {"layers": "last"},
            "pairwise": {"layers": [[1, 1]]},
            "attention": {"layers": [[2, 1]]},
        }
        objective = Rig("bert", terms=terms, student=STUDENT["bert"] | {"num_attention_heads": 4}).objective
        assert objective.layers("student_hidden") == {0, 1, 2}
        assert objective.layers("teacher_hidden") == {0, 1, 3}
        assert objective.layers("student_attention") == {2}
        assert objective.layers("teacher_attention") == {1}

    @pytest.mark.parametrize(
        ("family", "task", "divergence", "expected"),
        [
            ("bert", "classification", "kl", 4 * N),
            ("bert", "classification", "mse", 4 * sum(n * n for n in LENGTHS)),
            ("llama", "causal_lm", "mse", 4 * sum(n * (n + 1) // 2 for n in LENGTHS)),
            ("mistral", "causal_lm", "mse", 4 * sum(min(i + 1, 4) for n in LENGTHS for i in range(n))),
        ],
    )
    def test_counts(self, family, task, divergence, expected):
        terms = ALL_TERMS | {"attention": {"divergence": divergence}, "pairwise": {"layers": "last"}}
        rig = Rig(family, task, terms, {"num_hidden_layers": 2})
        examples = sum(n - 1 for n in LENGTHS) if task == "causal_lm" else ROWS
        counts = rig.counts([make_batch(task)])
        assert counts.dtype == torch.float64
        assert counts.tolist() == [examples, examples, *[32 * N] * 3, *[expected] * 2, ROWS]

    @pytest.mark.parametrize(
        ("family", "task"), [("bert", "classification"), *[(f, "causal_lm") for f in ("gpt2", "qwen2")]]
    )
    def test_a_perfect_student_has_nothing_to_learn(self, family, task):
        terms = ALL_TERMS | {
            "hidden": {"projector": "linear"},
            "attention": {"divergence": "kl"},
            "soft_label": {"divergence": "forward_kl"},
        }
        rig = Rig(family, task, terms)
        batch = make_batch(task)
        far = rig.step(batch)[1]
        rig.student.load_state_dict(rig.teacher.state_dict())
        with torch.no_grad():
            for projector in rig.objective.terms["hidden"].projectors.values():
                torch.nn.init.eye_(projector.weight)
        near = rig.step(batch)[1]
        for name in ("soft_label", "hidden", "attention", "pairwise"):
            assert far[name] > 1e-3, name
            assert abs(near[name]) < 1e-6 * far[name] + 1e-7, f"{name}: {near[name]} beside {far[name]}"
        assert near["task"] > 0.1
