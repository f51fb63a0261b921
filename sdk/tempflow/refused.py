"""The error of a command that does not start."""

from tempflow_api.errors import ExitCode, TempFlowError


class Refused(TempFlowError):
    """The command cannot do what it was asked, and nothing has been changed.

    The message says what stands in the way and what to do about it.
    """

    exit_code = ExitCode.INVALID
