"""Where models come from: a folder, S3, the hub; and what is said when they cannot be had."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tempflow_api.errors import ModelUnavailable
from tempflow_api.v1alpha1 import Model
from tempflow_trainer.models import families, source
from tempflow_trainer.models.download import folder_of
from tempflow_trainer.models.skeleton import skeleton
from tests.tiny_models import save_sd3
from tests.unit.trainer.conftest import BUCKET
from tests.unit.trainer.hub import COMMIT, TOKEN, Hub

CPU = torch.device("cpu")


def model_of(place: str, revision: str | None = None, family: str = "sd3") -> Model:
    return Model.model_validate(
        {"family": family, "source": place, "tuning": "full", "revision": revision}
    )


def refusal(place: str, cache: Path) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        families.load(model_of(place), cache=cache, device=CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("source") / "sd3")


def shard(folder: Path) -> None:
    """As large models are saved: weights in several files, and an index."""
    from diffusers import SD3Transformer2DModel

    part = folder / "transformer"
    network = SD3Transformer2DModel.from_pretrained(part)
    shutil.rmtree(part)
    network.save_pretrained(part, max_shard_size="30KB")


def lose_a_shard(folder: Path) -> None:
    shard(folder)
    sorted((folder / "transformer").glob("*.safetensors"))[1].unlink()


def only_pickles(folder: Path) -> None:
    """Reading a pickle runs code of whoever made it."""
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def cut(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def of_another_width(folder: Path) -> None:
    """The configuration no longer is that of the weights."""
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "joint_attention_dim": 48}))


def of_another_class(folder: Path) -> None:
    index = folder / source.INDEX
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "FluxPipeline"}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_a_shard, r"1 of \d files of weights are missing, the first is \S+model-00002-of-"),
        (lambda f: shutil.rmtree(f / "text_encoder_2"), r"the folder \S+text_encoder_2 is missing"),
        (lambda f: (f / source.INDEX).unlink(), r"there is no model_index.json in \S+: expected"),
        (lambda f: (f / source.INDEX).write_text("{"), r"model_index.json cannot be read: "),
        (of_another_class, r"it is a FluxPipeline; see spec.model.family"),
        (
            only_pickles,
            r"no file named diffusion_pytorch_model.safetensors found in directory \S+vae",
        ),
        (cut, r"transformer/diffusion_pytorch_model.safetensors"),
        (of_another_width, r"context_embedder.weight.*shape"),
    ],
)
def test_a_damaged_folder_is_described(
    damage: Callable[[Path], None], words: str, tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    damage(folder)
    text = refusal(str(folder), tmp_path)
    assert text.startswith(
        f"spec.model.source: {folder} cannot be loaded as StableDiffusion3Pipeline: "
    )
    assert re.search(words, text), text


def test_a_missing_package_is_named(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise ImportError("T5Tokenizer needs the sentencepiece library")

    monkeypatch.setattr("diffusers.StableDiffusion3Pipeline.from_pretrained", load)
    assert refusal(str(tiny), tmp_path).endswith("T5Tokenizer needs the sentencepiece library")


def test_weights_in_several_files_are_loaded(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    shard(folder)
    whole = families.load(model_of(str(tiny)), cache=tmp_path, device=CPU)
    parts = families.load(model_of(f"file://{folder}"), cache=tmp_path, device=CPU)
    expected = whole.transformer.state_dict()
    found = parts.transformer.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture
def bucket(s3_client: Any, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    return s3_client


def test_a_model_is_copied_from_s3_once(bucket: Any, tiny: Path, tmp_path: Path) -> None:
    for file in tiny.rglob("*"):
        if file.is_file():
            bucket.upload_file(str(file), BUCKET, f"models/sd3/{file.relative_to(tiny)}")
    place = f"s3://{BUCKET}/models/sd3"
    first = families.load(model_of(place), cache=tmp_path, device=CPU)
    assert first.transformer.config.num_layers == 2
    bucket.delete_object(Bucket=BUCKET, Key="models/sd3/model_index.json")
    assert families.load(model_of(place), cache=tmp_path, device=CPU) is not None
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [folder_of(f"{BUCKET}/models/sd3")]


def test_a_configuration_is_read_from_s3_without_weights(bucket: Any, tiny: Path) -> None:
    for file in tiny.rglob("*.json"):
        bucket.upload_file(str(file), BUCKET, f"configured/{file.relative_to(tiny)}")
    bones = skeleton(model_of(f"s3://{BUCKET}/configured"))
    assert bones.model.transformer.config.num_layers == 2
    with pytest.raises(ModelUnavailable, match=f"there is nothing at s3://{BUCKET}/none"):
        skeleton(model_of(f"s3://{BUCKET}/none"))


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (f"s3://{BUCKET}/none", f"there is nothing at s3://{BUCKET}/none"),
        ("s3://no-such-bucket/model", "no-such-bucket/model"),
    ],
)
def test_a_prefix_without_files_is_named(
    bucket: Any, place: str, words: str, tmp_path: Path
) -> None:
    assert bucket is not None
    text = refusal(place, tmp_path)
    assert text.startswith("spec.model.source: ")
    assert words in text


@pytest.mark.usefixtures("credentials")
def test_a_store_without_access_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", NOWHERE)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    text = refusal("s3://elsewhere/model", tmp_path)
    assert "spec.model.source: s3://elsewhere/model cannot be read: " in text
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


NOWHERE = "http://127.0.0.1:9"
# The client reads the address of the hub when it is imported, which takes seconds: one process of
# its own asks for everything.
ASK = """
import json, os, sys, time, torch
from pathlib import Path
time.sleep = lambda _seconds: None  # the client would wait half a minute for a hub to come up
import huggingface_hub as client
from huggingface_hub import constants, hf_api
from tempflow_api.errors import ModelUnavailable
from tempflow_api.v1alpha1 import Model
from tempflow_trainer.models import families
from tempflow_trainer.models.source import configurations
answers = {}
for name, asked in json.loads(sys.argv[1]).items():
    os.environ["HF_TOKEN"] = asked.get("token", "")
    constants.HF_HUB_OFFLINE = asked.get("offline", False)
    constants.ENDPOINT = hf_api.api.endpoint = asked.get("endpoint", os.environ["HF_ENDPOINT"])
    constants.HUGGINGFACE_CO_URL_TEMPLATE = (
        constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    model = Model(
        family="sd3", source=asked["source"], revision=asked.get("revision"), tuning="full"
    )
    try:
        if asked.get("weights", True):
            found = families.load(model, cache=Path("unused"), device=torch.device("cpu"))
            answers[name] = type(found.pipeline).__name__
        else:
            folder = configurations(model.source, model.revision, Path("unused"))
            answers[name] = " ".join(sorted({p.name for p in folder.rglob("*") if p.is_file()}))
    except ModelUnavailable as error:
        answers[name] = str(error)
print(json.dumps(answers))
"""
LICENCE = (
    "its licence has to be accepted at {hub}/owner/gated, and a token of that account given as "
    "HF_TOKEN (on a cluster by spec.compute.secretName); "
)
CONFIGURATION = "config.json model_index.json scheduler_config.json"
LOADED = "StableDiffusion3Pipeline"
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
# In this order: what is loaded is in the cache afterwards.
QUESTIONS: list[tuple[str, dict[str, object], str]] = [
    (
        "no network",
        {"source": "owner/open", "endpoint": NOWHERE},
        (
            f"{NOWHERE} does not answer, and it is not in the local cache; check the network and "
            "HTTPS_PROXY, or copy the model to a folder or to s3://"
        ),
    ),
    (
        "offline",
        {"source": "owner/open", "offline": True},
        "it is not in the local cache, and HF_HUB_OFFLINE forbids the network",
    ),
    ("configuration", {"source": "owner/open", "weights": False}, CONFIGURATION),
    ("open", {"source": "owner/open"}, LOADED),
    ("by commit", {"source": "owner/open", "revision": COMMIT}, LOADED),
    ("cached", {"source": "owner/open", "endpoint": NOWHERE}, LOADED),
    ("cached, offline", {"source": "owner/open", "offline": True}, LOADED),
    ("gated", {"source": "owner/gated"}, LICENCE + "no token is set"),
    ("foreign token", {"source": "owner/gated", "token": "hf_x"}, LICENCE + "a token is set"),
    ("own token", {"source": "owner/gated", "token": TOKEN}, LOADED),
    (
        "absent",
        {"source": "owner/none"},
        (
            "there is no such model at {hub}, or it is private and HF_TOKEN may not read it; no "
            "token is set"
        ),
    ),
    (
        "revision",
        {"source": "owner/open", "revision": "v9"},
        "it has no revision 'v9': see spec.model.revision",
    ),
    (
        "bare",
        {"source": "owner/bare"},
        "it has no model_index.json: expected a model in the diffusers layout",
    ),
    (
        "damaged",
        {"source": "owner/damaged"},
        f"its {WEIGHTS} was damaged on its way: the copy is not what the hub has; try again",
    ),
    ("class", {"source": "owner/flux"}, "it is a FluxPipeline; see spec.model.family"),
]


@pytest.fixture(scope="module")
def hub(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    for name in ("open", "gated", "flux", "damaged"):
        shutil.copytree(tiny, root / "owner" / name)
    (root / "owner" / "bare").mkdir()
    (root / "owner" / "bare" / "README.md").write_text("nothing else")
    of_another_class(root / "owner" / "flux")
    served = Hub(root, gated={"owner/gated"}, damaged={f"owner/damaged/{WEIGHTS}"})
    yield served
    served.close()


@pytest.mark.slow
def test_what_the_hub_gives_and_what_it_refuses(hub: Hub, tmp_path: Path) -> None:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps({name: asked for name, asked, _ in QUESTIONS})],
        env={**inherited, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    for name, asked, words in QUESTIONS:
        start = f"spec.model.source: {asked['source']} cannot be loaded as {LOADED}: "
        given = words in (LOADED, CONFIGURATION)
        expected = words if given else start + words.format(hub=hub.endpoint)
        assert answers[name] == expected, name
    # What was damaged is gone, what was whole is not read again.
    [damaged] = (tmp_path / "hub").glob("models--owner--damaged")
    assert not list(damaged.glob(f"snapshots/*/{WEIGHTS}"))
    whole = {path.name for path in damaged.glob("checked/*")}
    assert whole
    assert whole < {path.name for path in damaged.glob("blobs/*")}
    # The class is known before the weights are asked for.
    assert not [path for path in hub.asked if "owner/flux" in path and "safetensors" in path]
