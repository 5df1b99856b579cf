"""Train a byte-level BPE tokenizer on the train texts. It is lossless and has a chat template for conversations."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dsdistill.config.errors import UserError
from dsdistill.data import cache as cache_folder

# One token, the end token, ends everything that the model writes: a turn, a response, a document. So generation stops
# there in each case, also in other programs that use the tokenizer. Padding has a separate token: programs that mask
# padding by its id would otherwise also mask the end token, and the model would never learn to stop. All three are
# tokens of Qwen.
PAD, TURN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

SMALLEST = 300  # 256 bytes, the tokens above and a few merges

# The template marks what the assistant writes. It refuses tool calls, because it has no form for them.
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

    Decoding the ids of a text gives the same text. Words are split as by GPT-2: a space belongs to the word after it.

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
