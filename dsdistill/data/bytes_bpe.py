"""A byte-level BPE tokenizer from the train texts, which loses nothing and takes conversations."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dsdistill.config.errors import UserError
from dsdistill.data import cache as cache_folder

# One token ends whatever the model writes: a turn, a response, a document. It is the end token, so that generation
# stops there in each case, and in what others make of the tokenizer too. Padding has a token of its own: were it the
# end token, those who mask padding by its id would never let the model learn to stop. The three are Qwen's.
PAD, TURN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

SMALLEST = 300  # 256 bytes, the tokens above and a few merges

# What the assistant writes is marked. A call of tools is refused, as there is no form for it here.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.tool_calls %}{{ raise_exception('this template has no form for tool_calls') }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_bytes_tokenizer(texts: Iterable[str], size: int, cache: str) -> str:
    """Return the folder of a byte-level BPE tokenizer of at most `size` entries, which is kept in the cache folder.

    Every text comes back from its ids as it was. The words are those of GPT-2: a space belongs to the word after it.

    Raises:
        UserError: `size` is too small for all bytes, or the cache cannot be read or written.
    """
    if size < SMALLEST:
        raise UserError("data.train_tokenizer", size, f"at least {SMALLEST} with data.tokenizer_kind: bytes")
    kind = f"bytes {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"
    return cache_folder.tokenizer(kind, texts, size, cache, lambda texts: _made(texts, size))


def _made(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[TURN],
        model_input_names=["input_ids", "attention_mask"],
        chat_template=TEMPLATE,
    )
