"""Whose an object is: labels find candidates, the controller's UID decides."""

from collections.abc import Mapping
from typing import Any


def owned_by(metadata: Mapping[str, Any], uid: str) -> bool:
    """Whether the object's controller is the one with that UID. A job that was deleted and made
    anew under the same name has another UID, and what the old one left is not ours."""
    return controller_uid(metadata) == uid


def controller_uid(metadata: Mapping[str, Any]) -> str | None:
    """UID of the controller of an object, None when it has none."""
    for owner in metadata.get("ownerReferences") or []:
        if owner.get("controller"):
            return str(owner["uid"])
    return None
