"""From the models to the custom resource definition: ``python -m tempflow_api.crd`` prints it.

pydantic emits JSON Schema; the API server takes structural schemas, a narrower language. One pass
translates, and refuses what has no translation, so that a model the server would reject fails here.
"""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from tempflow_api import generated
from tempflow_api.naming import CATEGORY, GROUP, KIND, PLURAL, SHORT_NAME, VERSION
from tempflow_api.rules import RULES, Mutability, mutability_of
from tempflow_api.status import JobStatus
from tempflow_api.v1alpha1 import JobSpec, ObjectMeta

Schema = dict[str, Any]

# kubectl apply keeps a copy of the object in an annotation, which has room for 262,144 bytes.
MAX_BYTES = 200_000

# Present in pydantic's output, meaningless or forbidden in a structural schema.
_DROPPED = ("title", "discriminator")


class NotStructural(ValueError):
    """A model uses what a structural schema cannot say."""


def schema_of(model: type[BaseModel], *, defaults: bool = True) -> Schema:
    """The structural schema of a model. Without ``defaults`` nothing is filled in by the server,
    which is right for status: the operator states what it knows."""
    raw = model.model_json_schema(by_alias=True)
    schema = _translate(raw, raw.get("$defs", {}), model.__name__)
    return schema if defaults else _without_defaults(schema)


def _translate(node: Schema, definitions: Schema, path: str) -> Schema:
    node = _inlined(node, definitions, path)
    out: Schema = {}
    for key, value in node.items():
        if key in _DROPPED or key == "$defs":
            continue
        if key == "properties":
            out[key] = {n: _translate(p, definitions, f"{path}.{n}") for n, p in value.items()}
        elif key == "items":
            out[key] = _translate(value, definitions, f"{path}[]")
        elif key == "additionalProperties":
            if value is not False:  # unknown keys are refused or pruned by the server anyway
                out[key] = _translate(value, definitions, f"{path}{{}}")
        elif key in ("exclusiveMinimum", "exclusiveMaximum"):
            out[key.replace("exclusiveM", "m")] = value
            out[key] = True
        elif key == "const":
            out["enum"] = [value]
        elif key == "default":
            if value is not None:
                out[key] = value
        elif key == "description":
            out[key] = " ".join(value.split())
        else:
            out[key] = value
    _check(out, path)
    return _section_default(out)


def _inlined(node: Schema, definitions: Schema, path: str) -> Schema:
    """``node`` without ``$ref`` and without the null branch of an optional."""
    if "prefixItems" in node or "oneOf" in node:
        raise NotStructural(f"{path}: unions and tuples have no structural schema")
    if "anyOf" in node:
        present = [branch for branch in node["anyOf"] if branch.get("type") != "null"]
        if len(present) != 1:
            raise NotStructural(f"{path}: a union of {len(present)} types has no structural schema")
        node = {**present[0], **{k: v for k, v in node.items() if k != "anyOf"}}
    if "$ref" in node:
        target = definitions[node["$ref"].rsplit("/", 1)[1]]
        node = {**target, **{k: v for k, v in node.items() if k != "$ref"}}
        return _inlined(node, definitions, path)
    return node


def _check(node: Schema, path: str) -> None:
    kind = node.get("type")
    if kind is None:
        raise NotStructural(f"{path}: has no single type")
    if kind == "array" and "items" not in node:
        raise NotStructural(f"{path}: a list without a type of its items")


def _section_default(node: Schema) -> Schema:
    """A section that may be left out starts empty, and its fields' own defaults fill it."""
    if "default" in node and "properties" in node:
        own = {n: p["default"] for n, p in node["properties"].items() if "default" in p}
        given = {n: v for n, v in node["default"].items() if v is not None}
        if {n: v for n, v in given.items() if own.get(n) != {}} != {
            n: v for n, v in own.items() if v != {}
        }:
            raise NotStructural("the default of a section differs from its fields' defaults")
        return {**node, "default": {}}
    return node


def _without_defaults(node: Schema) -> Schema:
    out = {key: value for key, value in node.items() if key != "default"}
    if "properties" in out:
        out["properties"] = {n: _without_defaults(p) for n, p in out["properties"].items()}
    if isinstance(out.get("items"), dict):
        out["items"] = _without_defaults(out["items"])
    return out


def cross_field_rules() -> list[Schema]:
    """``rules.RULES`` for the API server; ``self`` is the spec."""
    return [
        {
            "rule": rule.cel,
            "message": rule.message,
            "fieldPath": rule.path.removeprefix("spec"),
        }
        for rule in RULES
    ]


# Either side: an update that suspends, edits and resumes in any combination is safe, because an
# attempt takes its configuration when it is created and never looks again.
_SUSPENDED = "self.runPolicy.suspend || oldSelf.runPolicy.suspend"
_MESSAGES = {
    Mutability.IMMUTABLE: "is fixed once the job exists: it decides what is learned. Create "
    "another job",
    Mutability.WHILE_SUSPENDED: "changes only while the job is suspended: set "
    "runPolicy.suspend to true in this update or before it",
}


def transition_rules(spec: Schema) -> list[Schema]:
    """One rule for each largest block whose fields are all equally fixed."""
    rules = []
    for path, mutability, optional in _blocks(spec, "spec", optional=False):
        if mutability is Mutability.MUTABLE:
            continue
        name = path.removeprefix("spec.")
        same = f"self.{name} == oldSelf.{name}"
        if optional:
            same = f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || {same})"
        if mutability is Mutability.WHILE_SUSPENDED:
            same = f"{_SUSPENDED} || ({same})"
        rules.append(
            {
                "rule": same,
                "message": _MESSAGES[mutability],
                "reason": "FieldValueForbidden",
                "fieldPath": f".{name}",
            }
        )
    return rules


def _blocks(node: Schema, path: str, *, optional: bool) -> Iterator[tuple[str, Mutability, bool]]:
    kinds = set(_mutabilities(node, path))
    if len(kinds) == 1 and path != "spec":
        yield path, kinds.pop(), optional
        return
    if optional:
        raise NotStructural(f"{path}: an optional section is fixed or free as a whole")
    required = node.get("required", [])
    for name, child in node["properties"].items():
        may_be_absent = name not in required and "default" not in child
        yield from _blocks(child, f"{path}.{name}", optional=may_be_absent)


def _mutabilities(node: Schema, path: str) -> Iterator[Mutability]:
    if "properties" not in node:
        yield mutability_of(path)
        return
    for name, child in node["properties"].items():
        yield from _mutabilities(child, f"{path}.{name}")


def spec_schema() -> Schema:
    """The spec with its rules."""
    schema = schema_of(JobSpec)
    rules = [*cross_field_rules(), *transition_rules(schema)]
    return {**schema, "x-kubernetes-validations": rules}


def status_schema() -> Schema:
    """The status; its conditions are a map by type, for server-side apply."""
    schema = schema_of(JobStatus, defaults=False)
    schema["properties"]["conditions"] |= {
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
    }
    return schema


def _metadata_schema() -> Schema:
    """A structural schema may restrict the name, and nothing else of the metadata."""
    name = schema_of(ObjectMeta)["properties"]["name"]
    return {"type": "object", "properties": {"name": name}}


def _column(name: str, kind: str, path: str, description: str, *, wide: bool = False) -> Schema:
    column: Schema = {"name": name, "type": kind, "jsonPath": path, "description": description}
    return {**column, "priority": 1} if wide else column


_RUNNING_REASON = '.status.conditions[?(@.type=="Running")].reason'
COLUMNS = [
    _column("State", "string", ".status.phase", "A summary of the conditions."),
    _column("Nodes", "integer", ".spec.compute.nodes", "Pods asked for."),
    _column("Ready", "integer", ".status.replicas.running", "Pods that run."),
    _column("Progress", "string", ".status.progressText", "Epochs completed of epochs asked for."),
    _column("Restarts", "integer", ".status.restarts.failures", "Restarts after failures."),
    _column("Age", "date", ".metadata.creationTimestamp", "Since the job was created."),
    _column("Attempt", "integer", ".status.attempt", "Current attempt, from 1.", wide=True),
    _column("Reason", "string", _RUNNING_REASON, "Why it runs, waits or ended.", wide=True),
    _column("Checkpoint", "string", ".status.checkpoint.uri", "Newest complete one.", wide=True),
]


def definition() -> Schema:
    """The CustomResourceDefinition."""
    root = {
        "description": "A run of TempFlow-GRPO on a cluster.",
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": _metadata_schema(),
            "spec": spec_schema(),
            "status": status_schema(),
        },
    }
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": COLUMNS,
        "selectableFields": [{"jsonPath": ".status.phase"}],
        "subresources": {"status": {}},
        "schema": {"openAPIV3Schema": root},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": [SHORT_NAME],
                "categories": [CATEGORY],
            },
            "versions": [version],
        },
    }


def to_yaml(value: object) -> str:
    """YAML of plain JSON values. Strings are quoted as JSON, which is YAML too: no library is
    needed, and no string can turn into a number or a date."""
    return "\n".join(_lines(value)) + "\n"


def _lines(value: object) -> list[str]:
    if isinstance(value, dict) and value:
        lines = []
        for key, child in value.items():
            lines += _entry(f"{_key(key)}:", child)
        return lines
    if isinstance(value, list) and value:
        lines = []
        for child in value:
            first, *rest = _lines(child)
            lines += [f"- {first}", *(f"  {line}" for line in rest)]
        return lines
    return [_scalar(value)]


def _entry(head: str, child: object) -> list[str]:
    body = _lines(child)
    if isinstance(child, dict | list) and child:
        return [head, *(f"  {line}" for line in body)]
    return [f"{head} {body[0]}"]


def _key(key: str) -> str:
    return key if key.replace("-", "").isalnum() else json.dumps(key)


def _scalar(value: object) -> str:
    if isinstance(value, float):
        # repr may leave the point out (1e-08), and YAML 1.1 then reads a string.
        return f"{value:.17g}" if value.is_integer() else f"{value:.12f}".rstrip("0")
    return json.dumps(value)


def document() -> str:
    """The file ``charts/tempflow/files/crd.yaml``."""
    head = "# Generated by `python -m tempflow_api.crd --write`; edit sdk/tempflow_api instead.\n"
    return head + to_yaml(definition())


def main() -> int:
    return generated.run("crd", document())


if __name__ == "__main__":
    raise SystemExit(main())
