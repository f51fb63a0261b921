"""Logging of the operator: lines for people, or one JSON object a line for machines."""

import json
import logging
import sys

from tempflow_operator.decisions import instants
from tempflow_operator.settings import Logs

_TEXT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": instants.micro_timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(settings: Logs) -> None:
    """Everything goes to stderr, once."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.json else logging.Formatter(_TEXT))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.level)
    # One line a watch event is too much of a good thing.
    logging.getLogger("kopf").setLevel(max(root.level, logging.WARNING))
