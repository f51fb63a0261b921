"""Entry of the container and of ``tempflow run``; it stays the first process: signals arrive here.

The first process of a container gets no signal that it does not catch, and the kubelet sends a
request to stop once. So signals are caught before anything else is imported.
"""

import signal
import sys
import time


def main() -> int:
    """Catch what asks to stop, then start the ranks of this node; returns the exit code."""
    requests: list[float] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _received, _frame: requests.append(time.monotonic()))
    from tempflow_trainer import gang  # a third of a second

    return gang.main(requests)


if __name__ == "__main__":
    sys.exit(main())
