"""The commands verify and bench. Each imports what it needs when it runs, so that --help is instant."""

import functools
from typing import Annotated

import typer

from dsdistill.config import UserError


def verify(
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Also write the rows there.")
    ] = None,
    aot: Annotated[
        bool,
        typer.Option(
            "--aot",
            help="Instead compile the GPU kernels for sm_80 and sm_90 and look for spills; needs no GPU.",
        ),
    ] = False,
):
    """Check every operator and backend of this machine against float64; exit code 0 only when all holds."""
    from dsdistill.disk import check_file

    check_file(json, "--json")
    if aot:
        from dsdistill.bench.aot import run_aot

        raise typer.Exit(run_aot(json))
    from dsdistill.bench.verify import run_verify

    raise typer.Exit(run_verify(json))


def bench(
    operator: Annotated[
        str,
        typer.Argument(
            metavar="OPERATOR",
            help="attention, pairwise, hidden, soft-label, cross-entropy, vocabulary, auto, step, data, load, deploy.",
            show_default=False,
        ),
    ],
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Of deploy: folder of a run.", show_default=False)
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            "--shapes",
            metavar="NAME=VALUE,...",
            help="Sizes and options: tokens=1024,batch=4,divergence=kl,causal=true; of a step "
            "teacher=6,student=3,width=384,heads=12,vocabulary=30522,tokens=512,step=2048; of data "
            "text=FILE,size=50MB,tokenizer=DIR,documents=2000000; of load "
            "layers=24,width=1024,vocabulary=151936,shards=5; of deploy "
            "threads=1,batch=16,examples=32",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    backends: Annotated[
        str | None,
        typer.Option(
            "--backends",
            metavar="NAME,...",
            help="Some of eager, compile, chunked, cpp, triton, cuda, liger; of a step some of logits, hidden, "
            "attention, pairwise, eager, textbrewer; of deploy some of pytorch, compile, onnx, int8.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", metavar="SIZE", help="Of deploy: most that a process may take, such as 512MiB."
        ),
    ] = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Also write the figures there.")
    ] = None,
    plot: Annotated[str | None, typer.Option("--plot", metavar="FILE.png", help="Also draw them.")] = None,
):
    """Time an operator against eager and compiled PyTorch, after a green check; on a GPU if there is one.

    step: tokens/s and peak memory of a whole training step instead, by levels, sequence length and layers mapped.
    auto: what `backend: auto` takes for each operator, dtype and class of shapes, and what is the fastest.
    data: tokens/s, memory and room of tokenising, and the seconds of a start.
    load: memory of two ranks while they load a large teacher and a student cut from it; exit code 1 over a limit.
    deploy: time of a text, texts a second, memory and file of RUN's student and teacher on CPUs, also as ONNX and int8.
    """
    from dsdistill.disk import check_file

    check_file(json, "--json")
    check_file(plot, "--plot")
    for name, given in (("RUN", run), ("--memory", memory)):
        if given is not None and operator != "deploy":
            raise UserError(f"bench {name}", given, "nothing: only deploy has it")
    if operator == "deploy":
        from dsdistill.config.packages import check_onnx

        check_onnx("bench deploy")
    from dsdistill.bench.arguments import parse_shapes
    from dsdistill.bench.auto import run_auto
    from dsdistill.bench.data_speed import run_data
    from dsdistill.bench.deploy import run_deploy
    from dsdistill.bench.loading import run_load
    from dsdistill.bench.operators import run_bench
    from dsdistill.bench.step import run_step

    measures = {"auto": run_auto, "step": run_step, "data": run_data, "load": run_load}
    measures["deploy"] = functools.partial(run_deploy, run, memory=memory)
    raise typer.Exit(
        measures.get(operator, functools.partial(run_bench, operator))(
            options=parse_shapes(shapes),
            dtype=dtype,
            backends=backends.split(",") if backends else None,
            json_path=json,
            plot_path=plot,
        )
    )
