"""Configs of task embedding that must be refused, for test_bad_input.py."""

# A config of single texts that works, see test_bad_input.py; what is changed in it, and what the line must hold.
SINGLE = {"task": "embedding", "terms": {"embedding": {}, "hidden": {}}}
PAIRS = {**SINGLE, "data.text": ["text", "label"]}  # any two columns of texts

EMBEDDING = {
    "contrast of single texts": (
        {**SINGLE, "terms": {"task": {}}},
        ["terms.task: got single texts", "expected data.text: [query, document]"],
    ),
    "contrast of judged pairs": (
        {**PAIRS, "terms": {"task": {}}, "data.label": "score"},
        ["terms.task: got pairs with scores (data.label: score)"],
    ),
    "contrast of one pair at once": (
        {**PAIRS, "terms": {"task": {}}, "train.micro_batch_size": 1},
        ["terms.task: got one example at a time"],
    ),
    "contrast in a stage": (
        {**SINGLE, "stages": [{"name": "a", "terms": {"task": {}}}]},
        ["stages.0.terms.task: got single texts"],
    ),
    "baseline of single texts": ({**SINGLE, "run.baseline": True}, ["run.baseline: got single texts"]),
    "soft labels": (
        {**SINGLE, "terms": {"soft_label": {}}},
        ["terms.soft_label: got task embedding", "expected terms.embedding"],
    ),
    "predictions of layers": ({**SINGLE, "terms": {"fdd": {}}}, ["terms.fdd: got task embedding"]),
    "vectors of another task": ({"terms.embedding": {}}, ["terms.embedding: got task classification"]),
    "pooling of another task": ({"student.pooling": "cls"}, ["student.pooling: got cls with task class"]),
    "prompts of another task": ({"data.prompts": ["a"]}, ["data.prompts: got prompts with task class"]),
    "temperature of another task": (
        {"terms.task.temperature": 0.1},
        ["terms.task.temperature: got 0.1 with task classification"],
    ),
    "no such pooling": (
        {**SINGLE, "student.pooling": "max"},
        ["student.pooling: got 'max'", "'mean', 'cls'"],
    ),
    "a temperature of 0": (
        {**PAIRS, "terms": {"task": {"temperature": 0}}},
        ["terms.task.temperature: got 0", "greater than 0"],
    ),
    "dims beyond the student": (
        {**SINGLE, "terms": {"embedding": {"dims": [64]}}},
        ["terms.embedding.dims: got [64] of a student 32 wide"],
    ),
    "dims of nothing": ({**SINGLE, "terms": {"embedding": {"dims": []}}}, ["terms.embedding.dims"]),
    "scores of single texts": (
        {**SINGLE, "data.label": "score"},
        ["data.label: got score with single texts"],
    ),
    "scores that are none": (
        {**PAIRS, "data.text": ["text", "score"], "data.label": "label"},
        ["dev.tsv, line 2: got label 'a' in column label, expected a finite number"],
    ),
    "scores that are not there": ({**PAIRS, "data.label": "gold"}, ["dev.tsv: got no column 'gold'"]),
    "scores of a dev set that is not there": (
        {**PAIRS, "data.dev": {"a": "dev.tsv", "b": "dev.tsv"}, "data.label": {"a": "gold", "c": "gold"}},
        ["data.label: got a column for c, expected names of dev sets: a, b"],
    ),
    "scores by name of a set without one": (
        {**PAIRS, "data.label": {"a": "gold"}},
        ["data.label: got a column for a, expected names of dev sets: data.dev: {NAME: FILE, ...}"],
    ),
    "labels by name of another task": (
        {"data.label": {"a": "label"}},
        ["data.label: got columns by dev set with task classification"],
    ),
    "contrast where all dev sets are judged": (
        {**PAIRS, "terms": {"task": {}}, "data.dev": {"a": "dev.tsv"}, "data.label": {"a": "score"}},
        ["terms.task: got pairs with scores"],
    ),
    "no second column": (
        {**SINGLE, "data.text": ["text", "document"]},
        ["train.tsv: got no column 'document'"],
    ),
    "prompts of another number": (
        {**PAIRS, "data.prompts": ["query: "]},
        ["data.prompts: got 1 for 2 columns", "one prompt for each column"],
    ),
    "classes": ({**SINGLE, "data.labels": ["a", "b"]}, ["data.labels: got class names with task embedding"]),
    "rows without a label": (
        {**SINGLE, "data.drop_unlabelled": True},
        ["data.drop_unlabelled: got true without data.label"],
    ),
    "noise of labels": ({**SINGLE, "data.label_noise": 0.1}, ["data.label_noise: got task embedding"]),
    "smoothing": ({**SINGLE, "train.label_smoothing": 0.1}, ["train.label_smoothing: got task embedding"]),
    "entropy": ({**SINGLE, "data.sampler": "entropy"}, ["data.sampler: got entropy with task embedding"]),
    "neighbours of pairs": (
        {**PAIRS, "terms": {"contrastive": {}}, "data.sampler": "hard_negative"},
        ["data.sampler: got hard_negative with pairs"],
    ),
    "single texts beside pairs": (
        {**PAIRS, "data.train": [{"train": "train.tsv"}, {"train": "train.tsv", "text": ["text"]}]},
        ["data.train.1.text: got 1 column(s), where the part before has 2"],
    ),
    "pairs beside single texts": (
        {**SINGLE, "data.train": [{"train": "train.tsv", "text": ["text", "label"]}]},
        ["data.train.0.text: got pairs, where data.text has single texts"],
    ),
    "contrast of single texts beside dev sets of pairs": (
        {**PAIRS, "terms": {"task": {}}, "data.train": [{"train": "train.tsv", "text": ["text"]}]},
        ["terms.task: got single texts"],
    ),
    "single texts without a prompt": (
        {
            **PAIRS,
            "data.prompts": ["query: ", "text: "],
            "data.train": [{"train": "train.tsv", "text": ["other"]}],
        },
        [
            "data.train.0.text: got column other, for which data.prompts has no prompt",
            "expected text or label",
        ],
    ),
    "domain fusion": ({**SINGLE, "student.domain": {"width": 8}}, ["student.domain: got task embedding"]),
    "texts to write after": (
        {**SINGLE, "evaluation.generate": 3},
        ["evaluation.generate: got task embedding"],
    ),
    "no such split of docstrings": (
        {**SINGLE, "data.source": "docstrings", "data.text": ["query", "document"], "data.train": "test"},
        ["got 'test' with pairs of source docstrings, expected train, dev, unseen"],
    ),
    "judged docstrings": (
        {
            **SINGLE,
            "data.source": "docstrings",
            "data.text": ["query", "document"],
            "data.train": "train",
            "data.dev": "dev",
            "data.label": "score",
        },
        ["data.label: got score with data.source docstrings, which has no scores"],
    ),
}
