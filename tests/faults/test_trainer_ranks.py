"""Several ranks of the real trainer under its launcher: one hangs, and their number changes."""

import signal
import time
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import NOT_IN_TIME, ExitCode
from tests.faults.s3_proxy import Proxy
from tests.faults.trainer_run import Hold, Run, finish, of_step, ranks_of

pytestmark = [pytest.mark.faults, pytest.mark.slow]

GRACE_SECONDS = 15


def test_a_rank_that_hangs_is_killed_in_time(run: Run, s3: Proxy) -> None:
    hold = Hold(s3, "PutObject", of_step(1, layout.MANIFEST))
    policy = {"terminationGracePeriodSeconds": GRACE_SECONDS}
    process = run.start(processes=2, changes={"runPolicy": policy})
    hold.wait(process)
    ranks_of(process)[1].suspend()
    hold.release()
    while run.committed() != [1]:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert time.monotonic() - asked < GRACE_SECONDS
    assert code == NOT_IN_TIME, output
    assert output.splitlines()[-1].startswith("error: killed before it could stop, "), output
    assert run.committed() == [1]
    code, output = finish(run.start(attempt=2))
    assert code == ExitCode.DONE, output
    assert "continues after 1 epochs" in output
    assert run.committed() == [1, 2, 3, 4]


# Six groups an update, which two and three processes share evenly. The last is for Adam, which
# makes a step of full length of the rounding error of a gradient that cancels out.
SHARDED: dict[str, dict[str, Any]] = {
    "compute": {"strategy": "shard"},
    "algorithm": {"epochs": 5, "promptsPerEpoch": 6, "updatesPerEpoch": 1},
    "optimizer": {"epsilon": 1e-4},
}


def test_parts_of_weights_go_on_with_another_number_of_ranks(run: Run, s3: Proxy) -> None:
    whole = Run(run.folder / "whole", s3)
    code, output = finish(whole.start(changes=SHARDED))
    assert code == ExitCode.DONE, output
    done = 0
    for attempt, processes in enumerate((2, 3), start=1):
        hold = Hold(s3, "PutObject", of_step(done + 1, layout.MANIFEST))
        process = run.start(attempt=attempt, processes=processes, changes=SHARDED)
        hold.wait(process)
        if processes != 3:
            process.send_signal(signal.SIGTERM)
        hold.release()
        code, output = finish(process)
        assert code == (ExitCode.DONE if processes == 3 else ExitCode.PREEMPTED), output
        assert done == 0 or f"continues after {done} epochs" in output
        assert run.committed()[-1] > done
        done = run.committed()[-1]
    expected, found = whole.newest(), run.newest()
    files = [file.relative_to(expected) for file in sorted(expected.rglob("*.safetensors"))]
    assert len(files) == 4  # the adapter, trained, average, optimizer
    for name in files:
        theirs, mine = load_file(expected / name), load_file(found / name)
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key], value, rtol=0, atol=1e-5, msg=f"{name} {key}")
