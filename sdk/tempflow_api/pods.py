"""What a job may ask of its pods beyond what training needs: a fixed list, merged into each pod.

Kubernetes' own pod template has some two hundred fields. These are the ones that clusters differ
in; each is typed, so that the API server refuses what is wrong and sees what has changed.
"""

from typing import Annotated, Literal

from pydantic import Field

from tempflow_api.base import Name, Quantity, Section, Text

Key = Annotated[str, Field(min_length=1, max_length=317)]
"""Of a label, an annotation or a taint: ``name`` or ``domain/name``."""
Labels = Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=32)]
Annotations = Annotated[dict[str, Text], Field(max_length=32)]


class Toleration(Section):
    """A taint that does not keep the pods away, in the words of Kubernetes."""

    key: Key | None = None
    """Of the taint; without it all taints are meant, and operator is Exists."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """Whether the taint's value matters."""
    value: Annotated[str, Field(max_length=63)] = ""
    """Of the taint, with Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Which effect is tolerated; left out: all."""
    toleration_seconds: Annotated[int, Field(ge=0, le=86_400)] | None = None
    """With NoExecute: how long a pod stays."""


class NodeRequirement(Section):
    """What a node's labels have to be; all requirements hold together."""

    key: Key
    """Of the label."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = "In"
    """How the label's value is compared with values."""
    values: Annotated[list[Annotated[str, Field(max_length=63)]], Field(max_length=64)] = []
    """Empty with Exists and DoesNotExist, one number with Gt and Lt."""


class Variable(Section):
    """A variable of the trainer's environment. A secret does not belong here: see secretName."""

    name: Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    """Of the variable."""
    value: Annotated[str, Field(max_length=4096)]
    """Taken as it is."""


class Volume(Section):
    """A volume of the trainer's container. Exactly one source is given."""

    name: Annotated[
        str, Field(min_length=1, max_length=50, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    ]
    """Among the volumes of this list."""
    mount_path: Annotated[str, Field(max_length=512, pattern=r"^/[^:]+$")]
    """Where the trainer finds it."""
    read_only: bool = True
    """What training writes belongs into the checkpoint store."""
    persistent_volume_claim: Name | None = None
    """Name of a claim in the job's namespace."""
    config_map: Name | None = None
    """Name of a ConfigMap in the job's namespace."""
    secret: Name | None = None
    """Name of a Secret in the job's namespace, of which each key becomes a file."""
    empty_dir: Quantity | None = None
    """Size of an empty volume that lives as long as the pod."""


class PodTemplate(Section):
    """Merged into the template of every pod of the job, as kubectl's strategic merge would: maps by
    key, lists by name."""

    labels: Labels = {}
    """Further labels of the pods."""
    annotations: Annotations = {}
    """Annotations of the pods."""
    node_selector: Labels = {}
    """Labels that a node must have."""
    node_requirements: Annotated[list[NodeRequirement], Field(max_length=16)] = []
    """Beyond nodeSelector: becomes the required node affinity."""
    same_domain: Key | None = None
    """Key of a node label, for instance ``topology.kubernetes.io/zone``: all ranks of an attempt go
    to nodes with the same value of it, so that they are close to one another."""
    tolerations: Annotated[list[Toleration], Field(max_length=16)] = []
    """Taints that do not keep the pods away, beside those of nodes that are not ready."""
    priority_class_name: Annotated[str, Field(max_length=253)] | None = None
    """Which pods give way when nodes are full."""
    service_account_name: Annotated[str, Field(max_length=253)] | None = None
    """For clouds that give a pod its access to the store by its service account. Its token for
    Kubernetes itself is not mounted all the same."""
    scheduler_name: Annotated[str, Field(max_length=253)] | None = None
    """Another scheduler than the cluster's own."""
    runtime_class_name: Annotated[str, Field(max_length=253)] | None = None
    """How nodes run the container, for instance ``nvidia``."""
    image_pull_secrets: Annotated[
        list[Annotated[str, Field(max_length=253)]], Field(max_length=8)
    ] = []
    """Secrets in the job's namespace with credentials for the image's registry."""
    env: Annotated[list[Variable], Field(max_length=64)] = []
    """Further variables of the trainer's environment; they override those of network."""
    volumes: Annotated[list[Volume], Field(max_length=16)] = []
    """Further volumes of the trainer's container."""


class RewardPods(Section):
    """The pods that serve one reward to the job. ``podTemplate`` holds for them too, all but its
    ``sameDomain``."""

    reward: Name
    """Name of a reward with ``placement: service``."""
    replicas: Annotated[int, Field(ge=1, le=64)] = 1
    """Pods; the connections of the ranks are spread over them."""
    device: Literal["cuda", "cpu"] = "cpu"
    """Where the model computes. With ``cuda`` each pod gets one GPU, of ``compute.gpuResource``."""
    cpu: Quantity | None = None
    """Requested processors a pod."""
    memory: Quantity | None = None
    """Requested and limiting memory a pod."""
    image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """An image of the trainer with what this reward needs beyond it; without it the trainer's."""


class Network(Section):
    """How the pods of a job reach one another, and whom else."""

    preset: Literal["default", "tcp", "ib", "efa"] = "default"
    """Variables of NCCL. ``default`` leaves it to find out; ``tcp`` uses plain sockets even where
    it believes to see InfiniBand; ``ib`` and ``efa`` insist on that hardware, so that its absence
    is an error instead of a slow run. They need its devices in extendedResources."""
    interface: Annotated[str, Field(max_length=64, pattern=r"^[\^=]?[A-Za-z0-9_.,-]+$")] | None = (
        None
    )
    """Network interfaces that ranks use, as in NCCL_SOCKET_IFNAME; where pods have several."""
    policy: bool = False
    """Create a NetworkPolicy: pods of the job reach one another, DNS, and the ports of the store
    and of HTTPS; the operator reaches the progress port; nothing else reaches them."""


class ModelCache(Section):
    """Where downloaded models are kept. At most one field is given; with none, each pod downloads
    its model anew."""

    persistent_volume_claim: Name | None = None
    """A claim in the job's namespace. With more than one node, or with a reward of ``placement:
    service``, it has to be ReadWriteMany."""
    host_path: Annotated[str, Field(max_length=512, pattern=r"^/[^:]+$")] | None = None
    """A folder of the node, which has to be writable for user 65532. Namespaces that enforce Pod
    Security refuse it."""
    empty_dir: Quantity | None = None
    """Size of a volume that lives as long as the pod: bounds what a download may take."""
