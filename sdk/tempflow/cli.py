"""The command line: the verbs below ``verbs``, put together, and the entry point."""

import sys

import typer

from tempflow.verbs import (
    checkpoints,
    completion,
    diff,
    doctor,
    explain,
    init,
    jobs,
    logs,
    pull,
    report,
    rewards,
    run,
    sample,
    steering,
    submit,
    validate,
    version,
)
from tempflow_api.errors import ManifestInvalid, TempFlowError

_EXIT_CODES = """\b
Exit codes:
  0    done
  1    a bug: please report it
  2    the manifest or the command is wrong
  60   the job failed                   65   no such job, or not installed
  61   not within --timeout             66   it exists already, or has ended
  62   the cluster does not answer      67   the API server failed
  63   the credentials are refused      68   doctor found a fault
  64   not allowed                      69   diff found a difference
  80   the model cannot be loaded       84   a port is in use
  81   a reward failed                  85   stopped after a checkpoint
  82   the device is missing            86   a newer start of this run took over
  83   training diverged                87   the run was begun with other settings
  88   the checkpoint store refuses     89   no checkpoint is intact
  90   a process died                   91   the pod is unfit to train
  92   the self-test failed             93   the guard stopped the run
  94   checkpoints cannot be stored    130  Ctrl-C
"""

app = typer.Typer(
    name="tempflow",
    help="Train text-to-image flow models with rewards: TempFlow-GRPO from one manifest.\n\n"
    "\b\nStart here:\n"
    "  tempflow init --preset digits           write digits.yaml\n"
    "  tempflow run digits.yaml                train, here\n"
    "  tempflow sample runs/digits --prompt 'a three'\n"
    "  tempflow submit digits.yaml --follow    the same on a cluster",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    add_completion=True,
    # Plain help keeps the examples as they are written, and loads in a tenth of the time.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
# In the order in which the help shows them.
app.add_typer(init.app)
app.add_typer(validate.app)
app.add_typer(explain.app)
app.add_typer(run.app)
app.add_typer(submit.app)
app.add_typer(diff.app)
app.add_typer(jobs.app)
app.add_typer(logs.app)
app.add_typer(steering.app)
app.add_typer(sample.app)
app.add_typer(checkpoints.app)
app.add_typer(pull.app)
app.add_typer(report.app)
app.add_typer(rewards.app)
app.add_typer(doctor.app)
app.add_typer(completion.app)
app.add_typer(version.app)


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
