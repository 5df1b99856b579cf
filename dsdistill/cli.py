"""Define the command line. Each command imports what it needs only when it runs, so that --help is fast."""

import contextlib
import logging
import os
import signal
import sys
import warnings
from typing import Annotated

import typer

from dsdistill import __version__, disk
from dsdistill.bench import commands
from dsdistill.config import RunError, SharedError, Stopped, UserError, load

app = typer.Typer(
    name="dsdistill",
    help="Distil a large transformer teacher into a small student.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFiles = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG [FILE|KEY=VALUE]...",
        help="A YAML file, then more YAML files and key=value overrides. Later ones win: "
        "configs/quickstart.yaml configs/deepspeed/zero3.yaml train.steps=100",
        show_default=False,
    ),
]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]


@app.callback(invoke_without_command=True)
def root(
    # Only the launcher of DeepSpeed sets this.
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
):
    if version:
        typer.echo(__version__)
        raise typer.Exit
    _quiet_libraries()


@app.command()
def train(
    settings: ConfigFiles,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check the config, the batches and the beginning of the data files, print what differs from the "
            "defaults, and stop.",
        ),
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="With --dry-run: print every setting.")] = False,
    world_size: Annotated[
        int | None,
        typer.Option("--world-size", help="With --dry-run: number of ranks. [default: the launcher's, or 1]"),
    ] = None,
):
    """Train the student of CONFIG: distil it from its teacher, or fine-tune it if CONFIG has no teacher.

    One process: dsdistill train CONFIG. Several: deepspeed --num_gpus 8 --module dsdistill train CONFIG.
    """
    for name, given in (("--full", full or None), ("--world-size", world_size)):
        if given is not None and not dry_run:
            raise UserError(name, "a run", "--dry-run beside it")
    config = load(settings)
    if dry_run:
        from dsdistill.config import dump
        from dsdistill.engine.dry_run import check

        try:
            passed = check(config, world_size)
        except UserError as error:
            raise error.within(settings[0]) from None
        if _first():
            typer.echo(dump(config, full=full), nl=False)
            for name in passed:
                typer.echo(f"# not checked, because it is on the hub: {name}")
        return
    from dsdistill.distributed import stopping

    with stopping.watch(config.run.grace):
        from dsdistill.engine.run import train as run
        from dsdistill.engine.run_folder import as_begun, check_sources
        from dsdistill.report import show

        try:
            config = as_begun(config)
            check_sources(config, settings)
            summary = run(config)
        except UserError as error:
            raise error.within(settings[0]) from None
        if _first():
            show(config.run_dir, summary)


@app.command()
def plan(
    settings: ConfigFiles,
    world_size: Annotated[int, typer.Option("--world-size", help="Number of ranks, one for each GPU.")] = 1,
    gpu_memory: Annotated[str, typer.Option("--gpu-memory", help="Memory of each rank.")] = "80GiB",
    cpu: Annotated[bool, typer.Option("--cpu", help="Plan for ranks on CPUs instead of GPUs.")] = False,
    ranks_per_node: Annotated[
        int | None,
        typer.Option(
            "--ranks-per-node",
            help="Number of ranks on a node, which share its memory. [default: all, at most 8]",
        ),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            "--host-memory", metavar="SIZE", help="Host memory of a node. A plan that needs more fails."
        ),
    ] = None,
    peak_flops: Annotated[
        float | None,
        typer.Option(
            "--peak-flops",
            help="Peak speed of a rank in dense operations per second. [default: an A100's; no times with --cpu]",
        ),
    ] = None,
    utilisation: Annotated[
        float, typer.Option("--utilisation", help="Share of the peak speed that training reaches.")
    ] = 0.4,
    suggest: Annotated[
        bool,
        typer.Option(
            "--suggest",
            help="Propose overrides that fit: ZeRO stages, offload, checkpointing and a micro-batch.",
        ),
    ] = False,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Also write the figures to this file.")
    ] = None,
):
    """Print the memory, disk space and time that CONFIG needs, and the largest micro-batch that fits.

    Nothing is loaded or downloaded. The exit code is 1 if CONFIG does not fit.
    """
    from dsdistill.disk import check_file

    check_file(json, "--json", settings)
    config = load(settings)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the library is imported
    from dsdistill.planner.duration import check_rate
    from dsdistill.planner.listing import refusal, table, write
    from dsdistill.planner.plan import make_plan, parse_memory
    from dsdistill.planner.suggest import proposals
    from dsdistill.planner.suggest import suggest as propose

    memory = parse_memory(gpu_memory)
    host = None if host_memory is None else parse_memory(host_memory, "--host-memory")
    rate = check_rate(peak_flops, utilisation, config.train.dtype, gpu=not cpu)
    ranks = min(world_size, 8) if ranks_per_node is None else ranks_per_node
    try:
        found = make_plan(config, world_size, memory, gpu=not cpu, ranks_per_node=ranks, rate=rate)
    except UserError as error:
        raise error.within(settings[0]) from None
    typer.echo(table(found, config, world_size, memory, host), nl=False)
    if suggest:
        tried = propose(
            lambda overrides: load([*settings, *overrides]),
            world_size,
            memory,
            gpu=not cpu,
            ranks=ranks,
            host_memory=host,
        )
        typer.echo(proposals(tried, memory), nl=False)
    if json is not None:
        write(found, json)
    if reason := refusal(found, memory, host):
        raise RunError(f"{settings[0]} {reason}")


@app.command()
def tokenize(
    settings: ConfigFiles,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read all sources again and compare them with the cached tokens."),
    ] = False,
):
    """Tokenise the data of CONFIG and of its teacher's recipe, and cache the tokens for later runs.

    Tokens that are cached already are kept. If the command is stopped, it continues when it is run again.
    """
    config = load(settings)
    from dsdistill.engine.tokenising import tokenize as run

    try:
        typer.echo(run(config, verify=verify), nl=False)
    except UserError as error:
        raise error.within(settings[0]) from None


@app.command()
def preview(
    settings: ConfigFiles,
    count: Annotated[int, typer.Option("-n", min=0, help="Number of examples to show.")] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="Also show the token ids.")] = False,
    json: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="FILE", help="Write the examples to this file instead of showing them."
        ),
    ] = None,
):
    """Show the first examples of CONFIG as the models see them, and how much of the data is used.

    Rows that cannot be used are counted and listed by file and line.
    """
    from dsdistill.disk import check_file, save_json

    check_file(json, "--json", settings)
    config = load(settings)
    from dsdistill.engine.preview import preview as look
    from dsdistill.engine.preview import render

    try:
        found = look(config, count)
    except UserError as error:
        raise error.within(settings[0]) from None
    if json is not None:
        save_json(json, found.examples)
        found.examples = []
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    typer.echo(render(found, colours=colours, ids=ids), nl=False)


@app.command()
def evaluate(
    run: RunPath,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Score this file instead of the dev sets. The option can be repeated.",
        ),
    ] = None,
):
    """Evaluate the newest checkpoint of RUN on its dev sets and add the scores to RUN/summary.json.

    With --data, score files with the same columns and classes instead; their scores are added under `others`.
    """
    from dsdistill.distributed import stopping

    with stopping.watch():
        from dsdistill.engine.evaluate import evaluate_run
        from dsdistill.report import show, show_others

        files = list(dict.fromkeys(data or ()))
        summary = evaluate_run(run, files)
        if _first():
            show_others(summary, files) if files else show(run, summary)


@app.command()
def compare(
    plan: Annotated[
        str,
        typer.Argument(metavar="PLAN", help="A YAML file with seeds and methods.", show_default=False),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE|KEY=VALUE]...",
            help="Files and overrides that apply to every method, after its own.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Folder of the runs.")] = "runs/compare",
    scale: Annotated[str, typer.Option("--scale", help="small, or node if the plan offers it.")] = "small",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all configs, list the runs, and stop.")
    ] = False,
):
    """Train and evaluate every method of PLAN with every seed. Print a table and verdicts, and write a page.

    Finished runs are kept. If the command is stopped, it continues when it is run again; a longer plan adds its runs.
    """
    from dsdistill.engine.compare import compare as run
    from dsdistill.report import show_comparison, show_page

    typer.echo(run(plan, out, settings or [], scale, dry_run))
    if dry_run:
        return
    show_comparison(out, table=False)
    show_page(out)


@app.command()
def report(
    path: Annotated[
        str,
        typer.Argument(
            metavar="RUN|DIR", help="Folder of a run, or of a comparison (compare --out).", show_default=False
        ),
    ],
):
    """Write report.html into the folder: one page with tables, curves and examples, which any browser opens from disk.

    train writes the page at its end. This command also works on a run that is not finished, and on a comparison,
    whose tables it prints.
    """
    from dsdistill.report import show_comparison, write_page

    page = write_page(path)
    show_comparison(path)
    typer.echo(page)


@app.command()
def export(
    run: RunPath,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Folder to create.", show_default=False)],
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="Type of the weights: bf16, fp16 or fp32. [default: the run's train.dtype]"
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size", metavar="SIZE", help="Largest size of a file of weights. [default: 5GB]"
        ),
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write only the adapters of student.lora, for peft.")
    ] = False,
    form: Annotated[
        str, typer.Option("--format", help="transformers, or onnx for model.onnx in float32.")
    ] = "transformers",
    int8: Annotated[
        bool,
        typer.Option("--int8", help="With --format onnx: also write model.int8.onnx, which is quantised."),
    ] = False,
):
    """Write the student of RUN's newest checkpoint as a plain Hugging Face folder, tokenizer included.

    With --format onnx, write an ONNX graph for any batch size and length, and check that it computes the same.
    """
    if form not in ("transformers", "onnx"):
        raise UserError("--format", repr(form), "transformers or onnx")
    graph = (("--dtype", dtype), ("--max-shard-size", shard), ("--adapter", adapter or None))
    for name, given in graph if form == "onnx" else ():
        if given is not None:
            raise UserError(
                name, f"{given} beside --format onnx", "nothing: the graph has one file in float32"
            )
    if form == "transformers":
        if int8:
            raise UserError("--int8", "no ONNX graph", "--format onnx beside it")
        from dsdistill.engine.export import export as write

        write(run, out, dtype=dtype, max_shard_size=shard or "5GB", adapter=adapter)
    else:
        from dsdistill.config.packages import check_onnx

        check_onnx("--format")
        from dsdistill.engine.export import export_onnx

        for name, most in export_onnx(run, out, int8=int8).items():
            typer.echo(f"{name}: largest difference from the student {most:.1e}")
    typer.echo(f"student of {run} written to {out}")


app.command()(commands.verify)
app.command()(commands.bench)


def _first() -> bool:
    """Return whether this process prints for all ranks. A process with an impossible rank prints for itself."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return not (rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size))


def _quiet_libraries() -> None:
    """Silence the messages of libraries, and send our own to standard error, from the first rank only."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # otherwise each rank prints a stack when another is gone
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("dsdistill").setLevel(logging.INFO if _first() else logging.ERROR)


def main() -> None:
    """Run a command, and end the process with its exit code."""
    from dsdistill.distributed.leave import leave

    try:
        code = run()
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    leave(code)


def _say(told: object) -> None:
    """Print the line that explains why the process ends; if that fails, only the exit code is left."""
    with contextlib.suppress(OSError):
        print(f"dsdistill: {told}", file=sys.stderr, flush=True)


def run() -> int:
    """Run a command and return its exit code.

    For a user's mistake it prints one line and returns 2. For a run that cannot go on it prints one line and returns 1.
    """
    usage_error = typer.BadParameter.__base__  # typer does not export this class
    try:
        return app(standalone_mode=False, prog_name="dsdistill") or 0
    except usage_error as error:
        if "\n" in error.message:  # no command was given, so the message is the whole help
            error.show()
        else:
            asked = error.ctx.command_path if error.ctx is not None else "dsdistill"
            got = error.format_message().rstrip(".").removeprefix("Got ")
            mistake = UserError("command line", got[0].lower() + got[1:], f"what {asked} --help shows")
            _say(mistake)
        return 2
    except UserError as error:
        if _first():
            _say(error)
        return 2
    except RunError as error:  # every rank prints its own error, since the others may not know of it
        if _first() or not isinstance(error, SharedError):
            _say(error)
        return 1
    except Stopped as stopped:
        if _first():
            _say(stopped)
        return stopped.code
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in disk.FULL:
            raise
        _say(f"{error.filename or 'output'} cannot be written: {disk.reason(error)}")
        return 1
    except typer.Abort:  # Ctrl-C in a command that has nothing to save
        return 130
