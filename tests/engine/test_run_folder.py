"""Hold a run folder to its promises: one writer, no links, no secrets, one line about other versions or a full disk."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsdistill import disk
from dsdistill.config import RunError, UserError, dump, load
from dsdistill.engine import checkpoint, run_folder
from dsdistill.engine.export import find_checkpoint
from dsdistill.engine.run_folder import CHECKPOINTS, LOCK, METRICS, RunFolder
from tests.engine.test_resume import losses, make_checkpoint
from tests.test_disk import small  # noqa: F401

TAKE = (
    "import sys; from dsdistill.engine.run_folder import RunFolder; sys.exit(RunFolder(sys.argv[1]).lock())"
)


def another_process_can_lock(folder: Path) -> bool:
    return bool(subprocess.run([sys.executable, "-c", TAKE, folder], check=False).returncode)


@pytest.fixture
def folder(tmp_path):
    """A run folder that this process holds."""
    held = RunFolder(str(tmp_path / "run"))
    held.claim()
    yield held
    run_folder._held.pop(os.path.realpath(held.path), None)


class TestLock:
    def test_removing_it_lets_nobody_in(self, folder, caplog):
        os.remove(folder / LOCK)
        assert not another_process_can_lock(folder.path)
        folder.log({"step": 1})
        assert os.path.exists(folder / LOCK) and "it is locked again" in caplog.text
        assert not another_process_can_lock(folder.path)

    def test_a_file_in_its_place_is_taken_too(self, folder):
        os.remove(folder / LOCK)
        Path(folder / LOCK).touch()
        folder.log({"step": 1})
        assert run_folder._held[folder.path].current()

    def test_a_folder_that_was_removed_ends_the_run(self, folder):
        for name in os.listdir(folder.path):
            os.remove(folder / name)
        os.rmdir(folder.path)
        with pytest.raises(RunError, match="the lock of this run was removed, and the folder is gone"):
            folder.log({"step": 1})
        os.mkdir(folder.path)
        with pytest.raises(RunError, match="another process writes there now"):
            folder.log({"step": 1})

    def test_a_lock_that_was_there_is_not_cut_off(self, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / LOCK).write_text("somebody's")
        held = RunFolder(str(tmp_path / "run"))
        held.claim()
        assert (tmp_path / "run" / LOCK).read_text() == "somebody's"


def _link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "mine")


@pytest.mark.parametrize("make", [_link, os.mkfifo], ids=["link", "pipe"])
@pytest.mark.parametrize(
    "name", [LOCK, "config.yaml", METRICS, "loss.png", "init", "stages/one.safetensors", "checkpoints/newest"]
)
def test_a_planted_link_or_pipe_is_refused(config, refused, tmp_path, make, name):
    run = tmp_path / "run"
    (tmp_path / "mine").write_text("precious")
    RunFolder(str(run)).open(load([config()]))
    make_checkpoint(run, 1)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).unlink(missing_ok=True)
    make(run / name)
    assert f"in which {run / name} is " in refused("train", config())
    if name != "config.yaml":
        assert f"in which {run / name} is " in refused("export", run, "--out", "out")


def test_old_scratch_names_lead_nowhere(config, tmp_path):
    """Old versions wrote config.yaml.partial, following any link of that name."""
    mine = tmp_path / "mine"
    mine.write_text("precious")
    folder = RunFolder(str(tmp_path / "run"))
    folder.open(load([config()]))
    for name in ("config.yaml", "summary.json", "metrics.jsonl"):
        Path(folder / f"{name}.partial").symlink_to(mine)
    folder.open(load([config(), "train.learning_rate=0.5"]))
    folder.write_summary({"models": {}})
    folder.log({"step": 1})
    folder.rewind(0)
    assert mine.read_text() == "precious"


class TestFullDisk:
    def test_lines_wait_and_come_in_order(self, small, caplog):  # noqa: F811
        folder = RunFolder(str(small))
        filler = small / "filler"
        folder.log({"step": 1})
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(2**20))
        for step in range(2, 200):
            folder.log({"step": step, "padding": "x" * 100})
        assert caplog.text.count("cannot be written now, training continues: the disk is full") == 1
        filler.unlink()
        folder.log({"step": 200})
        steps = [json.loads(line)["step"] for line in Path(folder / METRICS).read_text().splitlines()]
        assert steps == list(range(1, 201))

    @pytest.mark.parametrize("what", ["config", "summary"])
    def test_elsewhere_one_line_says_so(self, small, config, what):  # noqa: F811
        folder = RunFolder(str(small / "run"))
        folder.claim()
        with pytest.raises(OSError, match="No space left"):
            (small / "filler").write_bytes(bytes(2**20))
        with pytest.raises(
            RunError, match=r"(config\.yaml|summary\.json) cannot be written: the disk is full"
        ):
            if what == "config":
                folder.open(load([config()]))
            else:
                folder.write_summary({"models": {}, "much": "x" * 10_000})
        run_folder._held.pop(folder.path).close()

    def test_a_checkpoint_leaves_the_ones_before(self, small, monkeypatch):  # noqa: F811
        monkeypatch.setattr(checkpoint, "MADE", (*checkpoint.MADE, "weights.bin"))
        make_checkpoint(small, 1)
        with pytest.raises(checkpoint.Unsaved, match=r"no checkpoint could be saved in .*: the disk is full"):
            make_checkpoint(small, 4000)
        assert checkpoint.newest(str(small)) == "step-00000001"
        assert not (small / CHECKPOINTS / "step-00004000").exists()
        assert make_checkpoint(small, 2).name == checkpoint.newest(str(small))


def rewrite(found: Path, change) -> None:
    """Change a checkpoint's state and correct its manifest, as an attacker would."""
    path = found / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(change(state)))
    manifest = json.loads((found / "manifest.json").read_text())
    manifest["state.json"] = checkpoint.fingerprint(str(path))
    (found / "manifest.json").write_text(json.dumps(manifest))


STATES = {
    "nothing": lambda state: {},
    "a list": lambda state: [1],
    "a step far away": lambda state: state | {"step": 10**12},
    "a step of another checkpoint": lambda state: state | {"step": 1},
    "half a step": lambda state: state | {"step": 2.0},
    "a stage of words": lambda state: state | {"stage": "last"},
    "a stage below all": lambda state: state | {"stage": -1},
    "no ranks": lambda state: state | {"world_size": 0},
    "a switch for a number": lambda state: state | {"tokens": True},
    "no time": lambda state: state | {"seconds": float("nan")},
    "an objective of numbers": lambda state: state | {"objective": 3},
}


@pytest.mark.parametrize("state", STATES)
def test_a_state_that_no_run_writes_is_passed_over(tmp_path, state):
    first, second = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    rewrite(second, STATES[state])
    assert checkpoint.damage(str(second)).startswith("state.json ")
    assert find_checkpoint(str(tmp_path)) == first.name


def test_a_stage_that_the_config_does_not_have(config, tmp_path):
    rewrite(make_checkpoint(tmp_path, 1), lambda state: state | {"stage": 7})
    with pytest.raises(UserError, match="step-00000001: stage: got 7, expected 0 to 0"):
        checkpoint.check(str(tmp_path), load([config()]), 1)


@pytest.mark.parametrize("name", ["../../mine.pt", "/etc/passwd", "a/../../b", "nul\0", ""])
def test_a_manifest_names_files_of_its_own_folder_alone(tmp_path, name):
    first, second = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    manifest = json.loads((second / "manifest.json").read_text())
    (second / "manifest.json").write_text(json.dumps(manifest | {name: manifest["state.json"]}))
    assert checkpoint.damage(str(second)) == f"a manifest that names {name!r}"
    assert checkpoint.newest(str(tmp_path)) == first.name


def test_a_manifest_that_is_a_pipe_does_not_block(tmp_path):
    first, second = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    for name in ("manifest.json", "state.json"):
        (second / name).unlink()
        os.mkfifo(second / name)
        assert checkpoint.damage(str(second)) is not None
    assert checkpoint.newest(str(tmp_path)) == first.name


def test_a_removed_checkpoint_takes_no_file_of_the_users_along(tmp_path, caplog):
    first = make_checkpoint(tmp_path, 1)
    (first / "why-this-one-matters.md").write_text("mine")
    for step in (2, 3):
        make_checkpoint(tmp_path, step)
    assert (
        "checkpoint step-00000001 could not be removed: [Errno 39] it holds why-this-one-matters.md"
        in caplog.text
    )
    assert (first / "why-this-one-matters.md").exists() and checkpoint.damage(str(first)) is None


class TestVersions:
    def test_others_are_told_once_by_name(self, config, tmp_path, caplog):
        found = make_checkpoint(tmp_path, 1)
        assert set(checkpoint.read_state(str(tmp_path), found.name)["versions"]) == {
            "dsdistill",
            "torch",
            "deepspeed",
            "transformers",
        }
        checkpoint.check(str(tmp_path), load([config()]), 1)
        assert not caplog.records
        rewrite(
            found, lambda state: state | {"versions": state["versions"] | {"torch": "2.0", "deepspeed": "0"}}
        )
        checkpoint.check(str(tmp_path), load([config()]), 1)
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith("step-00000001 was saved with torch 2.0 (now ") and "deepspeed 0 (now " in line
        assert "transformers" not in line

    def test_checkpoints_of_before_say_nothing(self, config, tmp_path, caplog):
        rewrite(
            make_checkpoint(tmp_path, 1), lambda state: {k: v for k, v in state.items() if k != "versions"}
        )
        checkpoint.check(str(tmp_path), load([config()]), 1)
        assert not caplog.records


SECRET = "s3cr3t-value"


class TestSecrets:
    """Nothing that is written or printed holds the API keys of monitors."""

    def settings(self, config, **more) -> str:
        monitor = {"comet": {"enabled": False, "api_key": "${oc.env:DSD_TEST_KEY}", "project": "p"}}
        return config({"student.deepspeed": monitor, **more})

    def test_in_no_file_of_a_run(self, config, tmp_path, monkeypatch):
        monkeypatch.setenv("DSD_TEST_KEY", SECRET)
        path = self.settings(config, **{"train.epochs": 1, "run.save_every": 2})
        command = [sys.executable, "-m", "dsdistill", "train", path]
        quiet = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        holding = [
            p for p in (tmp_path / "run").rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()
        ]
        assert not holding and SECRET not in done.stdout + done.stderr
        assert "api_key: (redacted)" in (tmp_path / "run" / "config.yaml").read_text()
        # With another key it resumes: the key is resolved anew, and it does not identify a run.
        (tmp_path / "run" / "summary.json").unlink()
        newest = tmp_path / "run" / "checkpoints" / "newest"
        newest.write_text("step-00000004")
        again = quiet | {"DSD_TEST_KEY": "another"}
        done = subprocess.run(command, env=again, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "resuming from step-00000004" in done.stderr, done.stderr
        assert [line["step"] for line in losses(tmp_path / "run")] == [1, 2, 3, 4, 5]
        command[3:] = ["evaluate", tmp_path / "run"]
        done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        # Modes follow the umask, so that a group can share its files.
        narrow = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and not p.stat().st_mode & 0o044]
        assert not narrow

    def test_that_a_version_of_before_wrote_are_taken_out(self, config, tmp_path, monkeypatch):
        monkeypatch.setenv("DSD_TEST_KEY", SECRET)
        path = self.settings(config)
        folder = RunFolder(str(tmp_path / "run"))
        folder.open(load([path]))
        written = tmp_path / "run" / "config.yaml"
        written.write_text(written.read_text().replace("(redacted)", SECRET))
        folder.open(load([path]))
        assert SECRET not in written.read_text() and "(redacted)" in written.read_text()

    def test_as_printed(self, config, monkeypatch):
        monkeypatch.setenv("DSD_TEST_KEY", SECRET)
        path = self.settings(config)
        own = "student.deepspeed.wandb.my_secret={a: one-value, b: [other-value]}"
        text = dump(load([path, own]))
        assert SECRET not in text and "-value" not in text and text.count("(redacted)") == 3

    def test_in_no_message(self, config, refused, monkeypatch):
        monkeypatch.setenv("DSD_TEST_KEY", SECRET)
        for change in (
            f"student.deepspeed.comet={{api_key: {SECRET}, enabled: 5}}",
            f"student.deepspeed.api_token={SECRET}",
            f"run.password={SECRET}",
            f"run.password=[{SECRET}",
            f"student.deepspeed.comet.api_key.more={SECRET}",
            f"student.deepspeed={{comet: [{{api_key: {SECRET}}}",
            f"student.deepspeed.comet.api_key={SECRET}" + "${x}" * 200,
            "student.deepspeed.api_key" + ".x" * 50 + f"={SECRET}",
        ):
            assert SECRET not in refused("train", self.settings(config), change), change

    def test_a_redacted_one_is_not_taken_for_the_key(self, config, refused, tmp_path, monkeypatch):
        monkeypatch.setenv("DSD_TEST_KEY", SECRET)
        (tmp_path / "copy.yaml").write_text(dump(load([self.settings(config)])))
        line = refused("train", "copy.yaml")
        assert line.startswith(
            "copy.yaml: student.deepspeed.comet.api_key: got (redacted), expected the value"
        )

    def test_settings_of_ours_are_none(self, config):
        """Tokenizers, numbers of heads and weights of tokens are not secrets and stay as they are."""
        changes = {
            "data.tokenizer": "some/folder",
            "student.config": {"pad_token_id": 0, "tokenizer_class": "B"},
        }
        text = dump(load([config(changes)]))
        assert "(redacted)" not in text
        assert load([config(yaml.safe_load(text))]) == load([config(changes)])


def test_export_beside_a_folder_of_the_scratch_name(config, tmp_path, monkeypatch):
    """Old versions deleted that folder."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from dsdistill.engine import export

    settings = load([config()])
    for name in ("mine.partial", ".partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("mine")
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(settings.student.path))
    monkeypatch.setattr(export, "_newest_student", lambda run, config: (model, {}))
    RunFolder(str(tmp_path / "run")).open(settings)
    AutoTokenizer.from_pretrained(settings.student.path).save_pretrained(tmp_path / "run" / "init")
    export.export(str(tmp_path / "run"), str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "model.safetensors").is_file()
    assert (tmp_path / "mine.partial" / "thesis.tex").exists()
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "mine" / "model.safetensors").stat().st_mode) == 0o666 & ~mask


def test_home_is_home(config, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load([config({"run.dir": "~/runs/x"})]).run_dir == f"{tmp_path}/runs/x"


def test_an_export_into_a_run_folder_keeps_its_scratch(tmp_path):
    """Meanwhile another process takes the folder and removes scratch folders that kills left in it."""
    folder = RunFolder(str(tmp_path / "run"))
    folder.claim()
    for scratch, name in ((".partial-01234567", "summary.json"), (".partial-89abcdef", "hf")):
        (tmp_path / "run" / scratch).mkdir()
        (tmp_path / "run" / scratch / name).touch()
    folder.claim()
    assert [name for name in os.listdir(folder.path) if disk.is_scratch(name)] == [".partial-89abcdef"]


@pytest.mark.parametrize("manifest", ["5", "[" * 100_000, "{}", "\0"])
def test_a_manifest_that_is_none_makes_no_run(config, refused, tmp_path, manifest):
    path = tmp_path / "run" / "checkpoints" / "step-00000001" / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_text(manifest)
    assert "which holds checkpoints but no run" in refused("train", config())


def test_a_finished_run_of_before_whose_checkpoints_are_gone(config, tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    folder.open(load([config()]))
    folder.write_summary({"models": {}, "finished": True})
    folder.release()
    os.remove(folder / "dsdistill-run.txt")
    folder.check()


def test_scores_before_the_first_step_stay_in_the_log(tmp_path):
    """A resume keeps them; a new start replaces the first line by its own scores."""
    folder = RunFolder(str(tmp_path))
    folder.claim()
    folder.log({"step": 0, "evaluation": {"recall_10": 0.5}})
    folder.log({"step": 3, "loss": 1.0})
    folder.rewind(2)
    assert folder.start_scores() == {"recall_10": 0.5}
    folder.rewind(-1)
    assert folder.start_scores() == {}
    folder.log({"step": 3, "evaluation": {"recall_10": 0.75}})
    assert folder.start_scores() == {}
