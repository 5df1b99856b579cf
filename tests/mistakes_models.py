"""Model folders that name code and files or exceed all limits, for test_hostile_input.py."""

import json
import os
import string
from pathlib import Path

from tests.conftest import BERT


def settings(name="config.json", **changes):
    """Change settings of a JSON file of the folder."""

    def change(folder: Path) -> None:
        path = folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | changes))

    return change


def text(name: str, content: str | bytes):
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def pipe(name: str):
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def device(name: str):
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")

    return change


def index(weight_map):
    """Put an index in place of the weights, which are above the folder."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


CONFIG_JSON = {
    "no heads": ({"num_attention_heads": 0}, ["num_attention_heads", "got 0"]),
    "heads below nothing": ({"num_attention_heads": -4}, ["num_attention_heads", "got -4"]),
    "a width below nothing": ({"hidden_size": -48}, ["hidden_size", "got -48"]),
    "no width": ({"hidden_size": 0}, ["hidden_size", "got 0"]),
    "a billion layers": ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "1000000000", "1,024 layers"]),
    "no layers": ({"num_hidden_layers": 0}, ["num_hidden_layers", "got 0"]),
    "layers that are true": ({"num_hidden_layers": True}, ["num_hidden_layers", "True"]),
    "layers as text": ({"num_hidden_layers": "4"}, ["num_hidden_layers"]),
    "layers as a list": ({"num_hidden_layers": [4]}, ["num_hidden_layers"]),
    "a width as a fraction": ({"hidden_size": 48.0}, ["hidden_size", "48.0"]),
    "a width that is no number": ({"hidden_size": float("nan")}, ["hidden_size", "nan"]),
    "an endless width": ({"intermediate_size": float("inf")}, ["intermediate_size", "inf"]),
    "a billion features": ({"intermediate_size": 10**9}, ["intermediate_size", "1000000000"]),
    "a width of 100 digits": ({"hidden_size": 10**100}, ["hidden_size"]),
    "a vocabulary of a trillion": ({"vocab_size": 10**12}, ["vocab_size", "1000000000000"]),
    "no vocabulary": ({"vocab_size": 0}, ["vocab_size", "got 0"]),
    "a billion positions": ({"max_position_embeddings": 10**9}, ["max_position_embeddings"]),
    "positions below nothing": ({"max_position_embeddings": -1}, ["max_position_embeddings"]),
    "a billion classes": ({"num_labels": 10**9, "id2label": None}, ["num_labels"]),
    "a billion token types": ({"type_vocab_size": 2**40}, ["type_vocab_size"]),
    "keys and values for no head": ({"num_key_value_heads": 3}, ["num_key_value_heads", "got 3"]),
    "a list of padding": ({"pad_token_id": [0]}, ["pad_token_id"]),
    "quantised weights": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        ["quantization_config"],
    ),
    "quantised by nobody knows what": ({"quantization_config": 5}, ["quantization_config", "got 5"]),
    "quantised further down": (
        {"text_config": {"quantization_config": {"quant_method": "bitsandbytes"}}},
        ["quantization_config"],
    ),
    "a type that is a function": ({"dtype": "load"}, ["dtype", "'load'"]),
    "a type of no tensor": ({"torch_dtype": "kernels-community/float"}, ["torch_dtype"]),
    "a type of whole numbers": ({"dtype": "int8"}, ["dtype", "'int8'"]),
    "a type that is a number": ({"dtype": 16}, ["dtype", "got 16"]),
    "types in a mapping": ({"dtype": {"": "float32"}}, ["dtype"]),
    "weights of another name": ({"transformers_weights": "../../weights.bin"}, ["transformers_weights"]),
    "another config.json": ({"configuration_files": ["config.9.9.9.json"]}, ["configuration_files"]),
    "fused parts": ({"fusion_config": {"mlp": "x"}}, ["fusion_config"]),
    "kernels of others": ({"use_kernels": True}, ["use_kernels"]),
    "other names": ({"attribute_map": {"hidden_size": "attribute_map"}}, ["attribute_map"]),
    "a method": ({"to_dict": 5}, ["to_dict", "library's code"]),
    "a class": ({"__class__": "x"}, ["__class__"]),
    "its own attributes": ({"__dict__": {"hidden_size": 5}}, ["__dict__"]),
    "a label that is no index": ({"id2label": {"a": "b"}}, ["teacher.path"]),
    "an activation that is none": ({"hidden_act": "kernels-community/activation"}, ["teacher"]),
    "a model type that is a list": ({"model_type": ["bert"]}, ["teacher.path"]),
    "code in no list": ({"auto_map": 5}, ["teacher.path"]),
    "probabilities beyond 1": ({"hidden_dropout_prob": 7.0}, ["teacher"]),
}

FOLDERS = {
    "a config.json that is a list": (text("config.json", "[]"), ["config.json", "a list"]),
    "a config.json of a number": (text("config.json", "5"), ["config.json", "a int"]),
    "a config.json without an end": (text("config.json", '{"a":' * 100_000), ["config.json"]),
    "a config.json of 5,000 digits": (text("config.json", '{"a": ' + "1" * 5000 + "}"), ["config.json"]),
    "a config.json of bytes": (text("config.json", bytes(range(256))), ["config.json"]),
    "a huge config.json": (text("config.json", "[" + "0," * (9 << 20)), ["config.json", "18,874,369 bytes"]),
    "settings that are deep": (settings(a=json.loads('{"a":' * 50 + "1" + "}" * 50)), ["levels"]),
    "a pipe as config.json": (pipe("config.json"), ["config.json", "a pipe"]),
    "a device as config.json": (device("config.json"), ["config.json", "a device"]),
    "a pipe of generation": (pipe("generation_config.json"), ["generation_config.json", "a pipe"]),
    "generation that is a list": (text("generation_config.json", "[]"), ["generation_config.json", "a list"]),
    "an adapter": (settings("adapter_config.json", base_model_name_or_path="a/b"), ["adapter"]),
    "a pipe for an adapter": (pipe("adapter_config.json"), ["adapter"]),
    "an index of a number": (index({"a": 5}), ["index.json, which names 5"]),
    "an index of a list": (index({"a": ["x"]}), ["index.json, which names ['x']"]),
    "an index that is a list": (index(["x"]), ["index.json without a weight_map"]),
    "an index of nothing": (index({}), ["index.json without a weight_map"]),
    "an index of files above": (index({"a": "../outside.safetensors"}), ["names '../outside.safetensors'"]),
    "an index of files anywhere": (index({"a": "/etc/passwd"}), ["names '/etc/passwd'"]),
    "an index of pickles": (index({"a": "model.bin"}), ["names 'model.bin'"]),
    "an index of a NUL": (index({"a": "\0.safetensors"}), ["index.json, which names"]),
    "an index of files that are not there": (index({"a": "x.safetensors"}), ["x.safetensors"]),
    "a pipe as index": (
        lambda folder: (index({})(folder), pipe("model.safetensors.index.json")(folder)),
        ["a pipe"],
    ),
    "a pipe as weights": (pipe("model.safetensors"), ["without weights"]),
    "a checkpoint's shard": (
        text("shard-00001-model-00001-of-00001.safetensors", b""),
        ["a shard of a checkpoint"],
    ),
    "a pipe as tokenizer": (pipe("tokenizer.json"), ["tokenizer.json", "a pipe"]),
    "a device as tokenizer": (device("tokenizer.json"), ["tokenizer.json", "a device"]),
    "a pipe beside the tokenizer": (pipe("vocab.txt"), ["vocab.txt", "a pipe"]),
    "a pipe of tokens": (pipe("special_tokens_map.json"), ["special_tokens_map.json", "a pipe"]),
    "a tokenizer_config.json of a list": (
        text("tokenizer_config.json", "[]"),
        ["tokenizer_config.json", "a list"],
    ),
    "a class of tokenizers": (settings("tokenizer_config.json", tokenizer_class=5), ["tokenizer_class"]),
    "arguments of a tokenizer": (
        settings("tokenizer_config.json", init_inputs=["/etc/passwd"]),
        ["init_inputs"],
    ),
    "a tokenizer of another format": (
        settings("tokenizer_config.json", gguf_file="../x.gguf"),
        ["gguf_file"],
    ),
    "another file of a tokenizer": (
        settings("tokenizer_config.json", fast_tokenizer_files=["tokenizer.9.json"]),
        ["fast_tokenizer_files"],
    ),
    "tokens in no list": (settings("tokenizer_config.json", added_tokens_decoder={"x": 5}), ["teacher.path"]),
}


def _token(number):
    def change(found):
        found["model"]["vocab"]["far"] = number

    return change


def _frame(ids, kind=0):
    def change(found):
        found["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "[X]", "type_id": kind}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"[X]": {"id": "[X]", "ids": ids, "tokens": ["[X]"] * len(ids)}},
        }

    return change


def _part(name, value):
    def change(found):
        found[name] = value

    return change


def _growing(pattern, content, times):
    replace = {"type": "Replace", "pattern": pattern, "content": content}
    return _part("normalizer", {"type": "Sequence", "normalizers": [replace] * times})


def _split(pattern):
    return _part(
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
    )


def _merges(found):
    found["model"] = {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]}


FAILS = ["tokenizer.json: got "]

# Changes of tokenizer.json.
TOKENIZERS = {
    "an id beyond the vocabulary": (
        _token(500),
        ["config.vocab_size: got 64", "at least 501, the number of the tokenizer's entries"],
    ),
    "the last id": (_token(2**32 - 1), ["id 4294967295"]),
    "an id beyond the last": (_token(2**32), FAILS),
    "an id below nothing": (_token(-1), FAILS),
    "an id of 100 digits": (_token(10**100), FAILS),
    "a frame of other ids": (
        _frame([200]),
        ["config.vocab_size: got 64", "at least 201, the number of the tokenizer's entries"],
    ),
    "a frame of the last id": (_frame([2**32 - 1]), ["id 4294967295"]),
    "a frame of other types": (_frame([2], 300), ["token type 300"]),
    "a pattern that branches": (_split("(a+)+$"), ["retry-limit"]),
    "a pattern of words that branches": (_split(r"(\w+\s?)+$"), ["retry-limit"]),
    "a replaced pattern that branches": (_growing({"Regex": "([x-z]+)*$"}, "a", 1), ["retry-limit"]),
    "a pattern that is none": (_split("("), FAILS),
    "a text that doubles 20 times": (_growing({"String": "a"}, "aa", 20), ["characters become"]),
    "a text that doubles without end": (_growing({"String": "q"}, "qq", 60), FAILS),
    "a letter of a megabyte": (
        _growing({"String": "z"}, string.ascii_letters * 20_000, 1),
        ["characters become"],
    ),
    "characters that are no map": (
        _part("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        FAILS,
    ),
    "characters that lead out of a map": (
        _part("normalizer", {"type": "Precompiled", "precompiled_charsmap": "CAAAAP//////////YWJj"}),
        FAILS,
    ),
    "merges of no prefix": (_merges, FAILS),
    "a model of no type": (lambda found: found["model"].update(type="None"), FAILS),
    "an unknown token that is not there": (lambda found: found["model"].update(unk_token="[NO]"), FAILS),
}

# The same by `config:`, of a student without a folder.
CONFIGS = {
    "no heads": ({"num_attention_heads": 0}, ["student.config.num_attention_heads: got 0"]),
    "a billion layers": ({"num_hidden_layers": 10**9}, ["student.config.num_hidden_layers: got 1000000000"]),
    "a width below nothing": ({"hidden_size": -32}, ["student.config.hidden_size: got -32"]),
    "layers that are true": ({"num_hidden_layers": True}, ["student.config.num_hidden_layers: got True"]),
    "attention of a kernel": (
        {"_attn_implementation": "kernels-community/flash-attn"},
        ["student.config._attn_implementation: got 'kernels-community/flash-attn'"],
    ),
    "attention of the library": ({"attn_implementation": "sdpa"}, ["student.config.attn_implementation"]),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, ["student.config.quantization_config"]),
    "a type that is a function": ({"dtype": "compile"}, ["student.config.dtype: got 'compile'"]),
    "a method": ({"from_dict": 1}, ["student.config.from_dict"]),
    "many labels": ({"num_labels": 10**10}, ["student.config.num_labels: got 10000000000"]),
    "by the family's name": (
        {"model_type": "gpt2", "n_layer": 10**7, "n_embd": 32},
        ["student.config.n_layer: got 10000000"],
    ),
    "a width that experts share": (
        {"model_type": "qwen3_moe", "num_experts": 10**8},
        ["student.config.num_experts: got 100000000"],
    ),
}
CONFIGS = {name: (BERT | changes, parts) for name, (changes, parts) in CONFIGS.items()}
