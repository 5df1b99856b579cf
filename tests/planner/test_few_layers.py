"""A rehearsal of a few layers and blocks is compared with the rehearsal of all."""

import pytest

from dsdistill.config.load import make_config
from dsdistill.ops.attention import chunked as attention
from dsdistill.ops.hidden import chunked as hidden
from dsdistill.ops.pairwise import chunked as pairwise
from dsdistill.ops.soft_label import head
from dsdistill.planner import stand_in
from dsdistill.planner.plan import Forecast
from dsdistill.planner.rehearsal import PHASES, rehearse

WIDTHS = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8, "vocab_size": 8000}
GROUPED = WIDTHS | {"num_key_value_heads": 2, "head_dim": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
FAMILIES = {
    "bert": {"model_type": "bert", "attention_probs_dropout_prob": 0.0, **WIDTHS},
    "gpt2": {"model_type": "gpt2", "n_embd": 256, "n_head": 8, "vocab_size": 8000, "eos_token_id": 1},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, **WIDTHS},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 64, **GROUPED},  # five sliding layers, then a full one
    "qwen3_moe": {"model_type": "qwen3_moe", **GROUPED, **EXPERTS},
}  # fmt: skip
LOGITS = {"task": {}, "soft_label": {}}
ALL = LOGITS | {"hidden": {}, "attention": {"layers": [[3, 3], [13, 14]]}, "pairwise": {}}
QUICK = [
    ("bert", 1, 0, False, "bf16", ALL),
    ("gemma3", 3, 0, True, "bf16", LOGITS),
    ("qwen3_moe", 2, 3, True, "bf16", LOGITS),
]
MORE = [
    (family, stage, teacher, checkpointing, "bf16", terms)
    for family in FAMILIES
    for stage, teacher, checkpointing in [(1, 0, False), (2, 3, True), (3, 3, False), (3, 3, True)]
    for terms in (ALL, LOGITS)
]


def forecast_of(family, stage, teacher, checkpointing, dtype, terms) -> Forecast:
    settings = FAMILIES[family]
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    width = {"n_embd": 128} if family == "gpt2" else {"hidden_size": 192}
    causal = family != "bert"
    config = make_config(
        {
            "task": "causal_lm" if causal else "classification",
            "data": {
                "source": "files",
                "train": "x.jsonl",
                "dev": "x.jsonl",
                "text": ["text"],
                "label": None if causal else "label",
                "tokenizer": "x",
                "max_length": 256,
            },
            "teacher": {"config": settings | {depth: 14}, "zero_stage": teacher},
            "student": {
                "config": settings | width | {depth: 13},
                "zero_stage": stage,
                "gradient_checkpointing": checkpointing,
            },
            "terms": terms,
            "train": {"steps": 2, "batch_size": 32, "micro_batch_size": 2, "dtype": dtype},
        }
    )
    return Forecast(config, 4, gpu=True)


def both(forecast: Forecast) -> list[dict[str, int]]:
    """Return the bytes of each phase, from a whole rehearsal and from one of a few layers."""
    config = forecast.config
    (stage,), checkpointing = config.run_stages, config.student.gradient_checkpointing
    return [
        {
            phase: held.total()
            for phase, held in rehearse(
                config,
                stage,
                forecast.models,
                forecast.rank,
                config.train.micro_batch_size,
                checkpointing=checkpointing,
                whole=whole,
            ).peaks.items()
        }
        for whole in (True, False)
    ]


def check(case: tuple, monkeypatch) -> None:
    replaced = []
    make = stand_in._Kind.stand_in
    monkeypatch.setattr(stand_in._Kind, "stand_in", lambda *args: replaced.append(args[1]) or make(*args))
    whole, few = both(forecast_of(*case))
    ratios = {phase: few[phase] / whole[phase] for phase in PHASES}
    print(case[:4], {phase: round(ratio, 4) for phase, ratio in ratios.items()})
    assert len(replaced) > 6
    assert all(abs(ratio - 1) <= 0.02 for ratio in ratios.values()), ratios


def name(case: tuple) -> str:
    family, stage, teacher, checkpointing, _, terms = case
    return (
        f"{family}, stages {teacher} and {stage}"
        + ", checkpointing" * checkpointing
        + ", all" * (terms is ALL)
    )


@pytest.mark.parametrize("case", QUICK, ids=name)
def test_a_few_layers_stand_for_all(case, monkeypatch):
    check(case, monkeypatch)


@pytest.mark.soak
@pytest.mark.parametrize("case", MORE, ids=name)
def test_a_few_layers_stand_for_all_everywhere(case, monkeypatch):
    check(case, monkeypatch)


def test_a_few_blocks_stand_for_all(monkeypatch):
    """Blocks are small, so that each operator has more blocks than are rehearsed."""
    for operator in (attention, pairwise):
        monkeypatch.setattr(operator, "MAX_ROWS", 32)
    monkeypatch.setattr(hidden, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(hidden, "MIN_TOKENS", 64)
    terms = LOGITS | {"hidden": {"layers": "last"}, "attention": {"layers": "last"}, "pairwise": {}}
    monkeypatch.setattr(head, "GPU_MAX_TOKENS", 64)
    monkeypatch.setattr(head, "GPU_SLICE_ELEMENTS", 8 * 8000)
    check(("qwen2", 3, 3, True, "bf16", terms), monkeypatch)


def test_shallow_models_run_whole(monkeypatch):
    forecast = forecast_of("bert", 2, 0, False, "bf16", {"task": {}})
    monkeypatch.setattr(stand_in, "WHOLE", 14)
    monkeypatch.setattr(stand_in._Kind, "stand_in", None)  # this would be called, and would fail
    whole, few = both(forecast)
    assert whole == few
