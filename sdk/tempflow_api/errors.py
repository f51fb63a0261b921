"""Exit codes and the errors that carry them.

TempFlowError
 ├─ ManifestInvalid      what the user wrote, one problem a field
 ├─ ConfigChanged        a stored run continues with an immutable field changed
 ├─ DeviceMissing        compute.device asks for what is not there
 ├─ ModelUnavailable     weights cannot be loaded
 ├─ RewardFailed         a scorer is unknown or gave no usable score
 ├─ StoreUnavailable     the checkpoint store refuses or is missing
 ├─ Uncommitted          no checkpoint could be stored for too long
 ├─ Fenced               a newer start of the run has taken it over
 ├─ CheckpointCorrupt    no complete checkpoint passed validation
 ├─ AddressInUse         a port that the run needs is taken
 ├─ TrainingDiverged     loss or gradients are not finite
 ├─ PreflightFailed      a check before training found the pod unfit
 ├─ SelfTestFailed       the model does not do what the loss takes for granted
 ├─ TrainingCollapsed    the guard was told to stop, or has rolled back often enough
 └─ Preempted            asked to stop; the message says what is committed

The SDK's errors about a cluster are in ``tempflow.cluster.errors``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """What the trainer and the command line exit with. The numbers are part of the contract: the
    operator decides by the trainer's, from 80 on, whether a further attempt makes sense."""

    DONE = 0
    BUG = 1
    INVALID = 2
    # Of commands that talk to a cluster.
    JOB_FAILED = 60
    TIMEOUT = 61
    UNREACHABLE = 62
    UNAUTHORIZED = 63
    FORBIDDEN = 64
    NOT_FOUND = 65
    CONFLICT = 66
    API_SERVER = 67
    UNHEALTHY = 68
    DIFFERENT = 69
    MODEL = 80
    REWARD = 81
    DEVICE = 82
    DIVERGED = 83
    ADDRESS_IN_USE = 84
    PREEMPTED = 85
    FENCED = 86
    CONFIG_CHANGED = 87
    STORE = 88
    CHECKPOINT_CORRUPT = 89
    RANK_DIED = 90
    PREFLIGHT = 91
    SELF_TEST = 92
    COLLAPSED = 93
    UNCOMMITTED = 94
    INTERRUPTED = 130


PERMANENT = frozenset(
    {
        ExitCode.INVALID,
        ExitCode.MODEL,
        ExitCode.REWARD,
        ExitCode.DEVICE,
        ExitCode.DIVERGED,
        ExitCode.CONFIG_CHANGED,
        ExitCode.STORE,
        ExitCode.CHECKPOINT_CORRUPT,
        ExitCode.SELF_TEST,
        ExitCode.COLLAPSED,
    }
)
"""Codes after which a further attempt would end the same way."""


NOT_IN_TIME = 128 + 15
"""Of a trainer that was asked to stop (SIGTERM) and had to be killed. It is no ExitCode: a shell
gives it to whatever SIGTERM ends."""
ASKED_TO_STOP = frozenset({int(ExitCode.PREEMPTED), NOT_IN_TIME})
"""What is left of a trainer that was asked to stop, in time and not. When one rank fails,
the others are asked too, so this is evidence only where there is no other."""


class TempFlowError(Exception):
    """An error that a user can act on: shown as one message, never as a traceback."""

    exit_code: ExitCode = ExitCode.BUG


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a manifest."""

    path: str
    """The field, for instance ``spec.sampling.steps``."""
    message: str
    """Value, expectation, remedy."""
    line: int | None = None
    """In the file, from 1."""


class ManifestInvalid(TempFlowError):
    """The manifest does not describe a job; ``problems`` has every reason found."""

    exit_code = ExitCode.INVALID

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        """``source`` is the name of the file, or what it is called where there is none."""
        self.source = source
        self.problems = tuple(problems)
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """One line a problem: ``file:line: field: message``."""
        return [
            f"{self.source}{f':{p.line}' if p.line else ''}: {p.path}: {p.message}"
            for p in self.problems
        ]


class ConfigChanged(TempFlowError):
    exit_code = ExitCode.CONFIG_CHANGED


class DeviceMissing(TempFlowError):
    exit_code = ExitCode.DEVICE


class ModelUnavailable(TempFlowError):
    exit_code = ExitCode.MODEL


class RewardFailed(TempFlowError):
    exit_code = ExitCode.REWARD


class StoreUnavailable(TempFlowError):
    exit_code = ExitCode.STORE


class Uncommitted(TempFlowError):
    exit_code = ExitCode.UNCOMMITTED


class Fenced(TempFlowError):
    exit_code = ExitCode.FENCED


class CheckpointCorrupt(TempFlowError):
    exit_code = ExitCode.CHECKPOINT_CORRUPT


class AddressInUse(TempFlowError):
    exit_code = ExitCode.ADDRESS_IN_USE


class PreflightFailed(TempFlowError):
    exit_code = ExitCode.PREFLIGHT


class TrainingDiverged(TempFlowError):
    exit_code = ExitCode.DIVERGED


class SelfTestFailed(TempFlowError):
    exit_code = ExitCode.SELF_TEST


class TrainingCollapsed(TempFlowError):
    exit_code = ExitCode.COLLAPSED


class Preempted(TempFlowError):
    exit_code = ExitCode.PREEMPTED


def of_code(code: int, message: str) -> TempFlowError:
    """The error that exits with ``code``, for one process to repeat what another one said."""
    kinds = {kind.exit_code: kind for kind in TempFlowError.__subclasses__()}
    kinds.pop(ExitCode.INVALID, None)  # its constructor wants the single problems
    error = kinds.get(ExitCode(code), TempFlowError)(message)
    error.exit_code = ExitCode(code)
    return error
