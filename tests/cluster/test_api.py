"""The API server's own verdict on the resource definition, and on what the operator creates."""

import copy
import json
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from tempflow_api import naming
from tempflow_api.rules import RULES, Mutability, mutability_of
from tempflow_operator import desired
from tempflow_operator.settings import Pods
from tests.builders import make_job
from tests.cluster.bare import Bare
from tests.cluster.kubectl import JsonObject
from tests.unit.api.field_changes import ALONE, LEAVES, another, value_of, with_value
from tests.unit.api.rule_breakers import BREAKERS, VALID, Breaker, rule_of
from tests.unit.operator.desired.test_objects import ASKING
from tests.unit.operator.desired.test_rewards import SERVED

pytestmark = pytest.mark.cluster

Raw = dict[str, Any]
S3_SERVER = Path(__file__).parents[2] / "examples/cluster/s3-server.yaml"


class Api:
    """Requests to the API server that are refused or taken, without an object for each."""

    def __init__(self, server: Bare) -> None:
        self._server = server
        self._tls = ssl.create_default_context()
        self._tls.check_hostname = False
        self._tls.verify_mode = ssl.CERT_NONE  # its own certificate, on loopback

    def send(self, method: str, path: str, body: Raw) -> tuple[int, JsonObject]:
        request = urllib.request.Request(
            self._server.url + path,
            data=json.dumps(body).encode(),
            method=method,
            headers={
                "Authorization": f"Bearer {self._server.token}",
                "Content-Type": "application/json",
            },
        )
        try:
            with urllib.request.urlopen(request, context=self._tls, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


JOBS = f"/apis/{naming.API_VERSION}/namespaces/default/{naming.PLURAL}"


@pytest.fixture(scope="module")
def api(bare_server: Bare) -> Api:
    return Api(bare_server)


@pytest.fixture(scope="module")
def stored(api: Api) -> dict[bool, Raw]:
    """A running and a suspended job, as the server has defaulted them."""
    jobs = {}
    for suspended in (False, True):
        body = copy.deepcopy(VALID)
        body["metadata"] = {"name": f"mutable-{suspended}".lower()}
        body["spec"]["checkpoint"] = {"uri": "s3://bucket/runs"}
        body["spec"]["runPolicy"] = {"suspend": suspended}
        code, jobs[suspended] = api.send("POST", JOBS, body)
        assert code == 201, jobs[suspended]
    return jobs


@pytest.mark.parametrize("path", ALONE)
def test_every_field_changes_when_it_may(api: Api, stored: dict[bool, Raw], path: str) -> None:
    allowed = {
        Mutability.MUTABLE: {False, True},
        Mutability.WHILE_SUSPENDED: {True},
        Mutability.IMMUTABLE: set[bool](),
    }[mutability_of(f"spec.{path}")]
    for suspended, job in stored.items():
        changed = with_value(job, path, another(path, LEAVES[path], value_of(job, path)))
        where = f"{JOBS}/{job['metadata']['name']}?dryRun=All"
        code, answer = api.send("PUT", where, changed)
        assert code == (200 if suspended in allowed else 422), (suspended, answer["message"])
        if code == 422:
            (cause,) = answer["details"]["causes"]
            assert f"spec.{path}".startswith(cause["field"]), cause
            assert cause["reason"] == "FieldValueForbidden"


def test_a_valid_job_is_taken(api: Api) -> None:
    assert api.send("POST", f"{JOBS}?dryRun=All", VALID)[0] == 201


@pytest.mark.parametrize("breaker", BREAKERS, ids=lambda breaker: breaker.name)
def test_every_rule_is_the_servers_too(api: Api, breaker: Breaker) -> None:
    code, answer = api.send("POST", f"{JOBS}?dryRun=All", breaker.manifest())
    assert code == 422, answer
    assert rule_of(breaker).message in answer["message"]


def test_every_rule_has_its_breaker() -> None:
    assert {breaker.rule for breaker in BREAKERS} == set(range(len(RULES)))


def test_a_long_job_is_taken(api: Api) -> None:
    """All lists full: the server's limit on the cost of rules holds at run time, too."""
    job = copy.deepcopy(VALID)
    served = [{"name": f"r{number}", "placement": "service"} for number in range(32)]
    job["spec"]["rewards"] = served
    job["spec"]["compute"]["rewardPods"] = [{"reward": reward["name"]} for reward in served]
    env = [{"name": f"V{number}", "value": "x" * 4000} for number in range(64)]
    volumes = [
        {"name": f"v{number}", "mountPath": f"/v{number}", "emptyDir": "1Gi"}
        for number in range(16)
    ]
    labels = {f"l{number}": "x" for number in range(32)}
    job["spec"]["compute"]["podTemplate"] = {"env": env, "volumes": volumes, "labels": labels}
    code, answer = api.send("POST", f"{JOBS}?dryRun=All", job)
    assert code == 201, answer


def test_objects_of_an_attempt_are_taken_as_they_are(api: Api) -> None:
    """No field is dropped or refused, however much a job asks for."""
    places = {
        "Service": "/api/v1/namespaces/default/services",
        "ConfigMap": "/api/v1/namespaces/default/configmaps",
        "Job": "/apis/batch/v1/namespaces/default/jobs",
        "Deployment": "/apis/apps/v1/namespaces/default/deployments",
        "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies",
    }
    for job in (make_job(), ASKING, SERVED):
        attempt = desired.AttemptOf(
            job="demo", namespace="default", uid="1" * 36, spec=job.spec_only(), number=1
        )
        for thing in desired.objects(attempt, Pods(image="trainer:1")):
            where = f"{places[thing['kind']]}?dryRun=All&fieldValidation=Strict"
            code, answer = api.send("POST", where, thing)
            assert code == 201, answer


def test_the_s3_server_of_the_pages_is_taken(bare_server: Bare) -> None:
    """By a namespace that wants restricted pods, too."""
    admin, namespace = bare_server.kubectl, "trial"
    admin.run("create", "namespace", namespace)
    admin.run("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    documents = list(yaml.safe_load_all(S3_SERVER.read_text()))
    (deployment,) = (one for one in documents if one["kind"] == "Deployment")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "s3"}}
    pod["spec"] = deployment["spec"]["template"]["spec"]
    taken = admin.run(
        *("apply", "--dry-run=server", "-n", namespace, "-f", "-"),
        stdin=yaml.safe_dump_all([*documents, pod]),
    )
    assert taken.count("(server dry run)") == len(documents) + 1
