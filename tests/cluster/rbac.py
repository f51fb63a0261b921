"""What the operator was allowed to ask for, and what it did ask for, from the audit log."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from tests.cluster.controlplane import requests_in
from tests.cluster.kubectl import JsonObject, Kubectl
from tests.helm import find_helm


class Permission(NamedTuple):
    """One entry of an access rule, spelled out."""

    group: str
    resource: str
    verb: str


# The chart asks for one; the roles do not depend on it.
_ANY_IMAGE = ("--set", "image.repository=any", "--set", "image.tag=any")


@dataclass(frozen=True)
class Asked:
    """The requests of one user."""

    allowed: frozenset[Permission]
    forbidden: frozenset[Permission]
    """Refused for want of a permission; what admission refuses is not among them."""

    def __or__(self, other: "Asked") -> "Asked":
        return Asked(self.allowed | other.allowed, self.forbidden | other.forbidden)


def requests_of(user: str, audit_log: Path, *, since: datetime) -> Asked:
    by_decision: dict[str, set[Permission]] = {"allow": set(), "forbid": set()}
    for request in requests_in(audit_log):
        about = request.get("objectRef")
        if request["user"].get("username") != user or about is None:
            continue
        if datetime.fromisoformat(request["requestReceivedTimestamp"]) < since:
            continue
        decision = request.get("annotations", {}).get("authorization.k8s.io/decision", "allow")
        by_decision[decision].add(_permission(about, request["verb"]))
    return Asked(frozenset(by_decision["allow"]), frozenset(by_decision["forbid"]))


def grant(admin: Kubectl, user: str, *, name: str, namespace: str) -> None:
    """Give a user what the chart gives the operator, in a namespace of that name."""
    rendered = find_helm().objects(*_ANY_IMAGE)
    roles = [one for one in rendered if one["kind"] in ("ClusterRole", "Role")]
    roles = [one for one in roles if one["metadata"]["name"] in (name, f"{name}-lease")]
    admin.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    admin.apply(*(thing for role in roles for thing in (role, _binding(role, user))))


def _binding(role: JsonObject, user: str) -> JsonObject:
    kind, group = role["kind"], "rbac.authorization.k8s.io"
    return {
        "apiVersion": role["apiVersion"],
        "kind": f"{kind}Binding",
        "metadata": {key: role["metadata"][key] for key in role["metadata"] if key != "labels"},
        "roleRef": {"apiGroup": group, "kind": kind, "name": role["metadata"]["name"]},
        "subjects": [{"apiGroup": group, "kind": "User", "name": user}],
    }


def granted(admin: Kubectl, name: str, namespace: str) -> set[Permission]:
    """All that the roles of the chart's operator grant."""
    roles = [
        admin.get("clusterrole", name),
        admin.get("role", f"{name}-lease", namespace=namespace),
    ]
    return {permission for role in roles for permission in _spelled_out(role)}


def _spelled_out(role: JsonObject) -> Iterator[Permission]:
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                for verb in rule["verbs"]:
                    yield Permission(group, resource, verb)


def _permission(about: JsonObject, verb: str) -> Permission:
    resource = about.get("resource", "")
    if "subresource" in about:
        resource = f"{resource}/{about['subresource']}"
    return Permission(about.get("apiGroup", ""), resource, verb)
