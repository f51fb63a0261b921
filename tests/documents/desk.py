"""A shell at which a test types what a page shows, word for word."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from tempflow_api.errors import ExitCode

SERVE = "python -m tempflow_trainer.rewards.serve"
COMMAND_SECONDS = 200
START_SECONDS = 90


def of_this_environment() -> dict[str, str]:
    """In which `tempflow` and `python` are those that run the test."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": programs, "OMP_NUM_THREADS": "1"}


@dataclass
class Desk:
    """A folder, and a shell in it. A server goes on in a terminal of its own until the end, when
    it is asked to stop and has to do so in order."""

    folder: Path
    environment: dict[str, str] = field(default_factory=of_this_environment)
    servers: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def run(self, command: str) -> str:
        """What it says, once it has ended well."""
        if command.startswith(SERVE):
            return self._serve(command)
        done = subprocess.run(
            ["bash", "-ec", command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def _serve(self, command: str) -> str:
        log = self.folder / "server.log"
        deadline = time.monotonic() + START_SECONDS
        while True:
            with log.open("w") as output:
                server = subprocess.Popen(
                    ["bash", "-c", f"exec {command}"],
                    cwd=self.folder,
                    env=self.environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            self.servers.append(server)
            while server.poll() is None and " serves " not in log.read_text():
                assert time.monotonic() < deadline, f"{command}\n{log.read_text()}"
                time.sleep(0.1)
            if server.returncode != ExitCode.ADDRESS_IN_USE or time.monotonic() > deadline:
                break
            # The page's port is fixed; whoever has it now may give it back.
            self.servers.remove(server)
            time.sleep(1)
        assert server.returncode is None, f"{command}\n{log.read_text()}"
        return log.read_text()

    def __enter__(self) -> "Desk":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: object, trace: TracebackType | None
    ) -> None:
        for server in self.servers:
            server.terminate()
        ended = [server.wait(timeout=30) for server in self.servers]
        assert kind or not any(ended), f"servers ended with {ended}"
