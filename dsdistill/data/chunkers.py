"""Cut a line of text into words and phrases, as (start, end) character offsets.

The MTA paper uses words, and spaCy's noun and verb phrases. Without a parser a phrase is a run of content words; this
definition is the project's own.
"""

import importlib
import logging
import re
from collections.abc import Callable, Iterable

from dsdistill.config.errors import UserError

Span = tuple[int, int]
Chunker = Callable[[str], tuple[list[Span], list[Span]]]  # a line → words, phrases; both in order

MAX_WORDS = 12  # in a phrase
SPACY_MODEL = "en_core_web_sm"

# Each Chinese or Japanese character counts as a word, because these scripts do not mark where words end.
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W{_IDEOGRAPH}]+(?:['’-][^\W{_IDEOGRAPH}]+)*")

_STOPWORDS = frozenset(
    """
    a about above after again against all also am an and any are as at be because been before being below between
    both but by can could did do does doing down during each either else ever every few for from further had has
    have having he her here hers him his how i if in into is it its itself just me might more most must my neither
    no nor not now of off on once one only or other our ours out over own per same shall she should since so some
    such than that the their theirs them then there these they this those though through thus to too under until
    up upon us very was we were what when where whether which while who whom whose why will with within without
    would yet you your yours
    的 了 是 在 和 与 及 也 都 就 而 但 或 于 把 被 让 对 从 到 向 为 以 之 其 这 那 我 你 他 她 它 们 着 过 吗 呢 吧 啊
    """.split()
)
# Parts of speech in jieba's tags that carry meaning: nouns, verbs, adjectives, idioms, numbers, foreign words, ….
_JIEBA_CONTENT = ("n", "v", "a", "b", "i", "j", "l", "m", "q", "s", "t", "z", "eng")


def chunker(name: str) -> Chunker:
    """Return the chunker of this name: builtin (needs no package), spacy (English) or jieba (Chinese).

    Raises UserError, which names what is missing, if a package or model is not installed.
    """
    return {"builtin": lambda: builtin, "spacy": _spacy, "jieba": _jieba}[name]()


def builtin(line: str) -> tuple[list[Span], list[Span]]:
    """Return the words of a line, and phrases: runs of words that are not stopwords, without punctuation between."""
    words = [match.span() for match in _WORD.finditer(line)]
    content = [line[start:end].lower() not in _STOPWORDS for start, end in words]
    return words, _runs(line, words, content)


def _runs(line: str, words: list[Span], content: Iterable[bool]) -> list[Span]:
    """Return the longest runs of content words with only space between them, of at most MAX_WORDS words each."""
    runs: list[list[Span]] = []
    last = None
    for word, counts in zip(words, content, strict=True):
        if counts:
            joined = last is not None and not line[last[1] : word[0]].strip()
            if joined and len(runs[-1]) < MAX_WORDS:
                runs[-1].append(word)
            else:
                runs.append([word])
        last = word if counts else None
    return [(run[0][0], run[-1][1]) for run in runs]


def _import(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            "data.chunker", f"{name}, which is not installed", f"pip install {name}, or builtin"
        ) from None


def _spacy() -> Chunker:
    spacy = _import("spacy")
    try:
        pipeline = spacy.load(SPACY_MODEL, exclude=["ner", "lemmatizer"])
    except OSError:
        raise UserError(
            "data.chunker",
            f"spacy without its model {SPACY_MODEL}",
            f"python -m spacy download {SPACY_MODEL}, or builtin",
        ) from None
    return lambda line: parsed(pipeline(line))


def parsed(doc) -> tuple[list[Span], list[Span]]:
    """Return the words of a parsed spaCy document, and its noun and verb phrases that do not lie in other phrases.

    A verb phrase is a verb with its negation and auxiliaries on the left, and with its whole object, particle or
    complement on the right. Verb phrases of more than MAX_WORDS words are left out.
    """
    words = [token for token in doc if not (token.is_punct or token.is_space)]
    phrases = [(chunk.start_char, chunk.end_char) for chunk in doc.noun_chunks]
    for verb in words:
        if verb.pos_ != "VERB":
            continue
        left = [child for child in verb.lefts if child.dep_ in ("neg", "aux", "auxpass")]
        right = [
            token
            for child in verb.rights
            if child.dep_ in ("dobj", "obj", "dative", "prt", "attr", "acomp", "xcomp", "ccomp", "oprd")
            for token in child.subtree
        ]
        inside = sorted([*left, verb, *right], key=lambda token: token.i)
        if inside[-1].i - inside[0].i < MAX_WORDS:
            phrases.append((inside[0].idx, inside[-1].idx + len(inside[-1])))
    return [(word.idx, word.idx + len(word)) for word in words], _outermost(phrases)


def _outermost(spans: list[Span]) -> list[Span]:
    kept: list[Span] = []
    for span in sorted(set(spans), key=lambda s: (s[0], -s[1])):
        if not kept or span[1] > kept[-1][1]:
            kept.append(span)
    return kept


def _jieba() -> Chunker:
    _import("jieba").setLogLevel(logging.WARNING)
    tagged = _import("jieba.posseg")

    def chunk(line: str) -> tuple[list[Span], list[Span]]:
        words, content, at = [], [], 0
        for pair in tagged.cut(line):
            end = at + len(pair.word)
            if re.search(r"[^\W_]", pair.word):
                words.append((at, end))
                content.append(pair.flag.startswith(_JIEBA_CONTENT))
            at = end
        return words, _runs(line, words, content)

    return chunk
