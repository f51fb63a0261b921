"""What the trainer computes on a pretended device: see ``device``.

Results are equal up to the order of sums, which differs where torch has one kernel for several
operations on the processor alone.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tempflow_api import checkpoint_layout as layout
from tempflow_api import naming
from tempflow_trainer import loop, main, sample
from tempflow_trainer.data import load_prompts
from tempflow_trainer.log_tail import LogTail
from tempflow_trainer.loop import Run
from tempflow_trainer.models import families
from tempflow_trainer.rewards.aesthetic import Aesthetic, Head
from tempflow_trainer.rewards.base import Place
from tempflow_trainer.rewards.clip import ClipScore, PickScore, pictures
from tempflow_trainer.rewards.detector import ColourReader, Detector
from tempflow_trainer.rewards.hpsv2 import HpsV2
from tests import tiny_scorers
from tests.pretended import device as pretended
from tests.unit.trainer.family_cases import ALONE, CPU, DIGITS, FLUX, KLEIN, QWEN, SD3, Case
from tests.unit.trainer.sessions import never, rows

pytestmark = pytest.mark.pretended
every_family = pytest.mark.parametrize("case", [DIGITS, SD3, FLUX, QWEN, KLEIN], ids=str)
both_tunings = pytest.mark.parametrize("tuning", ["lora", "full"])


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="session")
def there() -> torch.device:
    return pretended.make()


def test_the_device_is_another(there: torch.device) -> None:
    one = torch.ones(3).to(there)
    assert one.device == there == torch.zeros(3, device=there).device
    assert float((one + 1).sum()) == 6
    assert (one * 1j).conj().to(CPU).tolist() == [-1j] * 3
    indices = torch.tensor([2, 0])
    assert one[indices].device == there
    with pytest.raises(pretended.Mixed):
        _ = one + torch.ones(3)
    with pytest.raises(pretended.Mixed):
        _ = torch.ones(3)[indices.to(there)]
    with pytest.raises(pretended.Mixed):
        one[indices] = torch.ones(2)


def run_of(case: Case, folders: Path, tuning: str, device: torch.device) -> Run:
    """With everything that saves memory."""
    spec = case.spec(folders, "float32", tuning)
    savers = {"gradient_checkpointing": True, "text_cache_mebibytes": 64, "rows_per_decode": 2}
    parts = {
        "compute": spec.compute.model_copy(update=savers),
        # With its usual one Adam makes as much of a gradient that is rounding as of any other.
        "optimizer": spec.optimizer.model_copy(update={"epsilon": 1e-3}),
        "algorithm": spec.algorithm.model_copy(update={"updates_per_epoch": 2}),
    }
    spec = spec.model_copy(update=parts)
    model = families.load(spec.model, cache=folders, device=device)
    return main.build_run(spec, model, load_prompts(spec), ALONE, device, lambda: False)


def moved(run: Run) -> tuple[dict[str, float], Tensor]:
    """What an epoch tells in numbers, and by how much it moves the weights, flat."""
    weights = run.tuning.parameters()
    before = [p.detach().clone() for p in weights.values()]
    metrics = loop.run_epoch(run, 0)
    by = [
        (p.detach() - old).to(CPU).flatten()
        for p, old in zip(weights.values(), before, strict=True)
    ]
    return {k: v for k, v in metrics.items() if not isinstance(v, dict)}, torch.cat(by)


@every_family
@both_tunings
def test_an_epoch(case: Case, tuning: str, folders: Path, there: torch.device) -> None:
    metrics, by = moved(run_of(case, folders, tuning, CPU))
    run = run_of(case, folders, tuning, there)
    assert {p.device for p in run.tuning.parameters().values()} == {there}
    metrics_there, by_there = moved(run)
    assert metrics["kl"] > 0
    assert by.norm() > 0
    assert metrics_there == pytest.approx(metrics, rel=0.01, abs=1e-5)
    assert (by_there - by).norm() < 0.01 * by.norm()


@pytest.mark.parametrize("case", [DIGITS, QWEN], ids=str)
def test_a_job_that_is_continued_and_its_result(
    case: Case,
    folders: Path,
    there: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Evaluations, checkpoints, a second start from one, the adapter, pictures by it."""
    courses, images = [], []
    for device in (CPU, there):
        work = tmp_path / device.type / "demo"
        work.mkdir(parents=True)
        monkeypatch.setenv(naming.ENV_WORK_DIR, str(work))
        for module in (main, sample):
            monkeypatch.setattr(module, "device_of", lambda _spec, _rank, device=device: device)
        for epochs in (1, 2):
            main.train(case.job(folders, epochs), ALONE, never, LogTail(0, 0))
        courses.append([row["reward"] for row in rows(work, layout.METRICS)])
        drawn = work / "drawn.png"
        words = ["sample", "--from", str(work), "--prompt", "a three", "--count", "2"]
        monkeypatch.setattr("sys.argv", [*words, "--out", str(drawn)])
        assert sample.main() == 0
        images.append(np.asarray(Image.open(drawn)).astype(int))
    assert len(courses[0]) == 2
    assert courses[1] == pytest.approx(courses[0], rel=1e-3)
    assert np.abs(images[1] - images[0]).max() <= 2


def scorers(folder: Path, place: Place) -> dict[str, Any]:
    """Those that compute a network of their own, with tiny ones."""
    clip, head, hps = (folder / name for name in ("clip", "head", "hps"))
    model = tiny_scorers.save_clip(clip)
    for one in (head, hps):
        one.mkdir(exist_ok=True)
    weights = tiny_scorers.seeded(lambda: Head(24)).state_dict()
    save_file(weights, head / "head.safetensors")
    layout_of_open_clip = tiny_scorers.open_clip_layout(model)
    torch.save({"epoch": 1, "state_dict": layout_of_open_clip}, hps / "hps.pt")
    return {
        "pickscore": PickScore(str(clip), str(clip), place=place),
        "clipscore": ClipScore(str(clip), place=place),
        "aesthetic": Aesthetic(str(clip), str(head), "head.safetensors", place=place),
        "hpsv2": HpsV2(str(hps), "hps.pt", str(clip), place=place),
    }


def test_scorers(there: torch.device, tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 48, 80), generator=torch.Generator().manual_seed(0)) / 255
    prompts = ["a red dog", "a photo of a cat"]
    here = scorers(tmp_path, Place(CPU))
    for name, scorer in scorers(tmp_path, Place(there)).items():
        found = scorer.score(images, prompts, [{}, {}])
        assert found.device == CPU, name
        torch.testing.assert_close(
            found, here[name].score(images, prompts, [{}, {}]), rtol=1e-4, atol=1e-5
        )


def test_what_geneval_asks(there: torch.device, tmp_path: Path) -> None:
    """What is in a picture, and in which colour."""
    detector, clip = tmp_path / "detector", tmp_path / "clip"
    tiny_scorers.save_mask2former(detector)
    tiny_scorers.save_clip(clip)
    images = pictures(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    seen = []
    for place in (Place(CPU), Place(there)):
        reader = ColourReader.load(str(clip), "", place)
        found = Detector.load(str(detector), "", place).find(images, 0.05)
        seen.append(
            [
                {name: reader.colours(image, objects, name) for name, objects in one.items()}
                for image, one in zip(images, found, strict=True)
            ]
        )
    assert seen[1] == seen[0]
    assert any(seen[0])
