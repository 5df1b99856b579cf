"""Keep the teacher's outputs on the dev sets: in memory for one run, in the cache for other runs.

A teacher never changes, so one pass over a set is enough for every evaluation of every student. Two runs share the
outputs only if they agree in everything on which outputs and measured speed may depend: see `_name`.
"""

import functools
import hashlib
import json
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsdistill import disk
from dsdistill.config.schema import LANGUAGE
from dsdistill.data import Set
from dsdistill.data.cache import is_there
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine import checkpoint
from dsdistill.engine.machine import processor
from dsdistill.engine.origins import content
from dsdistill.engine.passes import at_once
from dsdistill.engine.prepare import Prepared
from dsdistill.engine.teacher import teacher_dtype
from dsdistill.evaluation.scores import Outputs
from dsdistill.models import weights

log = logging.getLogger("dsdistill")

MOST = 2**26  # most bytes of outputs that are kept; larger ones would fill memory and cache
_VALUES, _SPEEDS = "values", "speeds"


class TeacherOutputs:
    """TeacherOutputs finds the teacher's outputs on one set, and keeps those that a pass has made."""

    def __init__(self, examples: Set, prepared: Prepared, ranks: Ranks):
        self.examples, self.prepared, self.ranks = examples, prepared, ranks
        # Nothing is kept for tasks that predict tokens: the KL needs the teacher's logits, which are too large.
        self.possible = prepared.config.task not in LANGUAGE
        # A teacher with random weights belongs to one run.
        self.shared = prepared.config.teacher.path is not None

    @functools.cached_property
    def key(self) -> str:
        """Return the name of these outputs; every rank uses that of rank 0."""
        return self.ranks.gather(_name(self.examples, self.prepared, self.ranks))[0]

    @property
    def path(self) -> Path:
        return Path(self.prepared.config.data.cache, f"teacher-{self.key}.safetensors").expanduser()

    def find(self) -> Outputs | None:
        """Return the outputs, the same on every rank, or None if they must be made."""
        if not self.possible:
            return None
        if self.key not in self.prepared.outputs:
            with self.ranks.first_alone():
                found = self._read() if self.ranks.first else None
            found = self.ranks.gather(found)[0]
            if found is None:
                return None
            self.prepared.outputs[self.key] = found
        return self.prepared.outputs[self.key]

    def keep(self, outputs: Outputs) -> None:
        """Keep outputs that a pass has made, unless they are large."""
        if outputs.values.nbytes > MOST:
            return
        self.prepared.outputs[self.key] = outputs
        if not (self.ranks.first and self.shared):
            return
        try:
            with disk.replacing(self.path) as made:
                speeds = {_SPEEDS: json.dumps(outputs.speeds)}
                save_file({_VALUES: outputs.values.contiguous()}, made, metadata=speeds)
        except disk.Unwritable as error:
            log.warning("the teacher's outputs cannot be kept in the cache: %s", error)

    def _read(self) -> Outputs | None:
        """Return the outputs that the cache has; None if it has none or a damaged file."""
        if not (self.shared and is_there(self.path)):
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                values, speeds = file.get_tensor(_VALUES), json.loads(file.metadata()[_SPEEDS])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            log.warning("%s is damaged and is made again", self.path)
            return None
        log.info("the teacher's outputs on %d texts are read from %s", len(values), self.path)
        return Outputs(values, speeds)


def _name(examples: Set, prepared: Prepared, ranks: Ranks) -> str:
    """Return a digest of the teacher, the set, how the teacher reads it, and the machine."""
    config, path = prepared.config, prepared.config.teacher.path
    of = {
        "teacher": config.teacher.model_dump(mode="json", exclude={"path", "recipe"}),
        # If the commit of a hub model is unknown, its name is used.
        "weights": path and (weights.fingerprint(path, "teacher") or path),
        "seed": config.run.seed if path is None else None,
        "dtype": teacher_dtype(config),
        "pooling": prepared.pair.pooling[1],
        "task": config.task,
        "set": content(examples, prepared.data.labels),
        "batch": [at_once(prepared, examples), ranks.world_size, prepared.tokenizer.pad_token_id],
        "versions": checkpoint.versions(),
        "machine": [processor(), torch.get_num_threads()],
    }
    if ranks.device.type == "cuda":
        of["machine"].append(torch.cuda.get_device_name(ranks.device))
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
