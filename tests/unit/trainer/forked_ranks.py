"""Jobs with several ranks, each rank a fork of one process: importing the trainer once is enough.

Started as a process of its own with a file that lists (processes, job, work folder). It computes
nothing itself, for torch's autograd does not outlive a fork.
"""

import json
import logging
import os
import socket
import sys
import traceback
from pathlib import Path

from tempflow_api import naming
from tempflow_trainer import distributed
from tempflow_trainer.log_tail import LogTail
from tempflow_trainer.main import read_job, train


def main() -> int:
    """1 when a rank failed; the jobs after it are not started."""
    for processes, job, work in json.loads(Path(sys.argv[1]).read_text()):
        Path(work).mkdir(parents=True, exist_ok=True)
        port = free_port()
        ranks = [forked(rank, processes, port, job, work) for rank in range(processes)]
        ends = [os.waitpid(process, 0)[1] for process in ranks]
        if any(ends):
            return 1
    return 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def forked(rank: int, world: int, port: int, job: str, work: str) -> int:
    """The process of a rank, as torchrun would have started it."""
    process = os.fork()
    if process:
        return process
    try:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            naming.ENV_WORK_DIR: work,
        }
        told = logging.FileHandler(Path(work) / f"rank-{rank}.log")
        logging.basicConfig(level=logging.INFO, handlers=[told], force=True)
        train(read_job(Path(job)), distributed.join(), lambda: False, LogTail(rank, 0))
        distributed.leave()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
