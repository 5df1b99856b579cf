"""A tokenizer made from the train texts, and lists of files."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

from dsdistill.config.schema import Data as Section
from dsdistill.data.sources import texts as texts_of
from dsdistill.data.wordpiece import train_tokenizer
from tests.data.rig import load, read

TEXTS = ["高血压患者能吃党参吗？", "The doctor said: Drink water", "糖尿病 water doctors", "高血压 the"] * 3


def vocabulary(folder: str) -> dict[str, int]:
    return AutoTokenizer.from_pretrained(folder).get_vocab()


def test_chinese_characters_are_words_and_the_rest_pieces(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(train_tokenizer(TEXTS, 120, str(tmp_path)))
    assert tokenizer.tokenize("高血压 Doctor") == ["高", "血", "压", "doctor"]
    assert tokenizer("高", "压")["input_ids"][0] == tokenizer.cls_token_id
    assert tokenizer("高", "压")["token_type_ids"] == [0, 0, 0, 1, 1]
    assert tokenizer.mask_token == "[MASK]" and tokenizer.pad_token_id == 0


def test_it_is_made_once_and_always_the_same(tmp_path):
    folder = train_tokenizer(TEXTS, 120, str(tmp_path / "a"))
    before = Path(folder, "tokenizer.json").stat().st_mtime_ns
    assert train_tokenizer(TEXTS, 120, str(tmp_path / "a")) == folder
    assert Path(folder, "tokenizer.json").stat().st_mtime_ns == before
    assert train_tokenizer(TEXTS[1:], 120, str(tmp_path / "a")) != folder
    code = "from dsdistill.data.wordpiece import train_tokenizer as train;"
    code += f"train({TEXTS!r}, 120, {str(tmp_path / 'b')!r})"
    subprocess.run([sys.executable, "-c", code], check=True)  # another process, another hash seed
    (other,) = (tmp_path / "b").iterdir()
    assert other.name == Path(folder).name and vocabulary(str(other)) == vocabulary(folder)


def test_files_of_unlike_columns_make_one_train_set(tmp_path):
    rows = {
        "qa.jsonl.gz": [{"id": "0", "question": "一 二", "answer": "三"}],
        "news.jsonl.gz": [{"id": "0", "label": "x", "text_a": "四 五", "text_b": ""}],
    }
    for name, lines in rows.items():
        (tmp_path / name).write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    section = Section(
        source="files",
        root=str(tmp_path),
        train=list(rows),
        dev="qa.jsonl.gz",
        text=["question", "answer"],
        cache=str(tmp_path / "cache"),
    )
    texts = list(texts_of(section, "masked_lm"))
    assert texts == ["一 二", "三", "四 五", ""]
    limited = section.model_copy(update={"max_train": 1})
    assert list(texts_of(limited, "masked_lm")) == ["一 二", "三"]
    tokenizer = AutoTokenizer.from_pretrained(train_tokenizer(texts, 100, section.cache))
    examples = load(section, "masked_lm", tokenizer).train
    assert examples.masking is not None and examples.labels is None and examples.lengths.tolist() == [6, 5]


def test_each_line_of_a_text_file_is_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("first line\n\nsecond line\n")
    section = Section(source="files", root=str(tmp_path), train="a.txt", dev="a.txt")
    assert list(texts_of(section, "masked_lm")) == ["first line", "second line"]
    assert len(list(texts_of(section, "causal_lm"))) == 1


def test_classes_of_several_files_are_numbered_together(tmp_path):
    for name, label in (("a.tsv", "yes"), ("b.tsv", "no")):
        (tmp_path / name).write_text(f"text\tlabel\nwords\t{label}\n")
    section = Section(source="files", root=str(tmp_path), train=["a.tsv", "b.tsv"], dev="a.tsv")
    found = read(section, "classification")
    assert found.labels == ("no", "yes") and found.train.labels == [1, 0]
