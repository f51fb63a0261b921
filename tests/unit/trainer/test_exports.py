"""What is exported, loaded by diffusers in a process that does not have this project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tempflow_trainer import main
from tempflow_trainer.data import load_prompts
from tests.unit.trainer.family_cases import ALONE, CPU, FLUX, KLEIN, QWEN, SD3, Case, starts
from tests.unit.trainer.test_families import SAME

DRAW = """
import json, sys
for name in ("tempflow", "tempflow_api", "tempflow_trainer", "tests"):
    sys.modules[name] = None  # an import of it fails
import diffusers, torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
images = {}
for asked in json.load(open(sys.argv[1])):
    kind = getattr(diffusers, asked["pipeline"])
    pipeline = kind.from_pretrained(asked["source"])
    if asked["tuning"] == "lora":
        pipeline.load_lora_weights(asked["result"] + "/adapter")
    else:
        pipeline.transformer = type(pipeline.transformer).from_pretrained(
            asked["result"] + "/transformer"
        )
    pipeline.set_progress_bar_config(disable=True)
    latents = load_file(asked["latents"])["latents"]
    images[asked["name"]] = pipeline(latents=latents, **asked["arguments"]).images.contiguous()
save_file(images, sys.argv[2])
"""


def prepare(case: Case, tuning: str, folder: Path) -> tuple[dict[str, object], torch.Tensor]:
    """Train nothing, but set weights; export; what to draw, and our own images of it."""
    assert case.pipeline is not None
    spec = case.spec(folder, tuning=tuning)
    model = case.load(folder)
    run = main.build_run(spec, model, load_prompts(spec), ALONE, CPU, lambda: False)
    torch.manual_seed(0)
    run.tuning.assign(
        {n: p.detach() + 0.1 * torch.randn_like(p) for n, p in run.tuning.parameters().items()}
    )
    name, (height, width) = f"{case.family}-{tuning}", case.size()
    result = folder / f"result-{name}"
    result.mkdir()
    run.tuning.export(result)
    x = starts(model, height, width)
    latents = folder / f"latents-{name}.safetensors"
    save_file({"latents": case.its_latents(model.pipeline, x).contiguous()}, latents)
    asked: dict[str, object] = {
        "name": name,
        "tuning": tuning,
        "pipeline": type(model.pipeline).__name__,
        "source": case.source(folder),
        "result": str(result),
        "latents": str(latents),
        "arguments": case.its_arguments(height, width),
    }
    return asked, case.our_images(model, x, height, width)


@pytest.mark.slow
def test_plain_diffusers_draws_what_we_draw(tmp_path: Path) -> None:
    """The adapter and the whole network of every family; alpha is thrice the rank."""
    prepared = [
        prepare(case, tuning, tmp_path)
        for case in (SD3, FLUX, QWEN, KLEIN)
        for tuning in ("lora", "full")
    ]
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps([one for one, _ in prepared]))
    drawn = tmp_path / "drawn.safetensors"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", DRAW, str(asked), str(drawn)],
        env={**environment, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    images = load_file(drawn)
    for one, ours in prepared:
        name = str(one["name"])
        torch.testing.assert_close(images[name], ours, rtol=0, atol=SAME, msg=name)
