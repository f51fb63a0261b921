"""What a check before training refuses, and in which words."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tempflow_api.errors import DeviceMissing, ExitCode, PreflightFailed, StoreUnavailable
from tempflow_api.v1alpha1 import Compute
from tempflow_trainer import preflight
from tempflow_trainer.distributed import Ranks

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0)


def nothing() -> None:
    """A store that answers."""


def refuse() -> None:
    raise StoreUnavailable("s3://runs: no such bucket")


def no_device() -> torch.device:
    raise DeviceMissing("cuda asked for, 0 GPUs found and 1 needed")


@pytest.fixture
def fitting_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(preflight, "driver_version", lambda: 12080)


def test_fit_pods_pass() -> None:
    preflight.check(Compute(device="cpu"), ALONE, lambda: CPU, nothing)


@pytest.mark.usefixtures("fitting_driver")
def test_every_failure_has_the_code_that_spends_no_restart() -> None:
    with pytest.raises(PreflightFailed, match="preflight: s3://runs: no such bucket") as caught:
        preflight.check(Compute(device="cpu"), ALONE, lambda: CPU, refuse)
    assert caught.value.exit_code == ExitCode.PREFLIGHT
    with pytest.raises(PreflightFailed, match="0 GPUs found"):
        preflight.check(Compute(device="cuda"), ALONE, no_device, nothing)


def test_only_rank_zero_asks_the_store() -> None:
    with pytest.raises(PreflightFailed):
        preflight.check(Compute(device="cpu"), Ranks(0, 1, 0), lambda: CPU, refuse)
    preflight.check(Compute(device="cpu"), Ranks(1, 1, 0), lambda: CPU, refuse)


@pytest.mark.parametrize(
    ("built_for", "driver", "told"),
    [
        ("12.8", 12040, None),
        ("12.4", 13000, None),
        ("13.0", 12080, "built for CUDA 13.0, the node's driver supports 12.8"),
        ("12.8", 0, "supports 0.0"),
        (None, 12080, "built without CUDA"),
    ],
)
def test_driver_and_torch_fit(built_for: str | None, driver: int, told: str | None) -> None:
    if told is None:
        preflight.check_driver(built_for, driver)
        return
    with pytest.raises(PreflightFailed, match=told):
        preflight.check_driver(built_for, driver)


def test_a_machine_without_driver_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver")
    assert preflight.driver_version() == 0


def test_arithmetic_is_right_on_a_sound_device() -> None:
    preflight.check_arithmetic(CPU)


def test_little_shared_memory_is_named_with_its_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preflight.check_shared_memory(tmp_path)
    monkeypatch.setattr(preflight, "LEAST_SHARED_BYTES", 1 << 60)
    with pytest.raises(PreflightFailed, match=r"raise spec\.compute\.sharedMemory"):
        preflight.check(
            Compute(device="cpu", processes_per_node=2), ALONE, lambda: CPU, nothing, tmp_path
        )


def test_a_sum_that_is_wrong_is_told() -> None:
    """The group has one process, where the job has two: its sum is not the job's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        with pytest.raises(PreflightFailed, match="1048576 of 1048576 sums"):
            preflight.check_all_reduce(Ranks(0, 2, 0), CPU)
        preflight.check_all_reduce(Ranks(0, 1, 0), CPU)
    finally:
        dist.destroy_process_group()
