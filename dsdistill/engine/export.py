"""From a run to a plain model folder, with nothing of the distillation left in it."""

import logging
import os

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dsdistill import config as configs
from dsdistill import disk
from dsdistill.config import Config, UserError
from dsdistill.config.schema import LANGUAGE
from dsdistill.disk import check_writable
from dsdistill.distributed import deepspeed
from dsdistill.engine import checkpoint
from dsdistill.engine.run_folder import CONFIG, INIT, RunFolder, check_plain
from dsdistill.models.build import architecture, build_model, load_tokenizer
from dsdistill.models.domain_fusion import FUSION, STUDENT
from dsdistill.models.settings import carry_generation, text_config

log = logging.getLogger("dsdistill")


def read_config(path: str) -> Config:
    """Config of a run folder; raises UserError where there is none."""
    folder = RunFolder(path)
    if not os.path.isfile(folder / CONFIG):
        raise UserError(
            path, f"a folder without {CONFIG}" if os.path.isdir(path) else "no such folder", "a run folder"
        )
    check_plain(path)
    return configs.load_saved(folder / CONFIG)


def find_checkpoint(path: str) -> str:
    """Tag of a run's newest good checkpoint; raises UserError where there is none."""
    tag = checkpoint.newest(path)
    if tag is None:
        raise UserError(path, "a run without a checkpoint that verifies", "a run that saved at least one")
    return tag


def load_student(run: str, config: Config, tag: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The student of a checkpoint, in float32 on the CPU, and the weights of its domain fusion ({} without one)."""
    model = build_model(
        architecture(os.path.join(run, INIT), None, "student"),
        None,
        config.task,
        "student",
        needs_head=False,
        attention=config.student.attn_implementation,
    )
    saved = deepspeed.whole_weights(os.path.join(run, checkpoint.FOLDER), tag)

    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}

    model.load_state_dict(below("body.model." if config.task in LANGUAGE else "body."), strict=True)
    return model, below("domain.")


def _newest_student(run: str, config: Config) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """load_student of the newest checkpoint; of one newer still where a run that trains removes that under our eyes."""
    while True:
        tag = find_checkpoint(run)
        try:
            return load_student(run, config, tag)
        except Exception:
            if find_checkpoint(run) == tag:
                raise


def export(run: str, out: str) -> None:
    """Write the student of a run's newest checkpoint as `save_pretrained` does, tokenizer included.

    A student with domain fusion is more than a plain model: OUT/student holds that, OUT/domain.safetensors the fusion,
    and dsdistill.models.domain_fusion.load_exported puts them together.

    A folder that is not there appears whole or not at all. Raises UserError where `out` holds something already.
    """
    check_writable(out, "--out")
    there = os.path.isdir(out)  # perhaps a mount point, which cannot be replaced
    if os.path.exists(out) and (not there or os.listdir(out)):
        raise UserError("--out", f"{out}, which is not empty", "a folder to be made")
    model, fusion = _newest_student(run, read_config(run))
    tokenizer = load_tokenizer(os.path.join(run, INIT), INIT)
    with disk.replacing(os.path.realpath(out)) as made:
        plain = os.path.join(made, STUDENT) if fusion else made
        model.save_pretrained(plain)
        if model.can_generate():
            carry_generation(os.path.join(run, INIT), plain, text_config(model.config).vocab_size)
        tokenizer.save_pretrained(made)
        if fusion:  # the maps are of the teacher's states: they have done their work
            weights = {
                name: value.contiguous() for name, value in fusion.items() if not name.startswith("maps.")
            }
            save_file(weights, os.path.join(made, FUSION))
            log.info(
                "with its domain fusion: dsdistill.models.domain_fusion.load_exported(%r) loads both", out
            )
