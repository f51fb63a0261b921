"""What a rule across fields is."""

from collections.abc import Callable
from dataclasses import dataclass

from tempflow_api.v1alpha1 import JobSpec


@dataclass(frozen=True)
class Rule:
    """``holds`` and ``cel`` say the same; ``message`` tells what is expected and what to do.

    ``path`` names the field at which the error is shown; CEL sees the spec as ``self``.
    """

    path: str
    cel: str
    message: str
    holds: Callable[[JobSpec], bool]
