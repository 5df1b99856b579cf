from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

REAL = Path(__file__).parents[3] / "shared" / "data"
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
VOCABULARY = [*SPECIAL.values(), *"abcdefghijklmnopqrstuvwxyz0123456789", *"àé."]


@pytest.fixture(scope="session")
def tokenizer():
    """Return a tokenizer of letters with BERT's special tokens and token types; a letter's id is its position."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "")])
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=inputs, **SPECIAL)


@pytest.fixture
def real():
    if not REAL.is_dir():
        pytest.skip("the real data sets are not beside the repository")
    return REAL
