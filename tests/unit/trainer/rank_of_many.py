"""One of several processes that train one job after the other: importing torch once is enough.

Started by torchrun with a file that lists (job, work folder).
"""

import json
import logging
import os
import sys
from pathlib import Path

from tempflow_api import naming
from tempflow_trainer import distributed
from tempflow_trainer.log_tail import LogTail
from tempflow_trainer.main import read_job, train


def main() -> None:
    ranks = distributed.join()
    for job, work in json.loads(Path(sys.argv[1]).read_text()):
        Path(work).mkdir(parents=True, exist_ok=True)
        told = logging.FileHandler(Path(work) / f"rank-{ranks.rank}.log")
        logging.basicConfig(level=logging.INFO, handlers=[told], force=True)
        os.environ[naming.ENV_WORK_DIR] = work
        train(read_job(Path(job)), ranks, lambda: False, LogTail(ranks.rank, 0))
    distributed.leave()


if __name__ == "__main__":
    main()
