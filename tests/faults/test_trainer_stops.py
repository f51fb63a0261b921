"""The real trainer under its launcher, with its checkpoints in S3: asked to stop, and resized."""

import signal
import time

import pytest

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import ExitCode
from tests.faults.s3_proxy import Proxy
from tests.faults.trainer_run import Hold, Run, finish, of_step, ranks_of

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def test_sigterm_in_a_save_completes_it(run: Run, s3: Proxy, undisturbed: dict[str, str]) -> None:
    hold = Hold(s3, "PutObject", of_step(2, layout.MANIFEST))
    process = run.start()
    hold.wait(process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    hold.release()
    code, output = finish(process)
    assert code == ExitCode.PREEMPTED, output
    assert "the state is committed at" in output
    assert output.splitlines()[-1].startswith("note: stopped after ")
    done = run.committed()[-1]
    assert done >= 2
    # The pods of the same attempt are started again, as a queue does.
    code, output = finish(run.start())
    assert code == ExitCode.DONE, output
    assert f"continues after {done} epochs" in output
    assert run.result() == undisturbed


# The phases in which a run is stopped, one start after the other, and of which epoch each is.
STOPS = (("start", 0), ("evaluation", 0), ("rollout", 0), ("scoring", 1), ("update", 2))


def test_sigterm_in_every_phase_repeats_or_finishes_it(
    run: Run, undisturbed: dict[str, str]
) -> None:
    for phase, epoch in STOPS:
        process = run.start()
        run.wait_for_phase(phase, epoch, process)
        process.send_signal(signal.SIGTERM)
        code, output = finish(process)
        assert code == ExitCode.PREEMPTED, output
        assert output.splitlines()[-1].startswith("note: "), output
    assert run.committed()[-1] < 4
    code, output = finish(run.start())
    assert code == ExitCode.DONE, output
    assert run.result() == undisturbed


def test_sigterm_to_one_rank_stops_all_and_another_number_goes_on(run: Run, s3: Proxy) -> None:
    hold = Hold(s3, "PutObject", of_step(1, layout.MANIFEST))
    process = run.start(processes=2)
    hold.wait(process)
    ranks_of(process)[1].send_signal(signal.SIGTERM)
    hold.release()
    code, output = finish(process)
    assert code == ExitCode.PREEMPTED, output
    done = run.committed()[-1]
    assert 1 <= done < 4
    code, output = finish(run.start(attempt=2, processes=1))
    assert code == ExitCode.DONE, output
    assert f"continues after {done} epochs" in output
    assert run.committed() == [1, 2, 3, 4]
    for rank in (0, 1):
        assert f"rank {rank} ends with exit code 85: stopped after" in run.last_lines(1, rank)[-1]
    assert "rank 0 ends with exit code 0: done" in run.last_lines(2, 0)[-1]
