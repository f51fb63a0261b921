"""The examples of docs/sdk.md, run as they stand against a real API server."""

import re
import threading
import time
from pathlib import Path

import pytest

from tempflow import Client, NotFound
from tempflow.cli import main
from tests.cluster.apiserver import ApiServer
from tests.cluster.client_objects import (
    SUCCEEDED,
    add_node,
    add_pod,
    end_pod,
    here,
    set_status,
)
from tests.cluster.kubelet import Kubelet

pytestmark = pytest.mark.cluster

BLOCKS = re.findall(r"^```python\n(.*?)^```", here("docs/sdk.md").read_text(), re.M | re.S)


def play_the_cluster(api: ApiServer, kubelet: Kubelet) -> None:
    """What an operator and a node do with the job of the examples."""
    with Client(kubeconfig=str(api.kubeconfig("admin"))) as client:
        while True:
            try:
                job = client.get("from-python")
                break
            except NotFound:
                time.sleep(0.2)
        set_status(api, "from-python", {"phase": "Starting"})
        name, log = add_pod(api, kubelet, "from-python", job.uid)
        log.write(0, "epoch 1/1")
        end_pod(api, name, log)
        set_status(api, "from-python", SUCCEEDED)


def test_the_examples_run(
    api: ApiServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig("admin")))
    monkeypatch.setattr("sys.argv", ["tempflow", "init", "--preset", "digits"])
    with pytest.raises(SystemExit):
        main()
    kubelet = Kubelet(*api.certificate())
    add_node(api, kubelet)
    threading.Thread(target=play_the_cluster, args=(api, kubelet), daemon=True).start()
    names: dict[str, object] = {}
    assert len(BLOCKS) >= 6
    for block in BLOCKS:
        exec(compile(block, "docs/sdk.md", "exec"), names)
    kubelet.close()
    told = capsys.readouterr().out
    assert "default from-python " in told
    assert "True Completed: all epochs are trained" in told
    assert " 1 0 epoch 1/1" in told
    assert "has ended (Completed" in told
