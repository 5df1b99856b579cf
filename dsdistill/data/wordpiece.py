"""Train a WordPiece tokenizer on the train texts, for models that come without a tokenizer."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dsdistill.data import cache as cache_folder

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def train_tokenizer(texts: Iterable[str], size: int, cache: str) -> str:
    """Return the folder of a tokenizer like BERT's: lower case, each Chinese character a word.

    It has at most `size` entries, and is kept in the cache folder under the texts' fingerprint.
    """
    kind = f"wordpiece {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"
    return cache_folder.tokenizer(kind, texts, size, cache, lambda texts: _made(texts, size))


def _made(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    core = _tokenizer(models.WordPiece(_vocabulary(texts, size), unk_token=SPECIAL["unk_token"]))
    core.decoder = decoders.WordPiece()
    core.add_special_tokens(list(SPECIAL.values()))
    ends = [(name, core.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=names, **SPECIAL)


def _tokenizer(model: models.Model) -> Tokenizer:
    core = Tokenizer(model)
    core.normalizer = normalizers.BertNormalizer(handle_chinese_chars=True, lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return core


def _vocabulary(texts: list[str], size: int) -> dict[str, int]:
    """Return an id for each entry: special tokens, single characters, then the most frequent pieces of words.

    Pieces are learned as byte-pair merges without the mark ## (the piece continues a word), and are marked afterwards,
    because the library's own trainer of marked pieces numbers them differently in every process.
    """
    core = _tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=size, show_progress=False)
    core.train_from_iterator(texts, trainer)
    words: Counter[str] = Counter()
    for text in texts:
        words.update(
            word for word, _ in core.pre_tokenizer.pre_tokenize_str(core.normalizer.normalize_str(text))
        )
    pieces: Counter[str] = Counter()
    for word, count in words.items():
        for index, token in enumerate(core.model.tokenize(word)):
            pieces["##" * (index > 0) + token.value] += count
            for place, character in enumerate(token.value):  # else a rare word could not be spelt
                pieces["##" * (index + place > 0) + character] += 0
    ordered = sorted(pieces, key=lambda piece: (len(piece.removeprefix("##")) > 1, -pieces[piece], piece))
    return {piece: index for index, piece in enumerate([*SPECIAL.values(), *ordered][:size])}
