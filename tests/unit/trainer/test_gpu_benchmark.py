"""The GPU benchmark's arithmetic against worked figures, and its program at a tiny size."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import flops, gpu

SD35M = SimpleNamespace(
    num_attention_heads=24,
    attention_head_dim=64,
    num_layers=24,
    patch_size=2,
    dual_attention_layers=tuple(range(13)),
)
FLUX = SimpleNamespace(
    num_attention_heads=24, attention_head_dim=128, num_layers=19, num_single_layers=38
)


@pytest.mark.parametrize(
    ("found", "tera"),
    [
        (flops.sd3(SD35M, 512, 205), 2.22),
        (flops.sd3(SD35M, 512, 333), 2.44),
        (flops.sd3(SD35M, 1024, 205), 10.9),
        (flops.flux(FLUX, 512, 512), 21.5),
        (flops.flux(FLUX, 512, 128), 15.8),
        (flops.flux(FLUX, 1024, 512), 74.4),
    ],
)
def test_a_forward_costs_what_was_worked_out_by_hand(found: float, tera: float) -> None:
    assert found / 1e12 == pytest.approx(tera, rel=0.006)


def test_the_configurations_are_those_of_the_figures() -> None:
    for name, config in (("sd35m", SD35M), ("flux", FLUX)):
        with torch.device("meta"):
            made = gpu.SIZES[name].network().config
        assert all(tuple_or(made[key]) == tuple_or(value) for key, value in vars(config).items())


def tuple_or(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def test_peaks_are_found_by_the_name_of_the_device() -> None:
    assert flops.peak_of("NVIDIA H100 80GB HBM3") == 989
    assert flops.peak_of("Something else") is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_program_measures_both_ways(
    checkpointing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "--model tiny --device cpu --pixels 64 --seeds 2 --draws 2 --steps 3 --naive"
    line += " --peak-tflops 0.05" + (" --checkpointing" if checkpointing else "")
    found = gpu.run(line.split())
    rows = {way: {n: p.rows for n, p in meter.phases.items()} for way, meter in found.items()}
    # 2 trunks of 2 steps; 2 draws of 2 and of 1 further steps each; two rows with guidance.
    guided, trunks = 2, 2
    assert rows["ours"]["rollout"] == rows["naive"]["rollout"] == guided * trunks * (2 + 2 * 3)
    # Forward, backward and reference of 2 steps; once more with checkpointing; K times naively.
    a_row = 4 if checkpointing else 3
    assert rows["ours"]["update"] == guided * trunks * 2 * a_row
    assert rows["naive"]["update"] == 2 * rows["ours"]["update"]
    assert rows["ours"]["decode"] == 0
    told = capsys.readouterr().out
    assert told.count("| rollout |") == told.count("| update |") == 2
    assert "images/s" in told
    assert "MFU" in told
