"""The command line: train, simulate, compare; timelines; certificates; profiles of machines.

Each command imports what it needs when it is called: torch takes seconds to import, and whoever asks for help, or for a
completion, is not to wait for it.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from decentral.completion import complete_rules, complete_setting, complete_task
from decentral.errors import ConfigError, DecentralError, RunError

if TYPE_CHECKING:
    from decentral.folder import RunFolder
    from decentral.journal import Record
    from decentral.outcome import Outcome


def _teaching(example: str, *then: str) -> str:
    """Return what stands below a command's options: an example, then what it leaves and what may come next."""
    return "\n\n".join((f"Example: {example}", *then))


RUN_FOLDER = "The folder gets run.toml (every field), journal.jsonl, model.safetensors and summary.json."


app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Train one PyTorch model on machines that are far apart, unequal and may vanish; simulate it first.",
    epilog=_teaching(
        "decentral simulate --out runs/first",
        "Then: decentral report runs/first; decentral compare --rules ddp,diloco,noloco; decentral train.",
        "Each command says more with --help. A new terminal completes commands after --install-completion.",
    ),
)

RunFile = Annotated[Path | None, typer.Argument(help="Run file (TOML). Without one: the built-in demonstration run.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override a field of the run file, e.g. --set rule.period=100.",
        autocompletion=complete_setting,
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="Train another task: a built-in name, or your module:function.",
        autocompletion=complete_task,
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the run's files; a new one below runs/ if unset.")]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON instead of tables.")]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Write curves for TensorBoard into the run's folder.")]
Wandb = Annotated[
    str | None, typer.Option("--wandb", metavar="PROJECT", help="Log curves to this project of Weights & Biases.")
]
Watched = Annotated[
    Path | None, typer.Argument(help="Folder of a run, running or over. Without one: a running job on a Ray cluster.")
]
Cluster = Annotated[str, typer.Option("--address", help="The job's Ray cluster: host:port, ray://host:port or auto.")]
RunName = Annotated[str | None, typer.Option("--run", help="Which job, if there are several on the cluster.")]


@app.command(
    epilog=_teaching(
        "decentral train run.toml --set rule.period=50 --out runs/first",
        RUN_FOLDER,
        "Meanwhile: decentral watch runs/first. Then: decentral report runs/first. Ctrl-C ends it in good order.",
    )
)
def train(
    run_file: RunFile = None,
    settings: Settings = None,
    task: TaskName = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to use: host:port, ray://host:port or auto; a local one if unset.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run of this folder, from its newest checkpoint.")
    ] = None,
    tensorboard: Tensorboard = False,
    wandb: Wandb = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Train for real, on Ray: a local one, or the cluster at --address."""
    from decentral.config import read_run
    from decentral.journal import Anew, read_journal
    from decentral.terminal import Shown, run_shown

    if resume is not None and (run_file or task or out):
        raise ConfigError("--resume: the folder says which run it is; give neither a run file nor --task nor --out")
    run = read_run(run_file if resume is None else resume / "run.toml", settings or (), task)
    wanted, cores = run.fleet.size * run.real.threads, os.cpu_count() or 1
    if address is None and wanted > cores:
        Console(stderr=True).print(
            f"note: {run.fleet.size} workers x {run.real.threads} threads share {cores} cores; steps take longer than "
            "on machines of their own"
        )

    from decentral.workers.resume import find_checkpoint  # after the file is read: Ray takes a second to import

    journal = None if resume is None else Anew(partial(read_journal, resume / "journal.jsonl"))
    resumed = None if journal is None else find_checkpoint(run, journal)
    for folder, reason in resumed.passed_over.items() if resumed else ():
        Console(stderr=True, soft_wrap=True).print(f"note: checkpoint {folder} is not whole: {reason}")

    def launch(see: Callable[[Record], None], folder: RunFolder) -> Outcome:
        from decentral.workers.launch import train as train_on_ray

        return train_on_ray(
            run, address=address, on_record=see, on_restart=folder.go_back, resumed=resumed, journal=folder
        )

    shown = Shown(tensorboard, wandb)
    run_shown(run, "train", out or resume, as_json, launch, shown, before=resumed.records if resumed else None)


@app.command(
    name="simulate",
    epilog=_teaching(
        "decentral simulate run.toml --set fleet.up_bps=20e6 --out runs/slow",
        RUN_FOLDER,
        "Then: decentral report runs/slow, or the same run for real: decentral train runs/slow/run.toml.",
    ),
)
def simulate_command(
    run_file: RunFile = None,
    settings: Settings = None,
    task: TaskName = None,
    timing_only: Annotated[
        bool, typer.Option("--timing-only", help="Times and traffic alone, without any tensor work.")
    ] = False,
    timeline: Annotated[
        Path | None, typer.Option(help="Write what each worker did when, for ui.perfetto.dev, into this JSON file.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Look at every link after every allocation; keep peaks and pairs. Slower.")
    ] = False,
    tensorboard: Tensorboard = False,
    wandb: Wandb = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Do the same run in virtual time, on the fleet that the run file describes."""
    from decentral.config import read_run
    from decentral.interrupts import whole
    from decentral.sim.simulate import simulate
    from decentral.sim.watch import Watch
    from decentral.terminal import Shown, run_shown

    run = read_run(run_file, settings or (), task)
    watch = Watch(checks=verify, spans=timeline is not None)

    def launch(see: Callable[[Record], None], _folder: RunFolder) -> Outcome:
        with whole(see) as see_whole:
            return simulate(run, timing_only=timing_only, on_record=see_whole, watch=watch)

    outcome = run_shown(run, "simulate", out, as_json, launch, Shown(tensorboard, wandb), virtual=True)
    if timeline is not None:
        _write_timeline(outcome.records, timeline)


@app.command(
    name="timeline",
    epilog=_teaching(
        "decentral timeline runs/first",
        "Writes runs/first/timeline.json, which ui.perfetto.dev opens: a track for each worker.",
    ),
)
def timeline_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, real or simulated, finished or stopped.")],
    out: Annotated[Path | None, typer.Option("--out", help="JSON file; timeline.json in the folder if unset.")] = None,
) -> None:
    """Write a run's timeline for ui.perfetto.dev from its journal."""
    from decentral.journal import read_journal

    journal = folder / "journal.jsonl"
    if not journal.is_file():
        raise ConfigError(f"{folder}: there is no journal.jsonl in this folder; name the folder of a run")
    path = out or folder / "timeline.json"
    _write_timeline(read_journal(journal), path)
    Console(soft_wrap=True).print(f"timeline: {path}; open it at ui.perfetto.dev")


@app.command(
    name="report",
    epilog=_teaching(
        "decentral report runs/first runs/second --out both.html",
        "One file without scripts, which loads nothing: open it in a browser. It says itself how to read it.",
    ),
)
def report_command(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, or of a comparison: several are compared.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="HTML file; report.html in the folder, or here for several, if unset.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", help="Write each figure as SVG and PNG into this folder too.")
    ] = None,
) -> None:
    """Write one HTML page on a run, or on several compared, from their folders."""
    from decentral.report.page import page, read_runs, write_pictures

    runs = read_runs(folders)
    path = out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    try:
        path.write_text(page(runs), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot write the page: {error.strerror or error}") from error
    console = Console(soft_wrap=True)
    console.print(f"report: {path}")
    if figures is not None:
        console.print(f"figures: {len(write_pictures(runs, figures))} files in {figures}")


@app.command(
    name="status",
    epilog=_teaching(
        "decentral status runs/first",
        "Writes nothing. Who is called slow, and by what measure: docs/watching.md.",
    ),
)
def status_command(
    folder: Watched = None, address: Cluster = "auto", run: RunName = None, as_json: Json = False
) -> None:
    """Show how a run is: members, times, who is slow and why."""
    from decentral.report.look import looking
    from decentral.report.status import status_tables

    with looking(folder, address, run) as look:
        status = look()
    if status is None:
        raise RunError("the run ended while it was asked")
    if as_json:
        sys.stdout.write(json.dumps(status) + "\n")
    else:
        Console().print(status_tables(status))


@app.command(
    name="watch", epilog=_teaching("decentral watch runs/first", "Writes nothing. Ctrl-C ends the watching alone.")
)
def watch_command(folder: Watched = None, address: Cluster = "auto", run: RunName = None) -> None:
    """Show the same, live, until the run is over."""
    from decentral.report.look import looking
    from decentral.report.status import status_tables, watch

    console = Console()
    with looking(folder, address, run) as look, suppress(KeyboardInterrupt):
        status = watch(look, console)
        if status is not None:
            console.print(status_tables(status))


@app.command(
    name="compare",
    epilog=_teaching(
        "decentral compare run.toml --rules ddp,diloco,noloco --seeds 5 --out runs/fair",
        "The folder gets a run folder for each rule and seed, pictures, and comparison.json.",
        "Stopped? The same command goes on from what is complete. Then: decentral report runs/fair.",
    ),
)
def compare_command(
    run_files: Annotated[
        list[Path] | None, typer.Argument(help="Run files (TOML), a workload each. Without one: the built-in run.")
    ] = None,
    rules: Annotated[
        str,
        typer.Option(
            help="Rules to compare, with commas between them; the first is the baseline.", autocompletion=complete_rules
        ),
    ] = "ddp,local_sgd,diloco,noloco,gossip",
    settings: Settings = None,
    task: TaskName = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many seeds from 0 on (5), or which (0,3,7). Unset: the run file's.")
    ] = None,
    equal: Annotated[
        str, typer.Option(help="What all get the same amount of: samples, seconds (virtual) or bytes (sent by all).")
    ] = "samples",
    budget: Annotated[
        float | None, typer.Option(min=0, help="That amount. Unset: what the baseline takes for its local steps.")
    ] = None,
    vary: Annotated[
        list[str] | None, typer.Option(help="Compare under several values of a field, e.g. --vary rule.period=10,50.")
    ] = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also one worker alone, and one with each rule's outer optimiser.")
    ] = False,
    target: Annotated[
        float | None, typer.Option(help="Held-out value to be reached. Unset: the baseline's median at its end.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster that does the runs: host:port, ray://host:port or auto.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the runs; what is complete there is not done again.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Simulate several rules on the same work: tables, pictures, run folders, and with --json the figures."""
    from decentral.compare import compare
    from decentral.compare.files import equal_of, read_workloads, seeds_of, write_report
    from decentral.folder import RUNS, new_folder

    runs = read_workloads(run_files or (), settings or (), task)
    folder = out or new_folder(next(iter(runs.values())), RUNS, "compare")
    console = Console(stderr=as_json)
    try:
        with console.status("") as status:
            found = compare(
                runs,
                [name.strip() for name in rules.split(",") if name.strip()],
                seeds=None if seeds is None else seeds_of(seeds),
                equal=equal_of(equal),
                budget=budget,
                vary=vary or (),
                controls=controls,
                target=target,
                folder=folder,
                address=address,
                tell=status.update,
            )
    except KeyboardInterrupt:
        console.print(f"stopped; the same command with --out {folder} goes on from the runs that are complete")
        raise typer.Exit(130) from None
    text = write_report(found, folder)
    if as_json:
        sys.stdout.write(text)
    else:
        console.print(found.table())
        console.print(f"pictures and figures: {folder}")
        console.print(f"a page on it: decentral report {folder}", soft_wrap=True)


@app.command(
    name="plan",
    epilog=_teaching(
        "decentral plan fleet.toml --params 1.3e9 --context 2048 --tokens 26e9 --write run.toml",
        "run.toml trains and simulates; a model given by --params is size alone: name your own task there.",
    ),
)
def plan_command(
    run_file: Annotated[Path, typer.Argument(help="Run file (TOML) whose section fleet has the machines.")],
    params: Annotated[
        float | None, typer.Option(help="Parameters of the model, if the file's task is not what is trained.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="With --params: its layers. Unset: 12.")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="With --params: tokens of a sample, as --tokens and devices need.")
    ] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens to train on, all workers together.")] = None,
    samples: Annotated[
        float | None, typer.Option(help="Samples, in place of tokens. Unset, too: what the file's steps come to.")
    ] = None,
    goal: Annotated[str, typer.Option("--for", help="What is to be least: time or cost.")] = "time",
    hours: Annotated[float | None, typer.Option(help="Take no longer.")] = None,
    dollars: Annotated[float | None, typer.Option(help="Spend no more.")] = None,
    slack: Annotated[
        float | None,
        typer.Option(
            help="How much worse than the best what is nearer to data parallelism may be: a share. Unset: 0.005."
        ),
    ] = None,
    settings: Settings = None,
    task: TaskName = None,
    write: Annotated[Path | None, typer.Option(help="Write the first choice as a run file.")] = None,
    as_json: Json = False,
) -> None:
    """Say which rule, settings and workers suit these machines: simulates the candidates, times alone."""
    from rich.progress import Progress

    from decentral.plan import Wanted, plan
    from decentral.plan.files import goal_of, read_work
    from decentral.plan.wanted import SLACK

    wanted = Wanted(goal_of(goal), hours, dollars, SLACK if slack is None else slack)
    work = read_work(
        run_file,
        settings or (),
        task,
        parameters=params,
        layers=layers,
        context=context,
        samples=samples,
        tokens=tokens,
    )
    console = Console(stderr=as_json, highlight=False)
    shown = Console(stderr=True)
    with Progress(console=shown, transient=True, disable=not shown.is_terminal) as progress:
        bar = progress.add_task("forecasts", total=None)
        found = plan(work, wanted, tell=lambda made, asked: progress.update(bar, completed=made, total=asked))
    if write is not None:
        found.write(write)
    if as_json:
        sys.stdout.write(json.dumps(found.to_fields(), indent=2) + "\n")
    else:
        console.print(found.table())
        if write is not None:
            console.print(f"run file: {write}", soft_wrap=True)


@app.command(
    epilog=_teaching(
        "decentral certs certificates",
        "Writes ca.pem, worker.pem and worker.key for their owner alone. Then copy the folder to every machine.",
    )
)
def certs(
    folder: Annotated[Path, typer.Argument(help="Folder for the certificates; made if there is none.")],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Make a sub-folder for each of so many workers; unset: one for all.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="Days until the certificates expire.")] = 90,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the certificates that are there.")] = False,
) -> None:
    """Make certificates, so that a run's machines talk over mutual TLS."""
    from decentral.workers.certs import issue

    made = issue(folder, workers=workers, days=days, force=force)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if workers is None:
        console.print(f"{made[0]}: certificates for {days} days, which all machines share. Copy the folder to each of")
        console.print("them, or into the image that they start from, always to the same path,")
    else:
        console.print(f"{made[0]} to {made[-1]}: certificates for {days} days. Copy one folder to each machine, always")
        console.print("to the same path,")
    console.print("and name that path in the run file:\n")
    console.print(f'    [real]\n    certificates = "{made[0].absolute()}"\n')
    console.print("Whoever has a worker.key and the run's secret is a member. The authority's key is gone: for more")
    console.print("workers, after a leak and before the last day, make new certificates for all machines.")


@app.command(
    name="doctor",
    epilog=_teaching(
        "decentral doctor run.toml --address auto",
        "Writes nothing. Each finding says what to do about it; then: decentral train run.toml --address auto.",
    ),
)
def doctor_command(
    run_file: RunFile = None,
    settings: Settings = None,
    task: TaskName = None,
    address: Annotated[
        str | None, typer.Option(help="Look at all nodes of the Ray cluster at host:port, ray://host:port or auto.")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="Also look at the machine whose --listen is there: host:port. Repeatable.")
    ] = None,
    listen_port: Annotated[
        int | None, typer.Option("--listen", min=0, max=65535, help="Be the --peer of other machines, until Ctrl-C.")
    ] = None,
    secret: Annotated[
        str | None, typer.Option(envvar="DECENTRAL_SECRET", help="What peers know; --listen makes one up.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find out what is wrong with these machines before a run; the exit status is 1 if there is a problem."""
    from decentral.config import read_run
    from decentral.doctor.examine import examine_cluster, examine_here, listen
    from decentral.doctor.shown import findings_table

    run = read_run(run_file, settings or (), task)
    if peer and secret is None:
        raise ConfigError("doctor --peer: give --secret, the one that the other machine's --listen has printed")
    if address is not None and (peer or listen_port is not None):
        raise ConfigError("doctor --address: Ray brings a doctor to each node; leave out --peer and --listen")
    secret = secret or secrets.token_hex(16)
    if listen_port is not None:
        console, told = Console(stderr=True, soft_wrap=True, highlight=False, markup=False), f"--secret {secret}"
        listen(run, listen_port, secret, lambda at: console.print(f"elsewhere: decentral doctor --peer {at} {told}"))
        return
    findings = examine_here(run, peer or (), secret) if address is None else examine_cluster(run, address)
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings]) + "\n")
    else:
        Console(highlight=False).print(findings_table(findings))
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


@app.command(
    name="coordinate",
    epilog=_teaching(
        "decentral coordinate --address 10.0.0.1:29600 --workers 4",
        "With --out the folder gets the journal of all. Then start the workers: docs/your_loop.md.",
    ),
)
def coordinate_command(
    run_file: Annotated[
        Path | None, typer.Argument(help="The run file (TOML) that the workers join with, if they have one.")
    ] = None,
    settings: Settings = None,
    address: Annotated[
        str | None, typer.Option(help="Listen there: host:port. Unset: DECENTRAL_ADDRESS, or as torchrun says.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="For so many. Unset: DECENTRAL_WORKERS, or as torchrun or Slurm says.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the run's journal; none if unset.")] = None,
) -> None:
    """Serve the meeting point of training loops that `join` with DECENTRAL_APART=1, until all have left."""
    from decentral.config import read_run
    from decentral.embedded.apart import serve
    from decentral.embedded.whereabouts import Wishes

    run = read_run(run_file, settings or ())
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    wishes = Wishes(worker=0, workers=workers, address=address)
    try:
        serve(run, wishes, out, lambda where: console.print(f"serving at {where}; the workers may come"))
    except KeyboardInterrupt:
        console.print("stopped; the workers that are left end with an error")
        raise typer.Exit(130) from None


@app.command(
    name="profile",
    epilog=_teaching(
        "decentral profile run.toml --write fleet.toml",
        "Then put what it prints into the run file in place of its own fleet, and simulate that.",
    ),
)
def profile_command(
    run_file: RunFile = None,
    settings: Settings = None,
    task: TaskName = None,
    peer: Annotated[
        str | None, typer.Option(help="Measure the link to the machine that listens there: host:port. Unset: loopback.")
    ] = None,
    listen_port: Annotated[
        int | None, typer.Option("--listen", min=0, max=65535, help="Measure nothing: be the --peer of other machines.")
    ] = None,
    secret: Annotated[
        str | None, typer.Option(envvar="DECENTRAL_SECRET", help="What both machines know; --listen makes one up.")
    ] = None,
    write: Annotated[Path | None, typer.Option(help="Write the section into this file too.")] = None,
) -> None:
    """Measure this machine and its link: prints the fleet section of a run file with machines like this one."""
    from decentral import profile
    from decentral.config import read_run
    from decentral.workers import rpc
    from decentral.workers.cluster import host_here

    run = read_run(run_file, settings or (), task)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    if peer is not None and secret is None:
        raise ConfigError("profile --peer: give --secret, the one that the other machine's --listen has printed")
    keys = rpc.Keys.here(secret or secrets.token_hex(16), run.real.certificates)
    if listen_port is not None:
        told = f"--secret {keys.secret}"
        with suppress(KeyboardInterrupt):
            asyncio.run(
                profile.listen(
                    host_here(),
                    listen_port,
                    keys,
                    run.patience_s,
                    lambda address: console.print(f"on the other machine: decentral profile --peer {address} {told}"),
                )
            )
        return
    steps, coding_bps = profile.measure_steps(run), asyncio.run(profile.measure_coding(run))
    if peer is None:
        link = asyncio.run(profile.measure_loopback(keys, run.patience_s))
        console.print(
            "note: the link is this machine's loopback, faster than any network; measure a real one with --peer"
        )
    else:
        link = asyncio.run(profile.measure_link(peer, keys, run.patience_s))
        console.print(f"note: measured from here to {peer}; down_bps is taken to be the same: profile there to see")
    if run.pipeline.stages > 1:
        console.print(f"note: stages take equally long here with pipeline.cuts = {list(profile.measure_cuts(run))}")
    section = profile.fleet_section(run.fleet.size, steps, coding_bps, link)
    if write is not None:
        write.write_text(section, encoding="utf-8")
    sys.stdout.write(section)


def _write_timeline(records: Iterable[Record], path: Path) -> None:
    from decentral.report.timeline import write_timeline

    try:
        write_timeline(records, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the timeline: {error.strerror or error}") from error


def main() -> None:
    """Entry point of the `decentral` command: one clear message and an exit status instead of a stack trace."""
    try:
        app()
    except DecentralError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"decentral: {error}")
        sys.exit(error.status)


if __name__ == "__main__":
    main()
