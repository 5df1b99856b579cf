"""Load a tokenizer.json, try it and print the largest id that it gives, in a process that may die.

The script is run by its path, with the file as argument. It imports neither torch nor transformers. If a damaged or
hostile file makes the tokenizers library abort, use all memory or run without end, the caller prints one line.
"""

import json
import os
import resource
import string
import sys

MEMORY = 4 * 2**30  # bytes of address space
GROWTH = 64  # largest number of characters and of tokens that one character of a text may become


def main(path: str) -> None:
    seconds = 5 + os.path.getsize(path) // 2**21
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = min(limit for limit in (MEMORY, *resource.getrlimit(resource.RLIMIT_AS)) if limit >= 0)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    with open(path, encoding="utf-8") as file:
        patterns = list(_patterns(json.load(file)))
    largest = max(tokenizer.get_vocab().values(), default=-1)
    for text in [*_texts(), *patterns]:
        normal = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
        if len(normal) > GROWTH * (len(text) + 1):
            raise ValueError(f"{len(text)} characters become {len(normal)}")
        for encoding in (tokenizer.encode(text), tokenizer.encode(text, text)):
            if len(encoding.ids) > 4 * GROWTH * (len(text) + 1):
                raise ValueError(f"{len(text)} characters become {len(encoding.ids)} tokens")
            if max(encoding.type_ids, default=0) > 255:
                raise ValueError(f"token type {max(encoding.type_ids)}")
            largest = max([largest, *encoding.ids])
    print(json.dumps({"largest": largest}))


def _texts() -> list[str]:
    """Return words, every printable character, and runs on which a pattern with too many branches never ends."""
    runs = string.ascii_letters + string.digits + " \n\t.,-_'\"/\\é中😀"
    return [
        "The quick brown fox, 12.5 metres from Zoë's 中文 and العربية 😀, doesn't jump.",
        string.printable,
        "word " * 40 + "!",
        "",
        *(character * 48 + end for character in runs for end in ("", "!")),
    ]


def _patterns(node):
    """Yield the texts that a tokenizer.json replaces or splits at, so that they are tried, too."""
    stack = [node]
    while stack:
        part = stack.pop()
        if isinstance(part, dict):
            text = part.get("String")
            if isinstance(text, str) and len(part) == 1:
                yield text[:1000]
            stack += [value for key, value in part.items() if key not in ("vocab", "merges")]
        elif isinstance(part, list):
            stack += part


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except BaseException as error:  # the library's panics, too
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:300]}))
