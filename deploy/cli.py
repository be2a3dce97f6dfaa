"""The `scope` command. Heavy imports wait until a command needs them."""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.config import ConfigError, dump, load, load_demo, load_other, load_teachers
from deploy.entry import importing
from services.errors import ScopeError

if TYPE_CHECKING:
    from deploy.remote import Remote

app = typer.Typer(
    help="SCOPE: on-policy distillation of reasoning models as a distributed service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

monitoring = typer.Typer(help="Prometheus and Grafana for the runs of a cluster.")
app.add_typer(monitoring, name="monitoring")


@monitoring.callback()
def _monitoring() -> None:
    """Keeps `up` a command of its own: Typer would melt a group's only one into the group."""


ConfigPath = Annotated[Path, typer.Argument(help="A run's YAML config.")]
RunDir = Annotated[Path, typer.Argument(help="A run directory, such as runs/demo.")]
Address = Annotated[
    str | None,
    typer.Option(
        envvar="SCOPE_ADDRESS",
        help="A Ray cluster. With http(s)://HOST:8265 the command and its paths are the cluster's.",
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides: section.key=value …", show_default=False)
]


@app.command()
def run(config: ConfigPath, overrides: Overrides = None, address: Address = None) -> None:
    """Train: prompts in, a better student out."""
    if address is not None:
        driver = "auto" if _is_remote(address) else address
        overrides = [*(overrides or ()), f"ray.address={driver}"]
    settings = load(config, overrides or ())
    if address is not None and _is_remote(address):
        _remote(address).run(settings, _ask_to_stop)
    else:
        _execute(settings, directory=None)


@app.command()
def demo(overrides: Overrides = None) -> None:
    """Train a tiny student from a tiny teacher, both of which come with this program; minutes."""
    _execute(load_demo(overrides or ()), directory=None)


@app.command()
def resume(run_dir: RunDir, address: Address = None) -> None:
    """Continue an interrupted run from its last checkpoint."""
    if address is not None:
        _remote(address).resume(str(run_dir), _ask_to_stop)
        return
    _execute(load(run_dir / "config.yaml"), directory=run_dir)


@app.command()
def follow(
    job: Annotated[str, typer.Argument(help="The job id that `scope run` printed.")],
    address: Address = None,
) -> None:
    """Show the output of a run on a cluster from its start."""
    if address is None:
        raise ConfigError("which cluster? give --address http://HOST:8265")
    _remote(address).follow(job, _ask_to_stop)


@app.command()
def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check config, models and data, and print the resolved config; starts nothing."""
    settings = load(config, overrides or ())
    typer.echo(dump(settings))
    from deploy import preflight

    results = preflight.check(settings)
    for model in results.models:
        typer.echo(model, err=True)
    for warning in results.warnings:
        typer.echo(f"note: {warning}", err=True)
    for source, text in results.contexts.items():
        typer.echo(f"a row of {source!r}, as its teacher reads it:\n{text}", err=True)
    typer.echo(
        f"ok: {results.total_groups} prompts in all, "
        f"{-(-results.total_groups // settings.trainer.groups_per_step)} steps",
        err=True,
    )


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="Also check what this run needs.")] = None,
    overrides: Overrides = None,
) -> None:
    """Check that this machine can do a run: packages, GPUs, Redis, sandboxes, memory, storage."""
    settings = load(config, overrides or ()) if config is not None else None
    from deploy.doctor import examine_machine

    faults = 0
    for finding in examine_machine(settings):
        faults += finding.verdict == "fault"
        typer.echo(f"{finding.verdict:6}{finding.what}: {finding.said}")
    raise SystemExit(min(faults, 1))


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    from_run: Annotated[
        Path | None, typer.Option("--from", help="Use the rates of this run.")
    ] = None,
    rates: Annotated[
        Path | None, typer.Option(help="Use the rates in this file (docs/plan.md).")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="Find the best split of this many.", min=1)
    ] = None,
    cores: Annotated[float, typer.Option(help="Cores that roles without GPUs share.")] = (
        os.cpu_count() or 1
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict from measured rates how fast a run will be, what limits it and how to split GPUs."""
    settings = load(config, overrides or ())
    if (from_run is None) == (rates is None):
        raise ConfigError("give measured rates: either --from RUN_DIR or --rates FILE")
    from rich.console import Console

    from deploy import plan as plans
    from deploy.rates import Rates, of_run

    measured = of_run(from_run) if from_run else load_other(Rates, rates or Path())
    made = plans.make(settings, measured, gpus=gpus, cores=cores)
    if as_json:
        typer.echo(json.dumps(plans.as_json(made, measured), indent=2))
    else:
        Console().print(plans.render(made))


@app.command(name="eval")
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    model: Annotated[
        str, typer.Option(help="A model directory; default: the config's student.")
    ] = "",
    k: Annotated[int, typer.Option(help="Samples of each prompt.")] = 32,
    benchmark: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE, such as aime24=aime24.parquet; repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder; continues what was interrupted.")
    ] = None,
) -> None:
    """Measure Avg@k and Pass@k of a model on held-out prompts or benchmarks."""
    settings = load(config, overrides or ())
    model = model or settings.student
    files = dict(_name_and_file(b) for b in benchmark or ())
    with importing():
        from rich.console import Console

        from deploy import examine

    folder = out or settings.runs_dir / f"eval-{Path(model).resolve().name}"
    console = Console()
    made = examine.prepare(settings, model, k=k, benchmarks=files, out=folder)
    result = asyncio.run(made.run(console))
    console.print(examine.table(result))
    console.print(f"{folder / 'evaluation-result.json'}", soft_wrap=True)


def _name_and_file(benchmark: str) -> tuple[str, Path]:
    name, equals, file = benchmark.partition("=")
    if not equals:
        raise ConfigError(f"a benchmark is NAME=FILE, not {benchmark!r}")
    return name, Path(file)


@app.command()
def teacher(config: ConfigPath, overrides: Overrides = None) -> None:
    """Serve the teacher alone, over REST; keys from SCOPE_TEACHER_KEYS (comma-separated)."""
    with importing():
        from deploy.serve import serve_teacher

    serve_teacher(load_teachers(config, overrides or ()))


@app.command()
def status(
    run_dir: RunDir,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    address: Address = None,
) -> None:
    """Show where every prompt of a run is: fed = trained + dead + in flight."""
    if address is not None:
        _remote(address).call(["status", str(run_dir), *(["--json"] if as_json else [])])
        return
    from deploy.status import read_status, render

    status = asyncio.run(read_status(run_dir))
    typer.echo(json.dumps(status, indent=2) if as_json else render(status))


@app.command()
def dead(
    run_dir: RunDir,
    show: Annotated[str | None, typer.Option(help="Print the traceback of one item.")] = None,
    requeue: Annotated[bool, typer.Option(help="Put every dead item back in its queue.")] = False,
) -> None:
    """List the items that were given up, with the reason; show or requeue them."""
    from deploy.dead import requeue_all, table

    if requeue:
        typer.echo(f"{asyncio.run(requeue_all(run_dir))} items put back")
    else:
        typer.echo(asyncio.run(table(run_dir, show)))


@app.command()
def scale(
    run_dir: RunDir,
    wishes: Annotated[list[str], typer.Argument(help="ROLE=COUNT …, such as rollout=8.")],
    address: Address = None,
) -> None:
    """Change the number of a stage's workers during a run."""
    if address is not None:
        _remote(address).call(["scale", str(run_dir), *wishes])
        return
    from deploy.scale import scale as leave

    asyncio.run(leave(run_dir, wishes))


@monitoring.command()
def up(
    directory: Annotated[Path, typer.Argument(help="Where to write.")] = Path("monitoring"),
    address: Annotated[
        str, typer.Option(help="The Ray cluster's dashboard.")
    ] = "http://127.0.0.1:8265",
) -> None:
    """Write what Prometheus and Grafana need to show the runs of a Ray cluster."""
    from deploy.dashboards import write

    write(directory, address)
    typer.echo(f"written to {directory}; start both with: cd {directory} && docker compose up -d")


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    out: Annotated[
        Path | None, typer.Option(help="Output folder; default: RUN_DIR/report.")
    ] = None,
) -> None:
    """Write one self-contained page about one or more runs: curves, accuracy, trajectories."""
    from deploy.report import write

    typer.echo(write(run_dirs, out or run_dirs[0] / "report"))


@app.command()
def verify(
    file: Annotated[
        Path, typer.Argument(help="JSONL: completion, reference, data_source; - is standard input.")
    ],
    config: Annotated[Path | None, typer.Option(help="The run whose verifier judges.")] = None,
    kind: Annotated[str, typer.Option(help="Who judges, without a config.")] = "math",
    answer_from: Annotated[
        str | None, typer.Option(help="Where the answer stands: boxed, hashes or final_line.")
    ] = None,
) -> None:
    """Judge a file: JSONL in, a verdict, reason and seconds a line out, a summary on stderr."""
    from deploy.verify import verify_file

    verify_file(file, load(config).verifier if config else None, kind, answer_from)


def _is_remote(address: str) -> bool:
    return address.startswith(("http://", "https://"))


def _remote(address: str) -> Remote:
    if not _is_remote(address):
        raise ConfigError(f"--address is that of the dashboard, http://HOST:8265, not {address!r}")
    from deploy.remote import Remote

    return Remote(address)


def _ask_to_stop() -> bool:
    """On Ctrl-C: the run is on another machine, and may be meant to go on."""
    try:
        return typer.confirm("\nalso stop the run on the cluster?", default=False)
    except typer.Abort:  # a second Ctrl-C, or nobody to ask
        return False


def _execute(settings: Any, *, directory: Path | None) -> None:
    with importing():
        from deploy import launch
        from deploy.console import RunConsole

    with RunConsole() as console:
        made = launch.start(settings, console, directory=directory)
        try:
            asyncio.run(made.execute())
        except (KeyboardInterrupt, asyncio.CancelledError):
            console.say(f"interrupted; continue with: scope resume {made.directory}")
            raise SystemExit(130) from None
    console.results(made.evaluations)
    console.say(f"run directory:  {made.directory}")
    console.say(f"exported model: {made.directory / 'export'}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; whatever a user can put right ends in one sentence, not a traceback."""
    for stream in (sys.stdout, sys.stderr):  # a terminal may not know all that we print
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(args=list(arguments) if arguments is not None else None, standalone_mode=True)
    except (ConfigError, ScopeError) as error:
        _fail(str(error))
    except ImportError as error:
        _fail(f"the package {error.name} is missing or broken: run `make install`")


def _fail(message: str) -> None:
    print(f"scope: {message}", file=sys.stderr)
    raise SystemExit(1)
