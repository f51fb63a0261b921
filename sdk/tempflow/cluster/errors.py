"""What a cluster can refuse, each kind with its own class and exit code.

ClusterError              the API server failed (5xx), or answered what cannot be understood
 ├─ Unreachable           no answer at all, or no configuration to ask with
 ├─ Unauthorized          401: the credentials are missing, wrong or expired
 ├─ Forbidden             403
 ├─ NotFound              404: no such object
 │   └─ NotInstalled      404: the cluster does not know the kind
 ├─ Conflict              409: it exists already, or has changed meanwhile
 ├─ Invalid               422 and 400: the server's own check refuses the object
 ├─ WaitTimeout           what was waited for did not come in time
 └─ JobFailed             the job that was waited for ended badly
"""

from collections.abc import Mapping
from typing import Any

from tempflow_api import naming
from tempflow_api.errors import ExitCode, TempFlowError


class ClusterError(TempFlowError):
    """Something about the cluster; ``code`` is the HTTP status, 0 where there was none."""

    exit_code = ExitCode.API_SERVER

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Unreachable(ClusterError):
    exit_code = ExitCode.UNREACHABLE


class Silent(Unreachable):
    """A stream was opened and then said nothing for a while, which may be well. Handled by whoever
    follows it."""


class Unauthorized(ClusterError):
    exit_code = ExitCode.UNAUTHORIZED


class Forbidden(ClusterError):
    exit_code = ExitCode.FORBIDDEN


class NotFound(ClusterError):
    exit_code = ExitCode.NOT_FOUND


class NotInstalled(NotFound):
    """The custom resource definition is missing."""


class Conflict(ClusterError):
    exit_code = ExitCode.CONFLICT


class Invalid(ClusterError):
    exit_code = ExitCode.INVALID


class WaitTimeout(ClusterError):
    exit_code = ExitCode.TIMEOUT


class JobFailed(ClusterError):
    exit_code = ExitCode.JOB_FAILED


class Expired(ClusterError):
    """410: the history of changes does not reach back so far. Handled by whoever watches."""


def refusal(code: int, status: Mapping[str, Any], *, what: str) -> ClusterError:
    """The error for an answer of the API server's; ``status`` is its ``Status`` object and ``what``
    names the object that was asked for."""
    said = str(status.get("message") or status.get("reason") or f"HTTP {code}").strip()
    kind, sentence = _KINDS.get(code, (ClusterError, "{what}: the API server failed: {said}"))
    if code == 404 and _kind_is_unknown(status):
        kind, sentence = NotInstalled, _NOT_INSTALLED
    return kind(sentence.format(what=what, said=said), code)


def _kind_is_unknown(status: Mapping[str, Any]) -> bool:
    """A missing object is named in the details; a missing kind is only a page that is not there."""
    details = status.get("details") or {}
    return not details.get("name") and "page not found" in str(status.get("message", ""))


_NOT_INSTALLED = (
    f"{{what}}: this cluster does not know {naming.PLURAL}.{naming.GROUP}: TempFlow is not "
    "installed there. Have it installed (helm install tempflow charts/tempflow), or choose another "
    "--context"
)

_KINDS: dict[int, tuple[type[ClusterError], str]] = {
    400: (Invalid, "{what}: the API server refuses it: {said}"),
    401: (
        Unauthorized,
        (
            "{what}: the API server does not accept the credentials (missing, wrong or expired). "
            "Log in to the cluster again, or choose another --context"
        ),
    ),
    403: (
        Forbidden,
        (
            "{what}: not allowed: {said}. Ask for the role tempflow-edit in that namespace; "
            "'tempflow doctor' shows what is missing"
        ),
    ),
    404: (NotFound, "{what}: there is none. 'tempflow list -A' shows the jobs"),
    409: (Conflict, "{what}: {said}"),
    410: (Expired, "{what}: {said}"),
    413: (Invalid, "{what}: too large for the API server: {said}"),
    422: (Invalid, "{what}: the API server refuses it: {said}"),
}
