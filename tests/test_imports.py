"""The structure of the package: who imports whom, what importing costs, how long files are; and configs load."""

import ast
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from dsdistill import cli
from dsdistill.config import UserError, load
from dsdistill.config.load import recipe_of
from dsdistill.data.sources import dev_sets, names, parts
from dsdistill.engine.studies import SCALES, read_plan

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dsdistill"

# Which folders each may import, from the top down; config is a leaf that any may import except ops.
ARROWS = {
    "cli": {"report", "bench", "planner", "engine", "distributed", "disk", "config"},
    "planner": {"engine", "distributed", "alignment", "models", "ops.common", "data.batch", "disk", "config"},
    "distiller": {"alignment", "models", "data.batch", "data.inputs", "distributed.engines", "config"},
    "integrations": {"distiller", "engine.teacher", "distributed", "alignment", "models", "disk", "config"},
    "terms": {"config.terms"},
    "engine": {
        "distiller",
        "report",
        "evaluation",
        "alignment",
        "models",
        "distributed",
        "data",
        "disk",
        "config",
    },
    "distributed": {"disk", "config"},
    "evaluation": {"alignment", "models", "data", "config"},
    "alignment": {"ops", "models", "data.batch", "config"},
    "bench": {"ops", "engine", "distributed", "alignment", "models", "data", "disk", "config"},
    "models": {"data.batch", "data.packing", "config"},
    "data": {"disk", "config"},
    "report": {"disk", "config"},
    "disk": {"config.errors"},
    "ops": {"_C"},  # the native extension
    "config": set(),
    "__main__": {"cli"},
    "__init__": {"alignment.terms", "config", "distiller", "engine", "terms"},  # imported only when asked for
}
LONGEST = 500  # lines of a file


def folder_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Return the full names of the modules that a file imports anywhere, also inside functions."""
    found = []
    here = [*path.relative_to(ROOT).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*here[: -node.level], node.module or ""]) if node.level else node.module
            # `from dsdistill.engine import checkpoint` names a module too.
            found += [f"{base}.{name.name}" for name in node.names]
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    folder = folder_of(path)
    for name in imports(path):
        ours = name.split(".")[1:] if name.split(".")[0] == "dsdistill" else None
        if not ours or ours[0] in (folder, "__version__"):
            continue
        allowed = any(ours[: len(target.split("."))] == target.split(".") for target in ARROWS[folder])
        assert allowed, f"{folder} imports {name}"


def test_every_folder_has_its_arrows():
    assert {folder_of(path) for path in FILES} <= ARROWS.keys()
    assert {
        "ops",
        "alignment",
        "models",
        "data",
        "config",
        "engine",
        "distributed",
        "planner",
        "evaluation",
        "report",
    } <= {folder_of(path) for path in FILES}


def test_deepspeed_is_imported_in_one_place():
    where = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(n.split(".")[0] == "deepspeed" for n in imports(path))
    }
    assert where == {"distributed/deepspeed.py"}


def test_importing_the_package_is_light():
    """It imports neither CUDA nor DeepSpeed; --help does not even need torch."""
    script = (
        "import json, sys; import dsdistill, dsdistill.cli; light = sorted(sys.modules);"
        "import dsdistill.ops, dsdistill.alignment.objective, dsdistill.models.probe, dsdistill.data;"
        "import torch; print(json.dumps([light, sorted(sys.modules), torch.cuda.is_initialized()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    light, heavy, initialised = json.loads(done.stdout.splitlines()[-1])
    assert not {"torch", "transformers", "deepspeed", "datasets", "matplotlib"} & set(light)
    assert "torch" in heavy and "deepspeed" not in heavy
    assert not initialised


OPERATOR_PARTS = {"reference", "chunked", "native", "op", "triton_plan", "triton_kernel"}  # files of ops/*/
# One thing may have one name in several places; these are the places.
SAME_THING = {
    # What is compared: a folder for the operator, and a file for the term that calls it.
    **{
        level: {f"ops/{level}", f"alignment/terms/{level}"}
        for level in ("attention", "hidden", "pairwise", "soft_label")
    },
    # The terms of the loss: their public names, their settings and their computations.
    "terms": {"terms", "config/terms", "alignment/terms"},
}


def test_a_name_means_one_thing():
    """A file or folder of the package has a unique name, so that the name alone says which one is meant."""
    places: dict[str, set[str]] = {}
    for path in {*FILES, *(path.parent for path in FILES)} - {PACKAGE}:
        part = path.parent.parent == PACKAGE / "ops" and path.stem in OPERATOR_PARTS
        if path.stem != "__init__" and not part:
            place = path.relative_to(PACKAGE).with_suffix("").as_posix()
            places.setdefault(path.stem, set()).add(place)
    assert SAME_THING.keys() <= places.keys()
    assert {"reference", "op"}.isdisjoint(places)
    clashes = {name: where for name, where in places.items() if len(where) > 1}
    assert {name: where for name, where in clashes.items() if where != SAME_THING.get(name)} == {}


SOURCES = [
    path
    for folder in ("dsdistill", "csrc", "tests", "launch")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".cpp", ".cu", ".cuh", ".h", ".sh"}
]


def test_no_file_is_long():
    lengths = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in SOURCES}
    assert len(lengths) > 100
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


ALL = sorted((ROOT / "configs").rglob("*.yaml"))
COMPARISONS = [path for path in ALL if path.parent.name == "reproduce"]
CONFIGS = [path for path in ALL if path not in COMPARISONS]
# Fragments that are given after another config.
AFTER = {
    "deepspeed/": "configs/quickstart.yaml",
    "quickstart/": "configs/quickstart.yaml",
    "presets/domain_": "configs/recipes/domain_mapping_small.yaml",
    "presets/ddk": "configs/recipes/domain_mapping_small.yaml",
    "presets/learned_": "configs/recipes/multi_stage_small.yaml",
    "presets/novels": "configs/recipes/feature_alignment_small.yaml",
    "presets/": "configs/recipes/multi_level_small.yaml",
}


def _made_data(sources: list[str], folder: Path) -> list[str]:
    """Write a row into each data file that a config and its teacher's recipe name; return what points there."""
    config, files = load(sources), {}
    while config is not None:
        data = config.data
        read = [(part, name) for *_, part in parts(data) for name in names(part.train)]
        read += [(data, name) for name in dev_sets(data).values()]
        read += [(data, name) for name in (*(data.domain or ()), *(data.general or ()))]
        for part, name in read:
            if part.source == "files":
                columns = [*part.text, part.messages or "text", part.label or "text"]
                files.setdefault(name, {"text": "1"}).update(dict.fromkeys(columns, "1"))
        teacher = config.teacher
        config = recipe_of(config) if teacher is not None and teacher.recipe and not teacher.path else None
    for name, row in files.items():
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt") as file:
            table = "\t".join(row) + "\n" + "\t".join(row.values()) + "\n"
            file.write(table if ".tsv" in name else json.dumps(row))
    return [f"data.root={folder}/data"] if files else []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_config_loads_through_the_command_line(path, monkeypatch, capsys, tmp_path):
    """The data files that it names are made up, since the dry run looks for them and their columns."""
    sources = [path]
    place = f"{path.parent.name}/{path.name}"
    base = next((base for start, base in AFTER.items() if place.startswith(start)), None)
    if base is not None:
        sources.insert(0, ROOT / base)
    monkeypatch.chdir(ROOT)
    sources = [*map(str, sources), *_made_data(list(map(str, sources)), tmp_path)]
    printed = {}
    for full in ([], ["--full"]):
        monkeypatch.setattr(sys, "argv", ["dsdistill", "train", *sources, "--dry-run", *full])
        code = cli.run()
        printed[bool(full)] = capsys.readouterr()
        assert code == 0, printed[bool(full)].err
    short = tmp_path / "short.yaml"
    short.write_text(printed[False].out, encoding="utf-8")
    assert load([str(short)]) == load(sources)
    resolved = yaml.safe_load(printed[True].out)
    given = OmegaConf.to_container(OmegaConf.load(path))
    assert given, "an empty config"
    for section, settings in given.items():
        for key, value in settings.items() if isinstance(settings, dict) else ():
            if not isinstance(value, dict | list):
                assert resolved[section][key] == value


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.name)
def test_every_plan_of_a_comparison_loads(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for scale in SCALES:
        try:
            seeds, cells, _ = read_plan(str(path), scale)
        except UserError as error:
            assert scale == "node" and "--scale" in str(error)
            continue
        least = 1 if path.name.startswith("choose_") else 3  # settings are chosen with one seed
        assert len(seeds) >= least and len(cells) >= 2
        for sources in cells.values():
            load(sources)


def test_the_quickstart_is_there():
    assert ROOT / "configs" / "quickstart.yaml" in CONFIGS


def test_the_readme_shows_the_tree_as_it_is():
    """Every folder and module at the package's top has a line of its own, and no other name has one."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("## The tree")[1].split("```")[1]
    inside = tree.split("dsdistill/\n")[1].split("\nconfigs/")[0]
    shown = {line.split()[0] for line in inside.splitlines() if line.startswith("  ") and line[2] != " "}
    there = {
        path.name + "/" for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()
    }
    there |= {path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")}
    assert shown == there
