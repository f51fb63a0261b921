"""The command line: verbs and their options. What they do is in the modules that they load.

Modules are loaded inside the verbs, so that ``--help`` and completion stay instant.
"""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tempflow.verbs import explain
from tempflow_api.errors import ExitCode, ManifestInvalid, TempFlowError

if TYPE_CHECKING:
    from rich.console import Console

_EXIT_CODES = """\b
Exit codes:
  0    done
  1    a bug: please report it
  2    the manifest or the command is wrong
  80   the model cannot be loaded       84   a port is in use
  81   a reward failed                  85   stopped after a checkpoint
  82   the device is missing            86   a newer start of this run took over
  83   training diverged                87   the run was begun with other settings
  88   the checkpoint store refuses     89   no checkpoint is intact
  90   a process died                   130  Ctrl-C
"""

app = typer.Typer(
    name="tempflow",
    help="Train text-to-image flow models with rewards: TempFlow-GRPO from one manifest.\n\n"
    "\b\nStart here:\n"
    "  tempflow init --preset digits           write digits.yaml\n"
    "  tempflow run digits.yaml                train, here\n"
    "  tempflow sample runs/digits --prompt 'a three'",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    add_completion=True,
    # Plain help keeps the examples as they are written, and loads in a tenth of the time.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_checkpoints = typer.Typer(
    help="Look at what a run has stored.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(_checkpoints, name="checkpoints")
app.add_typer(explain.app)

_Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Override a field, for instance spec.algorithm.epochs=5. Repeatable.",
    ),
]
_Output = Annotated[
    Literal["text", "json"], typer.Option("--output", "-o", help="Form of the result on stdout.")
]
_Endpoint = Annotated[
    str | None,
    typer.Option("--endpoint-url", metavar="URL", help="Address of a store other than Amazon's."),
]


@app.command()
def init(
    preset: Annotated[
        str | None, typer.Option("--preset", metavar="NAME", help="Which one; see --list.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="List the presets.")] = False,
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", metavar="FILE", help="Default NAME.yaml; - for stdout."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
) -> None:
    """Write a manifest to start from.

    \b
    Examples:
      tempflow init --list
      tempflow init --preset digits
      tempflow init --preset sd35m-pickscore -o job.yaml
    """
    from tempflow import presets

    if show:
        for line in presets.listing():
            typer.echo(line)
        return
    if preset is None:
        raise typer.BadParameter("which preset? --list shows them", param_hint="--preset")
    chosen = presets.preset(preset)
    target = out or f"{chosen.name}.yaml"
    if target == "-":
        typer.echo(chosen.text, nl=False)
        return
    presets.write(chosen, Path(target), overwrite=force)
    typer.echo(f"wrote {target}; next: tempflow validate {target}, then tempflow run {target}")


@app.command()
def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="- for stdin.")],
    overrides: _Set = None,
    output: Annotated[
        Literal["text", "json", "yaml"],
        typer.Option("--output", "-o", help="yaml prints the job with its overrides applied."),
    ] = "text",
) -> None:
    """Check manifests, and show every problem with its line.

    \b
    Examples:
      tempflow validate job.yaml
      tempflow validate job.yaml --set spec.sampling.steps=20
      tempflow validate job.yaml --set spec.compute.nodes=2 -o yaml | kubectl apply -f -
      kubectl get tfgrpo my-job -o yaml | tempflow validate -
    """
    from tempflow import manifest, verdict

    verdicts = [verdict.judge(manifest.read, file, overrides or ()) for file in files]
    if output == "json":
        typer.echo(verdict.as_json(verdicts))
    elif output == "yaml":
        typer.echo(verdict.as_yaml(verdicts), nl=False)
    if output != "json":
        for one in verdicts:
            if output == "text" or not one.valid:
                typer.echo("\n".join(one.lines()), err=not one.valid)
    if not all(one.valid for one in verdicts):
        raise typer.Exit(ExitCode.INVALID)


@app.command()
def run(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The manifest; - for stdin.")],
    overrides: _Set = None,
    work_dir: Annotated[
        Path, typer.Option("--work-dir", metavar="DIR", help="Gets one folder a job.")
    ] = Path("runs"),
    plain: Annotated[
        bool, typer.Option("--plain", help="A line an epoch, also in a terminal.")
    ] = False,
    output: _Output = "text",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Refuse to continue an earlier run.")
    ] = False,
) -> None:
    """Train here, until done. The same command continues a run that was stopped.

    Ctrl-C stops after a checkpoint; a second Ctrl-C kills at once.

    \b
    Examples:
      tempflow run digits.yaml
      tempflow run digits.yaml --set spec.algorithm.epochs=100
      tempflow run digits.yaml -o json > summary.json
    """
    from tempflow import local, manifest, render

    job = manifest.read(file, overrides or ())
    local.require_trainer()
    if fresh:
        local.refuse_if_begun(job.job, work_dir)
    console = _console(stderr=output == "json")
    watcher = render.watcher_for(console, plain=plain)
    outcome = local.run(job, watcher, work_dir=work_dir)
    if outcome.summary is None:
        errors = _console(stderr=True) if outcome.code else console
        for line in render.ending(outcome, _same_command()):
            render.say(errors, line)
    elif output == "json":
        typer.echo(outcome.summary.model_dump_json(by_alias=True, indent=2))
    else:
        for line in render.summary_lines(job.job, outcome.summary, outcome.folder):
            render.say(console, line)
    raise typer.Exit(outcome.code)


@app.command()
def sample(
    source: Annotated[
        Path, typer.Argument(metavar="FROM", help="Folder of a run, a checkpoint or a result.")
    ],
    prompts: Annotated[
        list[str], typer.Option("--prompt", metavar="TEXT", help="What to draw. Repeatable.")
    ],
    count: Annotated[int, typer.Option("--count", min=1, help="Images a prompt.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the start noise.")] = 0,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The picture to write.")
    ] = Path("grid.png"),
    base: Annotated[
        bool, typer.Option("--base", help="Draw with the model as it was before training.")
    ] = False,
) -> None:
    """Draw images with a trained model: one row a prompt.

    \b
    Examples:
      tempflow sample runs/digits --prompt 'a three' --prompt 'a seven'
      tempflow sample runs/digits --prompt 'a three' --base --out before.png
    """
    from tempflow import local, sampling

    local.require_trainer()
    code = sampling.sample(source, prompts, count=count, seed=seed, out=out, base=base)
    raise typer.Exit(code)


@_checkpoints.command("list")
def list_checkpoints(
    uri: Annotated[str, typer.Argument(metavar="URI", help="Folder or s3:// of a run.")],
    endpoint_url: _Endpoint = None,
    output: _Output = "text",
) -> None:
    """List the complete checkpoints of a run.

    \b
    Examples:
      tempflow checkpoints list runs/digits
      tempflow checkpoints list s3://my-bucket/tempflow/digits
    """
    from tempflow import checkpoints, listing

    found = checkpoints.steps(checkpoints.open_store(uri, endpoint_url))
    for line in listing.checkpoints_as(output, found, uri):
        typer.echo(line)


@app.command()
def pull(
    uri: Annotated[
        str, typer.Argument(metavar="URI", help="Folder or s3:// of a run or of a checkpoint.")
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="A new folder; default NAME-step-N.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", help="Epochs completed; default newest.")
    ] = None,
    endpoint_url: _Endpoint = None,
) -> None:
    """Copy a checkpoint here, every file checked by its SHA-256.

    \b
    Examples:
      tempflow pull s3://my-bucket/tempflow/digits
      tempflow pull runs/digits --step 20 --to digits-20
    """
    from tempflow import checkpoints, listing

    store, chosen = checkpoints.find(uri, step, endpoint_url)
    target = to or checkpoints.default_target(store, chosen)
    with listing.transfer(_console(stderr=True), chosen.size) as advance:
        checkpoints.pull(store, chosen, target, advance)
    typer.echo(f"pulled step {chosen.step} to {target}")


@app.command()
def version() -> None:
    """Show the version."""
    from importlib import metadata

    try:
        typer.echo(f"tempflow {metadata.version('tempflow')}")
    except metadata.PackageNotFoundError:
        typer.echo("tempflow (not installed, run from its source)")


def _same_command() -> str:
    """What to type to continue the run that this command started."""
    return shlex.join(["tempflow", *(word for word in sys.argv[1:] if word != "--fresh")])


def _console(*, stderr: bool) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr)


def main() -> None:
    """The entry point: a mistake of the user's becomes one message, never a traceback."""
    try:
        app()
    except ManifestInvalid as error:
        for line in error.lines():
            typer.echo(line, err=True)
        count = len(error.problems)
        noun = "problem" if count == 1 else "problems"
        typer.echo(f"error: {error.source}: {count} {noun}", err=True)
        sys.exit(error.exit_code)
    except TempFlowError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
