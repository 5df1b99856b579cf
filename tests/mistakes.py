"""Configs and data files that must be refused, for test_bad_input.py."""

import gzip

from tests.conftest import BERT

SMALL = {key: value for key, value in BERT.items() if key != "model_type"}
DEBERTA = {"model_type": "deberta", "relative_attention": True, "pos_att_type": ["c2p"], **SMALL}

# A config that works, what is changed in it, and what the line must hold.
CONFIG = {
    "unknown key": ({"train.lerning_rate": 1}, ["train.lerning_rate", "did you mean learning_rate?"]),
    "wrong type": ({"train.steps": "ten"}, ["train.steps", "'ten'", "integer"]),
    "temperature": (
        {"terms.soft_label.temperature": 0},
        ["terms.soft_label.temperature", "got 0", "greater than 0"],
    ),
    "batch sizes": ({"train.batch_size": 10}, ["train.batch_size: got 10", "train.micro_batch_size (4)"]),
    "a backend of other machines": (
        {"train.backend": "cuda"},
        ["train.backend: got cuda, which cannot run here", "auto, reference, chunked"],
    ),
    "rows of distances": (
        {"terms.pairwise": {"relation": "distance", "rows": 4}},
        ["terms.pairwise.rows: got 4 with relation: distance", "expected cosine or dot"],
    ),
    "no rows": (
        {"terms.attention.rows": 0},
        ["terms.attention.rows: got 0, expected greater than or equal to 1"],
    ),
    "no term": ({"terms": {}}, ["terms: got no term"]),
    "DeepSpeed key": (
        {"student.deepspeed": {"zero_optimisation": {}}},
        ["zero_optimisation", "zero_optimization?"],
    ),
    "DeepSpeed key of a section": (
        {"student.deepspeed": {"zero_optimization": {"overlap_com": True}}},
        [
            "student.deepspeed.zero_optimization.overlap_com: got an unknown DeepSpeed key",
            "mean overlap_comm?",
        ],
    ),
    "DeepSpeed key further down": (
        {"teacher.deepspeed": {"zero_optimization": {"offload_param": {"devise": "cpu"}}}},
        ["teacher.deepspeed.zero_optimization.offload_param.devise", "did you mean device?"],
    ),
    "DeepSpeed value": (
        {"student.deepspeed": {"zero_optimization": {"reduce_bucket_size": "big"}}},
        ["student.deepspeed.zero_optimization.reduce_bucket_size: got 'big'", "integer"],
    ),
    "no gradient norm": (
        {"student.deepspeed": {"zero_optimization": {"compute_grad_norm": False}}, "train.clip": 0.0},
        ["student.deepspeed.zero_optimization.compute_grad_norm: got false", "expected true"],
    ),
    "DeepSpeed's checkpoints": (
        {"student.deepspeed": {"checkpoint": {"checkpoint_serialization": False}}},
        ["student.deepspeed.checkpoint: got ", "expected run.save_every and run.keep instead"],
    ),
    "DeepSpeed's elastic checkpoints": (
        {"student.deepspeed": {"zero_optimization": {"elastic_checkpoint": True}}},
        ["student.deepspeed.zero_optimization.elastic_checkpoint: got true, expected false"],
    ),
    "sums of gradients that ZeRO-1 cannot watch": (
        {
            "student.deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}},
            "student.zero_stage": 1,
            "train.dtype": "bf16",
        },
        ["student.deepspeed.data_types: got {'grad_accum_dtype': 'fp32'} in bf16 at stage 1", "zero_stage=2"],
    ),
    "DeepSpeed rule": (
        {"student.deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}},
        ["student.deepspeed.zero_optimization: got ", "only supported for ZeRO Stage 3"],
    ),
    "DeepSpeed monitor": (
        {"student.deepspeed": {"tensorboard": {"enable": True}}},
        ["student.deepspeed.tensorboard.enable", "did you mean enabled?"],
    ),
    "fp16 on CPU": ({"train.dtype": "fp16"}, ["train.dtype: got fp16 without a GPU", "fp32 or bf16"]),
    "missing file": ({"data.train": "nowhere.tsv"}, ["nowhere.tsv: got no such file"]),
    "unknown extension": ({"data.train": "train.xyz"}, ["train.xyz", "'.xyz'"]),
    "text column": ({"data.text": ["txt"]}, ["train.tsv: got no column 'txt'", "text"]),
    "label column": ({"data.label": "lable"}, ["train.tsv: got no column 'lable'", "label"]),
    "smoothing of scores": (
        {"train.label_smoothing": 0.1, "task": "regression", "data.label": "score"},
        ["train.label_smoothing: got task regression, expected task classification, causal_lm or masked_lm"],
    ),
    "smoothing that nobody reads": (
        {"train.label_smoothing": 0.1, "terms": {"hidden": {}}},
        ["train.label_smoothing: got no term that reads labels"],
    ),
    "weights of scores": (
        {"train.class_weights": [1, 2], "task": "regression", "data.label": "score"},
        ["train.class_weights: got weights with task regression, expected classification"],
    ),
    "positive class of scores": (
        {"evaluation.positive_class": "a", "task": "regression", "data.label": "score"},
        ["evaluation.positive_class: got a with task regression"],
    ),
    "label names": ({"data.labels": ["a", "b"]}, ["train.tsv, line 4", "'c'", "2 classes a, b"]),
    "map out of range": (
        {"terms.hidden.layers": [[1, 9]]},
        ["terms.hidden.layers: got teacher layer 9", "1 to 4"],
    ),
    "map beyond student": (
        {"terms.attention.layers": [[3, 4]]},
        ["terms.attention.layers", "student layer 3", "1 to 2"],
    ),
    "deeper student": (
        {"student": {"config": {**BERT, "num_hidden_layers": 5}}},
        ["terms.hidden.layers: got a student of 5 layers and a teacher of 4"],
    ),
    "heads": (
        {"student": {"config": {**BERT, "num_attention_heads": 2}}},
        ["terms.attention.heads: got match for 2 student and 4 teacher heads", "heads: mean"],
    ),
    "mean of scores": (
        {"terms.attention": {"heads": "mean", "divergence": "score_mse"}},
        ["terms.attention.divergence: got score_mse with heads: mean"],
    ),
    "groups of heads": (
        {
            "student": {"config": {**BERT, "num_attention_heads": 3}},
            "terms.attention": {"heads": "group"},
        },
        ["terms.attention.heads: got group for 3 student and 4 teacher heads", "heads: mean"],
    ),
    "groups of scores": (
        {"terms.attention": {"heads": "group", "divergence": "score_mse"}},
        ["terms.attention.divergence: got score_mse with heads: group"],
    ),
    "layers beyond the teacher": (
        {"student": {"from_teacher": [2, 5]}},
        ["student.from_teacher: got layer 5", "layers 1 to 4"],
    ),
    "small vocabulary": (
        {"student": {"config": {**BERT, "vocab_size": 20}}},
        ["student.config.vocab_size: got 20", "entries"],
    ),
    "small vocabulary of the teacher": (
        {"teacher": {"config": {**BERT, "vocab_size": 20}}},
        ["teacher.config.vocab_size: got 20", "entries"],
    ),
    "long sequences": (
        {"data.max_length": 65},
        ["data.max_length: got 65", "at most 64, the number of the student's positions"],
    ),
    "structure": (
        {"student.config": {"num_hidden_layers": 3}},
        ["student.config.num_hidden_layers: got 3, expected 2, as in the weights"],
    ),
    "unknown architecture key": (
        {"student.config": {"layers": 3}},
        ["student.config.layers: got an unknown key"],
    ),
    "unknown architecture": (
        {"student": {"config": {"model_type": "brt"}}},
        ["student.config.model_type: got 'brt'"],
    ),
    "attention that hides": (
        {"student": {"config": DEBERTA}},
        ["student: got model type deberta, with 0 of 2 attention"],
    ),
    "relative bias": (
        {"student": {"config": {"model_type": "mpnet", **SMALL}}},
        ["student: got model type mpnet"],
    ),
    "shared layers": (
        {"student": {"config": {"model_type": "albert", **SMALL}}},
        ["student: got model type albert"],
    ),
    "encoder-decoder": (
        {
            "student": {"config": {"model_type": "t5", "vocab_size": 64, "num_layers": 2}},
            "terms": {"task": {}},
        },
        ["student: got model type t5, an encoder-decoder"],
    ),
    "unequal windows": (
        {
            "student": {
                "config": {
                    "model_type": "modernbert",
                    "vocab_size": 64,
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "max_position_embeddings": 64,
                    "local_attention": 8,
                    "layer_types": ["sliding_attention", "full_attention"],
                }
            }
        },
        ["terms.attention.layers: got student layer 1 with two-sided attention in a window of 5"],
    ),
    "missing teacher": ({"teacher.path": "./nowhere"}, ["teacher.path: got no such folder: ./nowhere"]),
    "hub teacher offline": ({"teacher.path": "some/model"}, ["teacher.path: got some/model ("]),
    "regression on text": (
        {"task": "regression", "terms": {"task": {}}},
        ["train.tsv, line 2", "'a'", "number"],
    ),
    "long texts that run on": (
        {"task": "causal_lm", "data.packing": False, "data.overlong": "drop"},
        ["data.overlong: got drop with data.packing false, which continues a text"],
    ),
    "language model of an encoder": ({"task": "causal_lm", "data.train": "t.txt"}, ["got model type bert"]),
    "no tokenizer": (
        {"teacher": {"config": BERT}, "student": {"config": BERT}, "terms": {"task": {}}},
        ["data.tokenizer: got null, and no model with a path"],
    ),
    "tokenizer folder": ({"data.tokenizer": "./nowhere"}, ["data.tokenizer: got no such folder"]),
    "hub data offline": ({"data.source": "nobody/nothing"}, ["data.source: got nobody/nothing"]),
    "recipe": ({"teacher": {"recipe": "nowhere.yaml"}}, ["nowhere.yaml: got no such file"]),
    "negative rate": ({"train.learning_rate": -1.0}, ["train.learning_rate: got -1.0", "greater than 0"]),
    "rate NaN": ({"train.learning_rate": float("nan")}, ["train.learning_rate: got nan", "finite"]),
    "infinite decay": ({"train.weight_decay": float("inf")}, ["train.weight_decay: got inf", "finite"]),
    "rate as text": ({"train.learning_rate": "fast"}, ["train.learning_rate: got 'fast'", "number"]),
    "no steps": ({"train.steps": 0}, ["train.steps: got 0", "greater than or equal to 1"]),
    "half an epoch": ({"train.epochs": 0.5}, ["train.epochs: got 0.5", "integer"]),
    "warm-up of all": ({"train.warmup": 1.0}, ["train.warmup: got 1.0", "less than 1"]),
    "negative seed": ({"run.seed": -1}, ["run.seed: got -1"]),
    "huge seed": ({"run.seed": 2**70}, ["run.seed: got 1180591620717411303424"]),
    "name with a slash": ({"run.name": "a/b"}, ["run.name: got 'a/b'"]),
    "name above": ({"run.name": ".."}, ["run.name: got '..'"]),
    "unknown task": ({"task": "translation"}, ["task: got 'translation'", "classification"]),
    "unknown optimizer": ({"train.optimizer": "lion"}, ["train.optimizer: got 'lion'", "adamw"]),
    "unknown scheduler": ({"train.scheduler": "step"}, ["train.scheduler: got 'step'", "linear"]),
    "unknown dtype": ({"train.dtype": "float32"}, ["train.dtype: got 'float32'", "fp32"]),
    "unknown term": ({"terms.hiden": {}}, ["terms.hiden: got an unknown key", "did you mean hidden?"]),
    "unknown divergence": ({"terms.attention.divergence": "l2"}, ["terms.attention.divergence: got 'l2'"]),
    "negative weight": ({"terms.hidden.weight": -1}, ["terms.hidden.weight: got -1"]),
    "weight NaN": ({"terms.hidden.weight": float("nan")}, ["terms.hidden.weight: got nan"]),
    "layers as text": ({"terms.hidden.layers": "all"}, ["terms.hidden.layers: got 'all'", "uniform, skip"]),
    "layer zero": ({"terms.hidden.layers": [[0, 1]]}, ["terms.hidden.layers: got"]),
    "no layer": ({"terms.hidden.layers": []}, ["terms.hidden.layers: got []"]),
    "section as a number": ({"train": 3}, ["train: got 3"]),
    "section as a list": ({"terms": ["hidden"]}, ["terms: got ['hidden']"]),
    "section that is null": ({"data": "null"}, ["data: got 'null'"]),
    "switch as text": ({"run.baseline": "maybe"}, ["run.baseline: got 'maybe'", "boolean"]),
    "ZeRO stage of the student": ({"student.zero_stage": 4}, ["student.zero_stage: got 4", "1, 2 or 3"]),
    "ZeRO stage of the teacher": ({"teacher.zero_stage": 2}, ["teacher.zero_stage: got 2", "0 or 3"]),
    "evaluation now and then": ({"run.evaluate_every": "hour"}, ["run.evaluate_every: got 'hour'"]),
    "no patience": ({"run.timeout": 0}, ["run.timeout: got 0"]),
    "stage without a name": ({"stages": [{"share": 1}]}, ["stages.0.name: got nothing"]),
    "stages of one name": (
        {"stages": [{"name": "a"}, {"name": "a"}]},
        ["stages: got names ['a', 'a']", "a different name"],
    ),
    "stage without a share": ({"stages": [{"name": "a", "share": 0}]}, ["stages.0.share: got 0"]),
    "more stages than steps": (
        {"stages": [{"name": "a"}, {"name": "b"}], "train.steps": 1},
        ["train.steps: got 1", "each of 2 stages"],
    ),
    "smooth without a stage before": (
        {"stages": [{"name": "a", "terms": {"smooth": {}}}]},
        ["stages.0.terms.smooth: got no stage before"],
    ),
    "frozen by no name": (
        {"stages": [{"name": "a", "freeze": ["*.nothing.*"]}]},
        ["stages.0.freeze: got *.nothing.*, which matches no parameter"],
    ),
    "frozen throughout": (
        {"stages": [{"name": "a", "freeze": ["*"]}]},
        ["stages.0.freeze: got patterns that match every parameter"],
    ),
    "student frozen by no name": (
        {"student.freeze": ["*.nothing.*"]},
        ["student.freeze: got *.nothing.*, which matches no parameter"],
    ),
    "nothing left to train": (
        {"student.freeze": ["*"]},
        ["student.freeze: got patterns that match every parameter"],
    ),
    "three texts": ({"data.text": ["a", "b", "c"]}, ["data.text: got ['a', 'b', 'c']"]),
    "one class named": ({"data.labels": ["a"]}, ["data.labels: got ['a']"]),
    "noise above all": ({"data.label_noise": 1.5}, ["data.label_noise: got 1.5"]),
    "no data": ({"data.fraction": 0}, ["data.fraction: got 0"]),
    "temperature of no sampler": (
        {"data.sampler_temperature": 1.0},
        ["data.sampler_temperature: got a value with sampler uniform"],
    ),
    "prompts of a classifier": (
        {"evaluation.generate": 5},
        ["evaluation.generate: got task classification"],
    ),
    "architecture without a type": (
        {"student": {"config": {"hidden_size": 32}}},
        ["student.config: got no model_type"],
    ),
    "architecture that contradicts itself": (
        {"student": {"config": {**BERT, "hidden_size": 50}}},
        ["student: got model type bert", "hidden size (50)"],
    ),
    "architecture of a wrong type": (
        {"student": {"config": {**BERT, "hidden_size": "big"}}},
        ["student.config", "big"],
    ),
    "a vision model": ({"student": {"config": {"model_type": "vit"}}}, ["student", "vit"]),
    "longer than the data": ({"data.max_dev": 0}, ["data.max_dev: got 0"]),
}

HEADER = "text\tlabel\n"


def _broken_parquet() -> bytes:
    """Write a parquet file with a text that is not UTF-8, as other programs may do."""
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.array([b"\xed\xa0\x80"]).cast(pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(len(text), text.buffers()[1], text.buffers()[2])
    whole = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": text, "label": ["a"]}), whole)
    return whole.getvalue().to_pybytes()


# Data files: name, bytes, further changes of the config, what the line must hold beside the file.
DATA = {
    "empty file": ("train.tsv", b"", {}, ["an empty file"]),
    "header alone": ("train.tsv", HEADER.encode(), {}, ["got no rows"]),
    "one class": ("train.tsv", f"{HEADER}the sum\ta\n".encode(), {}, ["one class, 'a'"]),
    "label of no class": (
        "dev.tsv",
        f"{HEADER}the sum\td\n".encode(),
        {},
        ["line 2: got label 'd'", "a, b, c"],
    ),
    "index of no class": ("dev.tsv", f"{HEADER}the sum\t3\n".encode(), {}, ["line 2: got label '3'"]),
    "no label": ("dev.tsv", f"{HEADER}the sum\t\n".encode(), {}, ["line 2: got no label"]),
    "empty text": ("dev.tsv", f"{HEADER}\ta\n".encode(), {}, ["line 2", "an empty text"]),
    "spaces alone": ("dev.tsv", f"{HEADER}  \ta\n".encode(), {}, ["line 2", "an empty text"]),
    "blank texts alone": (
        "train.tsv",
        b"text\n \n  \n",
        {"task": "masked_lm", "terms": {"task": {}}, "student.new_head": True},
        ["got only blank rows in column text", "expected some text"],
    ),
    "a missing text among blanks": (
        "train.jsonl",
        b'{"text": " "}\n{"text": "the sum"}\n{"text": null}\n',
        {"task": "masked_lm", "terms": {"task": {}}, "student.new_head": True},
        ["line 3: got no text"],
    ),
    "ragged rows": ("dev.tsv", f"{HEADER}the\tsum\ta\n".encode(), {}, ["line 2: got 3 fields"]),
    "latin-1": ("dev.tsv", f"{HEADER}grün\ta\n".encode("latin-1"), {}, ["line 2: got byte 0xfc", "UTF-8"]),
    "UTF-16": ("dev.tsv", f"{HEADER}sum\ta\n".encode("utf-16"), {}, ["line 1: got byte 0xff", "UTF-8"]),
    "NUL bytes": ("dev.tsv", b"text\tlabel\n\0\0\ta\n", {}, ["line 2", "NUL"]),
    "columns twice": ("dev.tsv", b"text\ttext\nx\ty\n", {}, ["line 1: got columns"]),
    "an open quote": ("dev.csv", b'text,label\n"x,a\n', {}, ["line 2"]),
    "rows of JSON that are none": ("dev.jsonl", b"text\n", {}, ["line 1: got Expecting value"]),
    "a list of JSON": ("dev.jsonl", b"[1]\n", {}, ["line 1: got a list"]),
    "a row without its text": ("dev.jsonl", b'{"label": "a"}\n', {}, ["no column 'text'"]),
    "a number as text": ("dev.jsonl", b'{"text": 5, "label": "a"}\n', {}, ["line 1: got a int in text"]),
    "deep JSON": ("dev.jsonl", b"[" * 100_000, {}, ["line 1"]),
    "half a character": (
        "dev.jsonl",
        b'{"text": "the sum", "label": "a"}\n{"text": "\\ud800", "label": "a"}\n',
        {},
        [r"line 2: got '\ud800'", "expected valid Unicode text"],
    ),
    "half a character in a label": (
        "dev.jsonl",
        b'{"text": "sum", "label": "\\uDFFF"}\n',
        {},
        ["line 1: got"],
    ),
    "half a character in parquet": ("dev.parquet", _broken_parquet(), {}, ["parquet"]),
    "a label of 5,000 digits": (
        "train.tsv",
        f"{HEADER}the sum\t{'1' * 5000}\nthe mean\t2\n \t2\n".encode(),  # a name, then
        {},
        ["line 4: got an empty text"],
    ),
    "a number of 5,000 digits": (
        "dev.jsonl",
        b'{"text": "sum", "label": ' + b"1" * 5000 + b"}\n",
        {},
        ["line 1: got", "digits"],
    ),
    "a huge label": ("dev.tsv", f"{HEADER}sum\t{'x' * 3_000_000}\n".encode(), {}, ["line 2: got label 'xxx"]),
    "a huge row of TSV": (
        "dev.tsv",
        f"{HEADER}sum\ta".encode() + b"\tx" * 999_999,
        {},
        ["line 2: got 100"],
    ),
    "a huge row of CSV": (
        "dev.csv",
        f"text,label\nsum,{'x' * 3_000_000}\n".encode(),
        {},
        ["line 2: got label"],
    ),
    "a huge open quote": ("dev.csv", f'text,label\n"{"x " * 999_999},a\n'.encode(), {}, ["line 2"]),
    "a huge row of JSON": (
        "dev.jsonl",
        f'{{"text": "{"x " * 999_999}"'.encode(),
        {},
        ["line 1: got Expecting"],
    ),
    "a huge header": ("dev.tsv", f"{'x' * 3_000_000}\nthe sum\n".encode(), {}, ["got no column 'text'"]),
    "not parquet": ("dev.parquet", b"PAR1", {}, ["a parquet file"]),
    "not gzip": ("dev.tsv.gz", HEADER.encode(), {}, ["BadGzipFile"]),
    "gzip cut short": ("dev.tsv.gz", gzip.compress(HEADER.encode() * 99)[:-9], {}, ["EOFError"]),
    "a sheet": ("dev.xlsx", b"PK", {}, ["extension '.xlsx'", ".tsv"]),
    "score of words": (
        "dev.tsv",
        f"{HEADER}the sum\tmuch\n".encode(),
        {"task": "regression", "data.label": "label", "terms": {"task": {}}, "data.train": "SAME"},
        ["line 2: got label 'much'", "a finite number"],
    ),
    "a score beyond all floats": (
        "dev.jsonl",
        b'{"text": "sum", "label": 1' + b"0" * 400 + b"}\n",
        {"task": "regression", "terms": {"task": {}}, "data.train": "SAME"},
        ["line 1: got label 1000", "a finite number"],
    ),
    "score NaN": (
        "dev.tsv",
        f"{HEADER}the sum\tnan\n".encode(),
        {"task": "regression", "terms": {"task": {}}, "data.train": "SAME"},
        ["line 2: got label 'nan'"],
    ),
}
