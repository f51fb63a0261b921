"""The cluster through kubectl: one way to talk to it for the start-up and for the tests."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.errors import ClusterError
from tests.cluster.waiting import wait_for

JsonObject = dict[str, Any]


@dataclass(frozen=True)
class Kubectl:
    """kubectl with one kubeconfig; what it prints is parsed, what it complains about is raised."""

    binary: Path
    kubeconfig: Path

    def run(self, *arguments: str, stdin: str | None = None) -> str:
        done = subprocess.run(
            [str(self.binary), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            env=self.environment(),
        )
        if done.returncode != 0:
            why = done.stderr.strip() or done.stdout.strip()
            raise ClusterError(f"kubectl {' '.join(arguments)[:120]} failed: {why[-500:]}")
        return done.stdout

    def wait_established(self, definition: str) -> None:
        """For a kind that was just defined. `kubectl wait` fails on a definition without any
        condition, which one is for a moment."""

        def established() -> bool:
            conditions = self.get("customresourcedefinition", definition).get("status", {})
            return any(
                (one["type"], one["status"]) == ("Established", "True")
                for one in conditions.get("conditions") or ()
            )

        wait_for(f"{definition} established", established, deadline_seconds=60)

    def environment(self) -> dict[str, str]:
        """The environment in which kubectl and helm find this cluster."""
        return {**os.environ, "KUBECONFIG": str(self.kubeconfig)}

    def get(self, *what: str, namespace: str = "default") -> JsonObject:
        """One object, or the List that the arguments select."""
        found: JsonObject = json.loads(self.run("get", *what, "-n", namespace, "-o", "json"))
        return found

    def items(self, *what: str, namespace: str = "default") -> list[JsonObject]:
        listed: list[JsonObject] = self.get(*what, namespace=namespace)["items"]
        return listed

    def apply(self, *objects: JsonObject) -> None:
        """Server-side apply of the objects, in their order."""
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.run("apply", "--server-side", "-f", "-", stdin=json.dumps(listed))

    def answers(self) -> bool:
        """Whether the API server says that it is ready."""
        try:
            return self.run("get", "--raw", "/readyz", "--request-timeout=2s") == "ok"
        except ClusterError:
            return False

    def condition(self, kind: str, name: str, condition: str, namespace: str = "default") -> str:
        """The status of a condition: True, False or Unknown; empty when it is not there."""
        conditions = self.get(kind, name, namespace=namespace).get("status", {}).get("conditions")
        for entry in conditions or []:
            if entry["type"] == condition:
                return str(entry["status"])
        return ""

    def wait_condition(
        self,
        kind: str,
        name: str,
        condition: str,
        *,
        statuses: tuple[str, ...] = ("True",),
        namespace: str = "default",
        deadline_seconds: float,
    ) -> None:
        """Return once the condition has one of the statuses."""
        wait_for(
            f"{kind} {name} with {condition} {' or '.join(statuses)}",
            lambda: self.condition(kind, name, condition, namespace) in statuses,
            deadline_seconds=deadline_seconds,
            poll_seconds=0.5,
        )
