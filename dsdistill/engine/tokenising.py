"""Fill the stores of a config's tokenised data, and check them, for `dsdistill tokenize`."""

from dsdistill.config import Config
from dsdistill.data import Mixture, Set, Streamed, texts_of
from dsdistill.data.store_check import verify_stores
from dsdistill.engine.preview import numbers
from dsdistill.engine.resolve import Resolved, read_sets, resolve


def tokenize(config: Config, *, verify: bool = False) -> str:
    """Tokenise all sets of a config and of its teacher's recipe; return a table of their contents.

    verify: read all sources and stores again, and compare them.

    Raises:
        UserError: a row cannot be used; or, with `verify`, a source or a store has changed.
    """
    return _tokenised(resolve(config), verify)


def _tokenised(found: Resolved, verify: bool) -> str:
    told = _tokenised(found.recipe, verify) if found.recipe is not None else ""
    config = found.config
    data = read_sets(config, found.tokenizer, found.student, found.teacher)
    sets: dict[str, Set] = {}
    if isinstance(data.train, Streamed):
        told += f"{config.run.name} train: streamed; a run tokenises it as it goes on\n"
    else:
        sets["train"] = data.train
    sets |= {f"dev {name}".strip(): dev for name, dev in data.devs.items()}
    if verify:
        count = verify_stores(path for examples in sets.values() for path in _paths(examples))
        told += f"{config.run.name}: {count} stores are what their sources give\n"
    for name, examples in sets.items():
        held = numbers(examples, config.data.max_length)
        told += f"{config.run.name} {name}: {held['examples']:,} examples, {held['tokens']:,} tokens\n"
    return told


def _paths(examples: Set) -> list[str]:
    """Return the paths of a set's stores."""
    parts = examples.parts if isinstance(examples, Mixture) else (examples,)
    return [path for part in parts for path in texts_of(part).documents.paths]
