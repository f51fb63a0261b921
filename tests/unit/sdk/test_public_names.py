"""What the SDK promises: its names, that they load, and that the page about them is right."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tempflow
from tempflow import Client, ClusterError
from tempflow.cluster import errors

PAGE = (Path(__file__).parents[3] / "docs/sdk.md").read_text()

NAMES = {
    *("Client", "TempFlowGRPOJob", "JobSpec", "Manifest", "read"),
    *("Job", "JobEvent", "Event", "LogLine"),
    *("TempFlowError", "ExitCode", "ManifestInvalid", "ClusterError"),
    *("Unreachable", "Unauthorized", "Forbidden", "NotFound", "NotInstalled"),
    *("Conflict", "Invalid", "WaitTimeout", "JobFailed"),
}
METHODS = {
    *("submit", "list", "get", "watch", "wait", "logs", "events"),
    *("suspend", "resume", "cancel", "delete", "checkpoints", "store_of", "store_inside"),
    *("close", "connection", "namespace"),
}


def test_the_names_are_these() -> None:
    assert set(tempflow.__all__) == NAMES
    assert set(dir(tempflow)) >= NAMES
    assert all(getattr(tempflow, name).__name__ == name for name in NAMES)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Clients"):
        _ = tempflow.Clients


def test_the_methods_are_these() -> None:
    assert {name for name in vars(Client) if not name.startswith("_")} == METHODS


def test_nothing_is_loaded_before_it_is_used() -> None:
    program = (
        "import sys, tempflow; assert 'pydantic' not in sys.modules\n"
        "tempflow.TempFlowGRPOJob; assert 'kubernetes' not in sys.modules\n"
        "tempflow.Client; assert 'torch' not in sys.modules and 'kubernetes' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_page_lists_the_names() -> None:
    listed = re.findall(r"`(\w+)`", PAGE.partition("## Public names")[2])
    assert listed == sorted(NAMES, key=lambda name: (name.islower(), name))


def test_the_page_has_every_error_with_its_exit_code() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| (\d+) \|", PAGE, re.M))
    kinds = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, ClusterError) and kind not in (errors.Expired, errors.Silent)
    ]
    assert rows == {kind.__name__: str(int(kind.exit_code)) for kind in kinds}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, errors.Invalid),
        (401, errors.Unauthorized),
        (403, errors.Forbidden),
        (404, errors.NotFound),
        (409, errors.Conflict),
        (410, errors.Expired),
        (422, errors.Invalid),
        (429, errors.ClusterError),
        (500, errors.ClusterError),
    ],
)
def test_each_answer_has_its_class(code: int, kind: type[ClusterError]) -> None:
    status = {"message": "said", "details": {"name": "x"}}
    error = errors.refusal(code, status, what="job a/b")
    assert type(error) is kind
    assert error.code == code
    assert str(error).startswith("job a/b: ")
    assert "\n" not in str(error)


def test_a_page_that_is_not_there_means_not_installed() -> None:
    error = errors.refusal(404, {"message": "404 page not found"}, what="jobs")
    assert type(error) is errors.NotInstalled
