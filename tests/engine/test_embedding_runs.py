"""Sentence encoders distilled without labels, from the data to the exported folder.

All runs on one rank share a process, since it takes longer to start than they do.
"""

import json
import random
import re

import pytest
import torch
import yaml
from scipy.stats import pearsonr
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, AutoTokenizer

from dsdistill.config import UserError, load
from dsdistill.engine import checkpoint
from dsdistill.engine.export import export
from dsdistill.models.sentence import Sentence, read_sentence, write_sentence
from tests.conftest import BERT, sentence
from tests.engine.launch import run_configs
from tests.engine.test_resume import losses
from tests.engine.test_run import command

PROMPTS = {"query": "find the ", "document": "a text of "}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory, tokenizer_dir):
    """Make teacher/, a sentence-transformers folder (4 layers of 48, the first token's state, prompts), and pairs."""
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    settings = BERT | {"num_hidden_layers": 4}
    model = AutoModel.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    model.save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder / "teacher")
    write_sentence(folder / "teacher", Sentence("cls", PROMPTS), 48, 32)
    rng = random.Random(3)
    for name, rows in (("train", 37), ("dev", 11)):
        lines = ["query\tdocument\tscore"]
        lines += [f"{sentence(rng, 6)}\t{sentence(rng)}\t{rng.random():.3f}" for _ in range(rows)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def settings(encoders, folder):
    """Return settings with pairs of queries and documents, every kind of term, and a student of another width."""
    return {
        "task": "embedding",
        "run": {"name": "pairs", "log_every": 1},
        "data": {
            "source": "files",
            "train": str(encoders / "train.tsv"),
            "dev": str(encoders / "dev.tsv"),
            "text": ["query", "document"],
            "max_length": 32,
            "cache": str(folder / "cache"),
        },
        "teacher": {"path": str(encoders / "teacher"), "zero_stage": 3},
        "student": {"config": BERT | {"hidden_size": 32, "num_hidden_layers": 2}, "zero_stage": 2},
        "terms": {
            "task": {"temperature": 0.1},
            "embedding": {"dims": [32, 16]},
            "hidden": {},
            "attention": {},
            "pairwise": {},
            "pkt": {},
        },
        "train": {"epochs": 2, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3},
    }


def write(folder, settings, name, **changes):
    case = settings | {"run": settings["run"] | {"name": name, "dir": str(folder / name)}}
    for section, values in changes.items():
        case[section] = case[section] | values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(case))
    return path


@pytest.fixture(scope="module")
def runs(encoders, data_dir, tmp_path_factory):
    """Return a folder with the runs one, judged and single, each on one rank, and the run two on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    base = settings(encoders, folder)
    start = {"run": base["run"] | {"evaluate_start": True}}
    unlabelled = folder / "unlabelled.tsv"
    unlabelled.write_text("query\tdocument\nthe sum\tsum of a row\n" + "a mean\tmean of a list\n" * 8)
    both = {"dev": dict.fromkeys(("alike", "search"), base["data"]["dev"]), "label": {"alike": "score"}}
    no_task = {name: term for name, term in base["terms"].items() if name not in ("task", "embedding")}
    judged = base | {"terms": no_task | {"embedding": {}}}
    judged |= {"student": {"from_teacher": [2, 4], "pooling": "mean"}}
    sources = [
        {"train": str(data_dir / "train.tsv"), "weight": 2.0},
        {"train": base["data"]["train"], "text": ["document"]},
    ]
    single = {"text": ["text"], "train": sources, "dev": str(data_dir / "dev.tsv")}
    run_configs(
        [
            write(folder, base, "one", train={"micro_batch_size": 8}),
            write(folder, judged | start, "judged", data=both | {"train": str(unlabelled)}),
            write(folder, base | {"terms": no_task | {"embedding": {}}}, "single", data=single),
        ],
        ranks=1,
    )
    run_configs([write(folder, base | start, "two", student={"zero_stage": 3})])
    export(str(folder / "one"), str(folder / "exported"))
    return folder


def scores(run, model="student"):
    return json.loads((run / "summary.json").read_text())["models"][model]


def vectors(folder, texts):
    """Return the vectors that plain transformers makes with a folder: the first token's state, normalised."""
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=32)
    with torch.no_grad():
        encoded = [tokenizer(text, truncation=True, return_tensors="pt") for text in texts]
        states = [model(**inputs).last_hidden_state[0, 0] for inputs in encoded]
    return normalize(torch.stack(states), dim=-1)


def test_two_ranks_are_one_and_each_pair_is_two_documents(runs):
    """Two ranks of 4 pairs are one of 8, the contrast included; 37 pairs leave a last step of 5.

    Two ranks score their student before the first step, which changes nothing of what follows.
    """
    expected, found = losses(runs / "one"), losses(runs / "two")
    assert len(expected) == len(found) == 10
    for want, line in zip(expected, found, strict=True):
        assert line["loss"] == pytest.approx(want["loss"], rel=1e-4)
        for name in ("task", "embedding", "hidden", "attention", "pairwise", "pkt"):
            assert line["terms"][name]["raw"] == pytest.approx(
                want["terms"][name]["raw"], rel=1e-4, abs=1e-7
            ), name
    lines = [json.loads(line) for line in (runs / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["documents"] for line in lines if "loss" in line][:6] == [16, 16, 16, 16, 10, 16]


def test_scores_of_search_are_those_of_the_exported_folder(runs, encoders):
    """Prompts are included, which teacher and student share; the vectors' widths differ, so they are not compared."""
    assert read_sentence(str(runs / "exported"), "out") == Sentence("cls", PROMPTS)
    rows = [line.split("\t") for line in (encoders / "dev.tsv").read_text().splitlines()[1:]]
    told = [json.loads(line) for line in (runs / "one" / "predictions.jsonl").read_text().splitlines()]
    assert len(told) == len({line["id"] for line in told}) == 11
    for model, folder in (("student", runs / "exported"), ("teacher", encoders / "teacher")):
        made = [
            vectors(folder, [prompt + row[i] for row in rows]) for i, prompt in enumerate(PROMPTS.values())
        ]
        ranks = 1 + (made[0] @ made[1].T).argsort(dim=1, descending=True).argsort(dim=1).diag()
        cosines = made[0] @ made[1].T
        for line, rank, best, row in zip(told, ranks.tolist(), cosines.argmax(1).tolist(), rows, strict=True):
            assert line["rank"][model] == rank
            for text, written in zip(row, line["texts"], strict=False):  # the score comes after the texts
                assert written.replace(" ", "").endswith(text.replace(" ", ""))
            assert line["first"].get(model) == (None if rank == 1 else told[best]["texts"][1])
        assert ranks.max() > 1
        found = scores(runs / "one", model)
        short = [normalize(of[:, :16], dim=-1) for of in made]
        places = (short[0] @ short[1].T).argsort(dim=1, descending=True).argsort(dim=1).diag()
        assert found["recall_10_of_16"] == pytest.approx((places < 10).double().mean().item())
        assert ("recall_10_of_32" in found) == (model == "teacher")  # the student's vectors are not longer
        assert found["recall_1"] == pytest.approx((ranks == 1).double().mean().item())
        assert found["mrr_10"] == pytest.approx(((ranks <= 10) / ranks).mean().item())
        assert {"recall_10", "ndcg_10"} <= found.keys() and "distance" not in found
    assert {"teacher_spearman", "teacher_pearson"} <= scores(runs / "one").keys()


def test_the_export_is_a_folder_of_the_library(runs):
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(runs / "exported"), device="cpu")
    texts = ["sum of a tensor", "the mean", "each row of a matrix is sorted " * 8]
    for kind, prompt in PROMPTS.items():
        made = torch.from_numpy(getattr(model, f"encode_{kind}")(texts))
        assert torch.allclose(made, vectors(runs / "exported", [prompt + text for text in texts]), atol=1e-6)


def test_judged_pairs_are_scored_again_as_they_were(runs):
    """Only one dev set names a column of people's scores; the train set has no scores."""
    wanted = {f"alike/{name}" for name in ("pearson", "spearman", "teacher_pearson", "distance")}
    wanted |= {"search/recall_10", "search/teacher_spearman"}
    before = scores(runs / "judged")
    assert wanted <= before.keys()
    assert not {"alike/recall_1", "search/pearson", "alike/loss", "alike/kl"} & before.keys()
    assert {"alike/pearson", "alike/spearman"} <= scores(runs / "judged", "teacher").keys()
    done = command("evaluate", "judged", cwd=runs)
    assert done.returncode == 0, done.stderr
    after = scores(runs / "judged")
    for name in wanted:
        assert after[name] == pytest.approx(before[name], rel=1e-5)


def test_the_start_is_the_student_as_it_was_cut(runs, encoders):
    """It is scored with plain transformers. It has moved since, and its speed is not reported.

    Evaluating the run keeps the score.
    """
    folder = runs / "judged" / "init"
    model, tokenizer = (
        AutoModel.from_pretrained(folder).double().eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    rows = [line.split("\t") for line in (encoders / "dev.tsv").read_text().splitlines()[1:]]
    cosines = []
    for row in rows:
        texts = [prompt + text for prompt, text in zip(PROMPTS.values(), row, strict=False)]
        with torch.no_grad():
            states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
        cosines.append(torch.cosine_similarity(states[0].mean(0), states[1].mean(0), dim=0).item())
    found = scores(runs / "judged", "start")
    assert found["alike/pearson"] == pytest.approx(
        pearsonr(cosines, [float(row[2]) for row in rows])[0], abs=1e-5
    )
    after = scores(runs / "judged")
    assert found["alike/pearson"] != pytest.approx(after["alike/pearson"], abs=1e-3)
    assert found["parameters"] == after["parameters"] and found["alike/distance"] > after["alike/distance"]
    assert "search/texts_per_second" in after and not any(name.endswith("_per_second") for name in found)
    first = json.loads((runs / "judged" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and first["evaluation"]["alike/pearson"] == found["alike/pearson"]


def test_a_report_of_several_methods(runs):
    """Each folder is a run; the same student on one rank and on two finds the same documents."""
    done = command("report", ".", cwd=runs)
    assert done.returncode == 0, done.stderr
    lines = [re.split("  +", line.strip()) for line in done.stdout.splitlines()]
    methods = ["judged", "one", "single", "two"]
    assert lines[0] == ["method", "teacher", "judged: start", "two: start", *methods]
    assert {"recall@10", "Spearman to teacher", "parameters", "sentences/s"} <= {line[0] for line in lines}
    for score in ("recall@1", "recall@10"):
        assert ["one − two", score, "+0.0000", "+0.0000 to +0.0000", "no"] in lines
    assert lines[-1] == ["./report.html"] and "one − teacher" in (runs / "report.html").read_text()


def test_single_texts_from_several_sources(runs):
    found = losses(runs / "single")
    assert found[-1]["terms"]["embedding"]["raw"] < found[0]["terms"]["embedding"]["raw"]
    assert "teacher_spearman" in scores(runs / "single")
    # The prompts of the teacher's folder are passed on; single texts get none.
    assert read_sentence(str(runs / "single" / "init"), "init") == Sentence("cls", PROMPTS)
    assert not {"recall_1", "pearson", "distance"} & scores(runs / "single").keys()


def test_a_run_goes_on_with_as_many_pairs_at_once_as_before(runs):
    """The contrast depends on the number of pairs at once; the vectors' own terms do not."""
    others = [f"terms.{name}=null" for name in ("pkt", "hidden", "attention", "pairwise")]
    config = load([str(runs / "one.yaml"), *others])
    assert checkpoint.check(str(runs / "one"), config, 1) is not None
    with pytest.raises(UserError, match=r"got 16, expected 8, as in this checkpoint: terms.task compares"):
        checkpoint.check(str(runs / "one"), config, 2)
    alone = load([str(runs / "one.yaml"), *others, "terms.task=null"])
    assert checkpoint.check(str(runs / "one"), alone, 2) is not None
