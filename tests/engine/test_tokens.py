"""The largest id decides how many ids count, and every model reads the ids of its own tokenizer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from dsdistill.config import UserError
from dsdistill.config.load import make_config
from dsdistill.data.masking import masking
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.passes.generation import generation
from dsdistill.engine.prepare import prepare
from dsdistill.models.build import load_tokenizer
from dsdistill.models.tokenizer import entries
from tests.conftest import WORDS, merge
from tests.engine.launch import run_configs
from tests.engine.test_resume import losses
from tests.models.families import peaked

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NAMES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
LARGEST = 201
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"bos_token_id": 2, "eos_token_id": 3}


@pytest.fixture
def holes(tmp_path) -> Path:
    """Write a tokenizer of 41 entries whose last word has the id 201."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    vocabulary["head"] = LARGEST
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **dict(zip(NAMES, SPECIAL, strict=True)))
    tokenizer.save_pretrained(tmp_path / "holes")
    return tmp_path / "holes"


def test_the_largest_id_counts(holes):
    tokenizer = load_tokenizer(str(holes), "data.tokenizer")
    assert len(tokenizer) < 96 and entries(tokenizer) == LARGEST + 1
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    assert entries(tokenizer) == LARGEST + 1 and tokenizer.pad_token_id < LARGEST
    hide = masking(tokenizer, 0.15, 0.0, seed=0)
    known = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    assert set(hide.ordinary.tolist()) == known and LARGEST in known  # no hole ever replaces a word


def decoder(folder: Path, entries: int) -> Path:
    torch.manual_seed(entries)
    config = AutoConfig.for_model("llama", vocab_size=entries, **SIZES)
    peaked(AutoModelForCausalLM.from_config(config), 8.0).save_pretrained(folder)
    return folder


def test_language_models_beyond_holes(settings, data_dir, holes, tmp_path):
    """Heads of 256 and 320 are compared over all ids that the tokenizer gives, by plain logits."""
    files = {"source": "files", "train": str(data_dir / "train.txt"), "dev": str(data_dir / "dev.txt")}
    files |= {
        "max_length": 16,
        "max_train": 8,
        "max_dev": 8,
        "packing": False,
        "cache": str(tmp_path / "cache"),
    }
    settings |= {
        "task": "causal_lm",
        "data": files | {"tokenizer": str(holes)},
        "teacher": {"path": str(decoder(tmp_path / "teacher", 320)), "zero_stage": 0},
        "student": {"path": str(decoder(tmp_path / "student", 256))},
        "terms": {"soft_label": {"temperature": 1.0}},
        "train": settings["train"] | {"epochs": 1},
        "run": settings["run"] | {"dir": str(tmp_path / "run")},
    }
    prepared = prepare(make_config(settings), world_size=1)
    assert prepared.pair.tokens == LARGEST + 1
    train = prepared.data.train
    rows = torch.tensor([train.tokens(row).tolist() for row in range(8)])
    assert rows.max() == LARGEST
    with torch.no_grad():
        log_q, log_p = (
            F.log_softmax(
                AutoModelForCausalLM.from_pretrained(tmp_path / name)(rows).logits[:, :-1, : LARGEST + 1], -1
            )
            for name in ("student", "teacher")
        )
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    run_configs([tmp_path / "config.yaml"], ranks=1)
    assert losses(tmp_path / "run")[0]["terms"]["soft_label"]["raw"] == pytest.approx(expected, rel=1e-4)


def test_texts_are_written_with_every_id(holes, monkeypatch, settings, data_dir, tmp_path):
    """A head that always prefers the largest id makes greedy decoding write it."""
    folder = decoder(tmp_path / "student", 256)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        model.model.norm.weight.zero_()  # every state is 0, so that the head's bias alone decides
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(256).index_fill(0, torch.tensor(LARGEST), 1.0))
    files = {"source": "files", "train": str(data_dir / "train.txt"), "dev": str(data_dir / "dev.txt")}
    files |= {"max_length": 16, "max_dev": 2, "cache": str(tmp_path / "cache"), "tokenizer": str(holes)}
    settings |= {"task": "causal_lm", "data": files, "student": {"path": str(folder)}, "terms": {"task": {}}}
    settings |= {"evaluation": {"generate": 2}, "teacher": None}
    prepared = prepare(make_config({k: v for k, v in settings.items() if v is not None}), world_size=1)
    generation(model, None, prepared, str(tmp_path), Ranks(0, 1, torch.device("cpu")))
    written = [
        json.loads(line)["student"] for line in (tmp_path / "generated.jsonl").read_text().splitlines()
    ]
    assert len(written) == 2 and all(set(text.split()) == {"head"} for text in written)


class TestOwnTokenizers:
    """A model reads ids as its own tokenizer gives them, whatever the data's tokenizer."""

    @pytest.fixture
    def other(self, tokenizer_dir, tmp_path):
        """Return a folder of a tokenizer that differs by what a function changes in its tokenizer.json."""

        def make(change, name: str = "other") -> str:
            folder = shutil.copytree(tokenizer_dir, tmp_path / name)
            settings = json.loads((folder / "tokenizer.json").read_text())
            change(settings)
            (folder / "tokenizer.json").write_text(json.dumps(settings))
            return str(folder)

        return make

    @staticmethod
    def swapped(settings: dict) -> None:
        vocabulary = settings["model"]["vocab"]
        vocabulary["tensor"], vocabulary["shape"] = vocabulary["shape"], vocabulary["tensor"]

    @staticmethod
    def lower_case(settings: dict) -> None:
        settings["normalizer"] = {"type": "Lowercase"}

    @staticmethod
    def bare(settings: dict) -> None:
        settings["post_processor"] = None

    @pytest.mark.parametrize("change", ["swapped", "bare"])
    def test_another_of_the_data_is_refused(self, config, refused, other, change):
        line = refused("train", config({"data.tokenizer": other(getattr(self, change))}))
        assert "data.tokenizer: got a tokenizer " in line and line.endswith(
            "the teacher's tokenizer, or an equal one"
        )

    def test_other_capitals_are_refused(self, config, refused, other, models_dir, tmp_path):
        """The vocabularies are equal, but one of the tokenizers does not know `The`."""
        folder = shutil.copytree(models_dir / "student", tmp_path / "student")
        shutil.copy(Path(other(self.lower_case)) / "tokenizer.json", folder)
        line = refused("train", config({"student.path": str(folder)}))
        assert "student.path: got a tokenizer that makes " in line and "the teacher's tokenizer" in line

    def test_another_of_the_student_is_refused(self, config, refused, tokenizer_dir, models_dir, tmp_path):
        folder = shutil.copytree(models_dir / "student", tmp_path / "student")
        path = folder / "tokenizer.json"
        settings = json.loads(path.read_text())
        self.bare(settings)
        path.write_text(json.dumps(settings))
        change = {"student.path": str(folder), "data.tokenizer": str(tokenizer_dir)}
        assert "data.tokenizer: got a tokenizer that makes" in refused("train", config(change))

    def test_a_trained_one_beside_a_models_own_is_refused(self, settings):
        settings["data"]["train_tokenizer"] = 100
        with pytest.raises(
            UserError, match=r"data.train_tokenizer: got a tokenizer .* the teacher's tokenizer"
        ):
            prepare(make_config(settings), world_size=1)

    def test_another_than_the_recipes_is_refused(self, config, refused, other, models_dir, tmp_path):
        settings = yaml.safe_load(Path(config()).read_text())
        recipe = merge(settings, {"teacher": None, "terms": {"task": {}}, "student": {}})
        recipe["student"] = {"path": str(models_dir / "teacher")}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        change = {"teacher": {"recipe": str(tmp_path / "recipe.yaml")}}
        change |= {"student": {"from_teacher": [1]}, "data.tokenizer": other(self.swapped)}
        assert "data.tokenizer: got a tokenizer of" in refused("train", config(change))

    def test_an_equal_one_and_models_without_are_taken(self, settings, tokenizer_dir, models_dir, tmp_path):
        settings["data"]["tokenizer"] = str(tokenizer_dir)
        prepare(make_config(settings), world_size=1)
        for name in ("teacher", "student"):
            folder = shutil.copytree(models_dir / name, tmp_path / name)
            for path in folder.glob("*token*"):
                path.unlink()
            settings[name]["path"] = str(folder)
        prepare(make_config(settings), world_size=1)
