"""Names that more than one part of the system has to spell alike."""

GROUP = "tempflow.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "TempFlowGRPOJob"
PLURAL = "tempflowgrpojobs"
SHORT_NAME = "tfgrpo"
CATEGORY = "tempflow"

LABEL_JOB_NAME = f"{GROUP}/job-name"
LABEL_JOB_UID = f"{GROUP}/job-uid"
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_ROLE = f"{GROUP}/role"
ROLE_TRAINER = "trainer"
ROLE_REWARD = "reward"
LABEL_REWARD = f"{GROUP}/reward"
ROLE_READER = "reader"

POD_INDEX = "batch.kubernetes.io/job-completion-index"
"""The rank of a pod's node; the Job controller's name for both an annotation and a label."""

TRAINER_CONTAINER = "trainer"
REWARD_CONTAINER = "reward"
FIELD_MANAGER = "tempflow-operator"

# Environment of the trainer's container, set by the operator or by ``tempflow run``.
ENV_JOB_FILE = "TEMPFLOW_JOB_FILE"
ENV_ATTEMPT = "TEMPFLOW_ATTEMPT"
ENV_NODE_RANK = "TEMPFLOW_NODE_RANK"
ENV_MASTER_ADDR = "TEMPFLOW_MASTER_ADDR"
ENV_MASTER_PORT = "TEMPFLOW_MASTER_PORT"
ENV_PROGRESS_PORT = "TEMPFLOW_PROGRESS_PORT"
ENV_WORK_DIR = "TEMPFLOW_WORK_DIR"
ENV_RUN_ID = "TEMPFLOW_RUN_ID"
ENV_MODEL_CACHE = "TEMPFLOW_MODEL_CACHE"
# JSON: the address of each reward with ``placement: service``, by the reward's name.
ENV_REWARD_ENDPOINTS = "TEMPFLOW_REWARD_ENDPOINTS"

START_MODULE = "tempflow_trainer.start"
"""``python -m`` this runs the ``main`` of the trainer's module that is named next."""

# A pod that reads a store for somebody outside the cluster: what it is told, and where it answers.
ENV_STORE = "TEMPFLOW_STORE"
"""``spec.checkpoint`` as JSON, whose ``uri`` is the address of the run itself."""
READER_MODULE = "tempflow_trainer.reader"
READER_PORT = 8081
READER_READY, READER_FILES, READER_CONTENT, READER_PROBE = "/ready", "/files", "/content", "/probe"

OPERATOR = f"{GROUP}/operator"
"""This operator, as ``spec.managedBy`` and events name it."""

MASTER_PORT = 29500
PROGRESS_PORT = 8080
PROGRESS_PATH = "/progress"
REWARD_PORT = 8090


def attempt_name(job_name: str, attempt: int) -> str:
    """Name of the Job, Service and ConfigMap of one attempt, counted from 1."""
    return f"{job_name}-a{attempt}"


def reward_name(job_name: str, attempt: int, position: int) -> str:
    """Name of the Deployment and Service of the reward at that position in ``spec.rewards``: with
    the reward's own name a Service's could be too long."""
    return f"{attempt_name(job_name, attempt)}-r{position}"


def rank_zero_host(job_name: str, attempt: int, namespace: str) -> str:
    """Host name of the pod with completion index 0, resolved through the headless Service."""
    name = attempt_name(job_name, attempt)
    return f"{name}-0.{name}.{namespace}.svc"


def run_folder(namespace: str | None, job_name: str, uid: str | None) -> str:
    """Where a run lives below ``spec.checkpoint.uri``.

    A job on a cluster is told apart by its UID, so that a new job of the same name starts anew; a
    local run is its name alone, so that the same command continues it.
    """
    if uid is None:
        return job_name
    return f"{namespace or 'default'}/{job_name}-{uid[:8]}"
