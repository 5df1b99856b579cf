"""The pages of this repository: their links, their blocks of code, and tables that must be complete.

Blocks run, except those under a marker: these need a GPU, the hub or minutes, and are only parsed.
"""

import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
import torch
import typer
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dsdistill import cli
from dsdistill.bench import picture
from dsdistill.config import UserError, load
from dsdistill.models.build import locate
from tests.conftest import BERT, sentence
from tests.data.templates import PLAIN
from tests.engine.launch import free_port, launch_command, run_configs
from tests.engine.test_corpora import LLAMA

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.glob("**/*.md")
    if not {
        part for part in path.relative_to(ROOT).parts if part.startswith(".") or part in ("runs", "build")
    }
)
MARKERS = ("gpu", "hub", "minutes")
TUTORIAL = "launch/examples/README.md"
# Pages that may have blocks without a marker, since the tests below run those blocks.
RUN = {
    "bash": {TUTORIAL},
    "python": {TUTORIAL, "README.md", "dsdistill/README.md"},
    "yaml": {"README.md", "configs/README.md"},
    "json": {"dsdistill/bench/results/README.md"},
}
KNOWN = {"source", "pip", "pre-commit", "ruff", "mypy", "mkdir", "cat", "curl", "kill"}  # other programs
LINK = re.compile(r"(?:\]\(|src=\"|srcset=\")([^)\"\s]+)")


class Block(NamedTuple):
    """Block holds a fenced block: its page, its language, the marker above it, its text."""

    page: str
    language: str
    marker: str | None
    text: str
    line: int


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str) -> Iterator[Block]:
    lines = text_of(page).splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = number
            continue
        language = lines[start].strip().strip("`")
        found = re.fullmatch(r"<!-- (\w+) -->", lines[start - 1].strip())
        yield Block(
            page, language, found and found[1], "\n".join(lines[start + 1 : number]) + "\n", start + 1
        )
        start = None
    assert start is None, f"{page}: a block that does not end"


BLOCKS = [block for page in PAGES for block in blocks_of(page) if block.language]


def blocks(language: str) -> pytest.MarkDecorator:
    found = [block for block in BLOCKS if block.language == language]
    return pytest.mark.parametrize("block", found, ids=lambda block: f"{block.page}:{block.line}")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_a_block_runs_or_says_why_not(block):
    assert block.language in RUN
    assert block.marker in (None, *MARKERS)
    assert block.marker or block.page in RUN[block.language]


@blocks("python")
def test_python_compiles(block):
    compile(block.text, f"{block.page}:{block.line}", "exec")


@blocks("json")
def test_json_is_read(block):
    json.loads(block.text)


@blocks("yaml")
def test_yaml_loads(block, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(block.text, encoding="utf-8")
    load([str(path)])


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of a script, without variables, comments, pipes and here-documents."""
    text = re.sub(r"<<'(\w+)'\n.*?\n\1\n", "\n", text, flags=re.DOTALL).replace("\\\n", " ")
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set("&|;"):
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def check_ours(words: list[str]) -> None:
    """Parse a command of dsdistill; if its first setting is a file, load it with the settings after it."""
    group = typer.main.get_command(cli.app)
    assert words and words[0] in group.commands, words
    context = group.commands[words[0]].make_context(words[0], list(words[1:]))
    settings = context.params.get("settings") or []
    if settings and (ROOT / settings[0]).is_file():
        load(settings)
    elif settings and words[0] != "compare":
        assert settings[0].isupper() or settings[0].startswith("runs/"), settings[0]
    methods = context.params.get("methods")
    assert methods is None or methods.isupper() or (ROOT / methods).is_file()


def check_module(words: list[str]) -> None:
    if words[0] == "dsdistill":
        check_ours(words[1:])
        return
    assert importlib.util.find_spec(words[0]), words
    if words[0] == "pytest":
        for word in words[1:]:
            assert not word.startswith("tests/") or (ROOT / word.split("::")[0]).exists(), word
    elif words[0].startswith("dsdistill."):
        source = Path(importlib.util.find_spec(words[0]).origin).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in words[1:] if word.startswith("--")), words


def check_command(words: list[str]) -> None:
    """Fail if a command, an option or a file does not exist."""
    name, rest = words[0], words[1:]
    if name == "dsdistill":
        check_ours(rest)
    elif name == "deepspeed":
        assert rest[rest.index("--module") + 1] == "dsdistill", words
        check_ours(rest[rest.index("--module") + 2 :])
    elif name == "python" and rest[0] == "-m":
        check_module(rest[1:])
    elif name == "python" or name.startswith("./"):
        script = ROOT / (rest[0] if name == "python" else name)
        assert script.is_file() and (name == "python" or os.access(script, os.X_OK)), words
        options = [word.split("=")[0] for word in rest if word.startswith("--")]
        text = script.read_text(encoding="utf-8")
        assert all(re.search(rf"{option}(?![\w-])", text) for option in options), words
        for word in rest:
            assert not word.startswith("configs/") or (ROOT / word).is_file(), words
    else:
        assert name in KNOWN, words


@blocks("bash")
def test_commands_exist(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = list(commands(block.text))
    assert found
    for words in found:
        check_command(words)


@pytest.mark.parametrize(
    "line",
    [
        "dsdistill train configs/quickstart.yaml train.stepps=3",
        "dsdistill train configs/nowhere.yaml",
        "dsdistill distil CONFIG",
        "dsdistill plan CONFIG --gpus 8",
        "deepspeed --num_gpus 8 --module dsdistill train configs/nowhere.yaml",
        "python -m pytest tests/nowhere.py",
        "python -m dsdistill.bench.preflight --matches x",
        "python launch/examples/nowhere.py",
        "./launch/gpu_check.sh OUT_DIR --dry",
        "cd x && ./launch/nowhere.sh",
    ],
)
def test_commands_that_do_not_exist_are_found(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    usage_error = typer.BadParameter.__base__
    with pytest.raises((AssertionError, UserError, usage_error)):
        for words in commands(line):
            check_command(words)


def bert(folder: Path, tokenizer: Path) -> None:
    """Write a classifier of 6 layers and 3 classes."""
    torch.manual_seed(0)
    settings = BERT | {"num_hidden_layers": 6, "num_labels": 3}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.id2label, config.label2id = dict(enumerate("abc")), {name: i for i, name in enumerate("abc")}
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def llama(folder: Path, tokenizer: Path) -> None:
    """Write a causal language model of 6 layers, whose tokenizer has a chat template."""
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer)
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    words.chat_template = PLAIN
    words.save_pretrained(folder)
    settings = LLAMA | {"num_hidden_layers": 6, "eos_token_id": words.eos_token_id}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_data(folder: Path) -> None:
    """Write the files that the configs of the pages name."""
    rng = random.Random(0)
    folder.mkdir()

    def conversation() -> str:
        roles = ("user", "assistant")
        return json.dumps({"messages": [{"role": role, "content": sentence(rng, 6)} for role in roles]})

    for name, count in (("train", 32), ("dev", 8)):
        lines = [
            f"{sentence(rng)}\t{'abc'[i % 3]}\t{sentence(rng, 6)}\t{sentence(rng)}" for i in range(count)
        ]
        text = "\n".join(["sentence\tlabel\tquery\tdocument", *lines]) + "\n"
        (folder / f"{name}.tsv").write_text(text, encoding="utf-8")
    shutil.copy(folder / "train.tsv", folder / "pairs.tsv")
    for name, count in (("chats", 32), ("dev", 8)):
        (folder / f"{name}.jsonl").write_text(
            "".join(conversation() + "\n" for _ in range(count)), encoding="utf-8"
        )


def test_configs_train(tmp_path, tokenizer_dir):
    """Each config of the pages trains a student of small teachers on small files: two steps of a few short texts."""
    write_data(tmp_path / "data")
    bert(tmp_path / "classification", tokenizer_dir)
    llama(tmp_path / "causal_lm", tokenizer_dir)
    (tmp_path / "embedding").symlink_to(locate("minilm", "teacher"))
    paths = []
    for block in BLOCKS:
        if block.language != "yaml" or block.marker:
            continue
        settings = yaml.safe_load(block.text)
        task = settings.get("task", "classification")
        assert settings["teacher"]["path"] in ("teacher", "minilm")
        settings["teacher"]["path"] = str(tmp_path / task)
        settings["run"] = {"dir": str(tmp_path / f"run-{len(paths)}")}
        settings["data"] |= {
            "root": str(tmp_path / "data"),
            "cache": str(tmp_path / "cache"),
            "max_length": 32,
        }
        settings["train"] = settings.get("train", {}) | {"steps": 2, "batch_size": 8, "micro_batch_size": 4}
        settings["train"].pop("epochs", None)
        paths.append(tmp_path / f"config-{len(paths)}.yaml")
        paths[-1].write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert len(paths) == 5
    run_configs(paths, ranks=1)
    for number in range(len(paths)):
        assert json.loads((tmp_path / f"run-{number}" / "summary.json").read_text())["steps"] == 2


def python_of(page: str) -> str:
    (block,) = [block for block in BLOCKS if block.page == page and block.language == "python"]
    return block.text


def test_the_loop_of_the_readme_runs(tmp_path, tokenizer_dir, monkeypatch):
    """The loop changes the student and leaves the teacher as it is."""
    bert(tmp_path / "teacher", tokenizer_dir)
    teacher, student = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher", num_hidden_layers=depth)
        for depth in (6, 2)
    )
    ids = torch.randint(5, 30, (3, 4, 9))
    loader = [
        {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows[:, 0] % 3} for rows in ids
    ]
    before = [
        {name: value.clone() for name, value in model.state_dict().items()} for model in (teacher, student)
    ]
    monkeypatch.chdir(tmp_path)
    exec(python_of("README.md"), {"teacher": teacher, "student": student, "loader": loader})
    kept, moved = (
        [torch.equal(value, old[name]) for name, value in model.state_dict().items()]
        for model, old in zip((teacher, student), before, strict=True)
    )
    assert all(kept) and not all(moved)
    assert (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").config.num_hidden_layers == 2
    )


def test_the_operators_example_runs():
    names = ("student_query", "student_key", "teacher_query", "teacher_key")
    given = {name: torch.randn(2, 4, 9, 8, requires_grad=name.startswith("student")) for name in names}
    exec(python_of("dsdistill/README.md"), given | {"mask": torch.ones(2, 9, dtype=torch.bool)})
    assert all(given[name].grad.any() for name in names[:2]) and given["teacher_query"].grad is None


def test_the_tutorial_as_typed(tmp_path):
    """All blocks run in order in one shell, on fewer texts and steps, and end with an answer of the served student."""
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    port = free_port()
    script = ["set -euo pipefail", 'dsdistill() { python -m dsdistill "$@"; }']
    for block in BLOCKS:
        if block.page == TUTORIAL and not block.marker:
            script.append(block.text if block.language == "bash" else f"python - <<'PY'\n{block.text}PY")
    text = "\n".join(script)
    few = "data.max_train=64 data.max_dev=16"
    changes = {"train.epochs=4": f"train.steps=2 {few}", "epochs: 2": "steps: 2"}
    changes |= {"max_train: 2400": "max_train: 64", "max_dev: 800": "max_dev: 16", "8000": str(port)}
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    environment = launch_command()[1]
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (answer,) = re.findall(r"^\[\{\".*\}\]$", done.stdout, re.MULTILINE)
    (probabilities,) = json.loads(answer)
    assert len(probabilities) > 1 and sum(probabilities.values()) == pytest.approx(1, abs=1e-2)
    assert (tmp_path / "runs/own-loop/model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Files that a page links to exist, and so do the headings behind a #."""
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            made = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in made, link


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page):
    """These are paths in backquotes from the root; NAME and the like stand for any name."""
    for name in re.findall(r"`((?:configs|csrc|dsdistill|launch|tests)/[\w./-]+\.\w+)`", text_of(page)):
        assert re.search("[A-Z]{3}", Path(name).name) or (ROOT / name).exists(), name


def test_the_first_screen_is_short():
    assert text_of("README.md").count("\n") <= 130


def reads(path: Path) -> bool:
    """Return whether a file is source that may read a variable; this file only names some."""
    return (
        (path.suffix in (".py", ".sh", ".slurm", ".cpp", ".h", ".cu") or path.name == "run")
        and path.is_file()
        and path.name != Path(__file__).name
    )


def test_variables_of_the_environment_are_all_in_their_table():
    """The table has exactly the variables that our files read; each is read by the files that its row names."""
    ours = [
        path for name in ("dsdistill", "csrc", "launch", "tests", ".ci") for path in (ROOT / name).rglob("*")
    ]
    readers = sorted(path.relative_to(ROOT).as_posix() for path in [*ours, ROOT / "setup.py"] if reads(path))
    found: dict[str, list[str]] = {}
    for name in readers:
        for variable in re.findall(r"\bDSDISTILL_[A-Z]+\b", text_of(name)):
            found.setdefault(variable, []).append(name)
    rows = re.findall(r"^\| `(DSDISTILL_\w+)` \| ([^|]+) \|", text_of("CONTRIBUTING.md"), re.MULTILINE)
    assert [variable for variable, _ in rows] == sorted(found)
    for variable, told in rows:
        for reader in re.findall(r"`([^`]+)`", told):
            assert reader in found[variable], (variable, reader)


def papers() -> list[tuple[str, str]]:
    rows = [line.split("|") for line in text_of("configs/recipes/PAPERS.md").splitlines() if "tests/" in line]
    return sorted({(row[-3].strip(" `"), row[-2].strip(" `")) for row in rows if len(row) > 6})


@pytest.mark.parametrize(("file", "test"), papers())
def test_files_and_tests_of_papers_are_there(file, test):
    assert (ROOT / file.replace("T/", "dsdistill/alignment/terms/")).is_file()
    path, _, name = test.partition("::")
    assert re.search(rf"^ *(def|class) {name}\b", text_of(path), re.MULTILINE)


def test_every_term_has_its_paper():
    """The file of each term has a row, and no row names another file of that folder."""
    named = {Path(file).name for file, _ in papers() if file.startswith("T/")}
    there = {path.name for path in (ROOT / "dsdistill/alignment/terms").glob("*.py")}
    assert named == there - {"__init__.py", "base.py"}


@pytest.mark.parametrize("theme", sorted(picture.THEMES))
def test_the_picture_shows_the_committed_figures(theme):
    """It is what the command draws, and README's words for those who do not see it are right."""
    report = json.loads(picture.FIGURES.read_text(encoding="utf-8"))
    drawn = picture.draw(report, picture.THEMES[theme])
    assert (picture.FOLDER / f"memory-{theme}.svg").read_text(encoding="utf-8") == drawn
    ElementTree.fromstring(drawn)
    found = {arm: dict(curve) for arm, curve in picture.curves(report).items()}
    assert found["attention"].keys() == {64, 128, 256, 512}
    words = re.search(r'alt="([^"]+)"', text_of("README.md"))[1]
    last = [f"{found[arm][512]:.0f}" for arm in ("attention", "textbrewer", "eager")]
    assert re.findall(r"\d+", words) == ["64", "512", *last]


def test_the_picture_places_its_points():
    """Lengths of 8 and 32 tokens, 0 at the bottom and 500 MiB at the top: by hand."""
    rows = [
        {"arm": arm, "tokens": n, "mapped": 1, "memory_mib": mib}
        for arm in picture.ARMS
        for n, mib in ((32, 500.0), (8, 0.0), (16, 250.0))
    ]
    sizes = {"teacher": 2, "student": 1, "step": 64}
    drawn = picture.draw({"rows": rows, "sizes": sizes, "dtype": "float32"}, picture.THEMES["light"])
    middle = (picture.LEFT + picture.RIGHT) / 2, (picture.TOP + picture.BOTTOM) / 2
    line = f"M{picture.LEFT}.0 {picture.BOTTOM}.0L{middle[0]} {middle[1]}L{picture.RIGHT}.0 {picture.TOP}.0"
    assert drawn.count(f'd="{line}"') == 3
