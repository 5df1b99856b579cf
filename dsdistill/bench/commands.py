"""The commands verify and bench. Each imports what it needs when it runs, so that --help is instant."""

import functools
from typing import Annotated

import typer

from dsdistill.config import UserError


def verify(
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Also write the rows to this file.")
    ] = None,
    aot: Annotated[
        bool,
        typer.Option(
            "--aot",
            help="Instead compile the GPU kernels for sm_80 and sm_90 and look for register spills. It needs no GPU.",
        ),
    ] = False,
):
    """Check every operator and backend of this machine against float64. The exit code is 0 only if all checks pass."""
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
        str | None, typer.Argument(metavar="[RUN]", help="deploy: folder of a run.", show_default=False)
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            "--shapes",
            metavar="NAME=VALUE,...",
            help="Sizes and options. Operators: tokens=1024,batch=4,divergence=kl,causal=true. step: "
            "teacher=6,student=3,width=384,heads=12,vocabulary=30522,tokens=512,step=2048. data: "
            "text=FILE,size=50MB,tokenizer=DIR,documents=2000000. load: "
            "layers=24,width=1024,vocabulary=151936,shards=5. deploy: "
            "threads=1,batch=16,examples=32",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    backends: Annotated[
        str | None,
        typer.Option(
            "--backends",
            metavar="NAME,...",
            help="What to measure. Operators: eager, compile, chunked, cpp, triton, cuda, liger. step: logits, hidden, "
            "attention, pairwise, eager, textbrewer. deploy: pytorch, compile, onnx, int8.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", metavar="SIZE", help="deploy: memory limit of each process, such as 512MiB."
        ),
    ] = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Also write the figures to this file.")
    ] = None,
    plot: Annotated[str | None, typer.Option("--plot", metavar="FILE.png", help="Also draw a plot.")] = None,
):
    """Check an operator, then time it against eager and compiled PyTorch, on a GPU if there is one.

    step: speed and peak memory of a whole training step, by loss terms, sequence length and number of mapped layers.
    auto: which backend `backend: auto` takes for each operator, dtype and class of shapes, and which is fastest.
    data: speed, memory and disk space of tokenising, and the time that a run takes to start.
    load: memory of two ranks that load a large teacher and a student cut from it; the exit code is 1 over a limit.
    deploy: latency, throughput, memory and file size of RUN's student and teacher on CPUs, also as ONNX and int8.
    """
    from dsdistill.disk import check_file

    check_file(json, "--json")
    check_file(plot, "--plot")
    for name, given in (("RUN", run), ("--memory", memory)):
        if given is not None and operator != "deploy":
            raise UserError(f"bench {name}", given, "nothing: only deploy takes it")
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
