"""``TempFlowGRPOJob``: the specification of a run. With ``method.py``, the sections that say how
images are drawn and learned from, and ``pods.py`` the only place to edit the API.

The custom resource definition, the reference documentation and the checks of the command line,
the operator and the trainer are derived from these classes. Rules across fields are in
``rules.py``, the observed state is in ``status.py``.

Every number that the reference implementation of the paper writes into its code is a field here;
the default is the paper's unless the description says otherwise. Two numbers are not fields: the
weight constant (2.25, 1.73, 1.53) is computed from the schedule in use, and the shift of the
schedule comes from the model's own scheduler configuration.
"""

from typing import Annotated, Literal

from pydantic import Field

from tempflow_api.base import Name, PositiveInt, Prompt, Quantity, Section, Uri
from tempflow_api.method import Advantage as Advantage
from tempflow_api.method import Algorithm as Algorithm
from tempflow_api.method import BranchSet as BranchSet
from tempflow_api.method import Sampling as Sampling
from tempflow_api.method import Tail as Tail
from tempflow_api.pods import ModelCache, Network, PodTemplate, RewardPods
from tempflow_api.status import JobStatus
from tempflow_api.storage import Checkpoint, InitFrom

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Lora(Section):
    """A low-rank update of the named projections; the model itself stays frozen."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 32
    """Width of the update. The paper uses 32 for SD3.5 and FLUX.1, 64 for Qwen-Image."""
    alpha: Annotated[int, Field(ge=1, le=4096)] = 64
    """The update is scaled by alpha / rank."""
    targets: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=64)
    ] = []
    """Names of the projections, matched at the end of the module path, or between slashes a
    regular expression for the whole path: ``/single_.*to_out/``. An empty list takes the family's
    own, as the paper's code adapts them. A target that matches nothing is an error."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """How the first factor starts; the second one starts at zero, so the update starts at none."""


class Ema(Section):
    """An average of the trained weights; evaluation and the exported result use it."""

    decay: Fraction = 0.9
    """Upper bound of the decay, warmed up as (1 + s) / (10 + s) over updates s. At 0 the average
    is the trained weights themselves."""
    every_updates: PositiveInt = 8
    """Updates of the weights between two updates of the average."""


class Model(Section):
    """What is trained, and which part of it."""

    family: Literal["digits", "sd3", "flux", "qwen-image", "flux2-klein"]
    """The adapter that knows how to encode, schedule, run and decode the model. ``sd3`` covers
    SD3 and SD3.5, ``flux`` FLUX.1, ``flux2-klein`` FLUX.2 klein, ``digits`` the small model that
    ships with the package."""
    source: Uri
    """``builtin:digits``, a local folder, ``s3://bucket/prefix``, or a Hugging Face id
    (``owner/name``). A folder has the diffusers layout."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Commit, tag or branch of a Hugging Face id."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the network's frozen weights and of its activations. The stochastic step,
    log-probabilities, advantages, the trained weights and the optimizer are float32 always, so
    with full tuning this is the precision of the text encoders and the autoencoder only. float16
    resolves log-probabilities eight times finer than bfloat16, but SD3 fits into its range and
    FLUX.1 and Qwen-Image do not; its gradients are scaled by a fixed power of two."""
    max_text_tokens: Annotated[int, Field(ge=1, le=4096)] = 128
    """Longest prompt that the long text encoder reads; what is beyond is cut."""
    tuning: Literal["lora", "full"]
    """Train a low-rank update (``lora``, described in ``spec.model.lora``) or every weight of the
    transformer."""
    lora: Lora | None = None
    """Present exactly when tuning is ``lora``."""
    ema: Ema = Ema()


class Data(Section):
    """The prompts. Exactly one of the two fields is given."""

    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=1000)] | None = None
    """Prompts written into the manifest."""
    prompts_file: Uri | None = None
    """A path, relative to the manifest, or ``s3://``: one prompt a line (``.txt``), JSON lines
    (``.jsonl``) with ``prompt`` and any further keys, which rewards read as metadata, or the
    folder of one split of a dataset that ``datasets`` has saved to disk, with such columns."""
    prompts_config_map: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """On a cluster, a ConfigMap in the job's namespace whose key ``promptsFile`` is the file;
    ``tempflow submit`` makes it of a local file."""
    shuffle: bool = True
    """Draw the prompts of each pass in a new random order; else in the order of the file."""


class RewardService(Section):
    """Where a reward is served over HTTP, and how long to wait for it."""

    endpoints: Annotated[
        list[Annotated[str, Field(max_length=1024, pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$")]],
        Field(max_length=64),
    ] = []
    """Addresses of servers that all serve this reward; each request goes to the least busy one.
    None with ``placement: service``: the operator knows the address."""
    token_variable: (
        Annotated[str, Field(max_length=253, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None
    ) = None
    """Environment variable with the bearer token that the servers ask for; on a cluster from the
    Secret of ``spec.compute.secretName``. The token itself never stands in a manifest."""
    timeout_seconds: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """Of one request; a slow model takes seconds for 32 images. Then another attempt is made."""
    deadline_seconds: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """Of a batch with all attempts; after it the batch has no score. Ten minutes let a server
    restart and load a large model. With ``placement: service`` also how long the run waits at its
    start for the first answer."""
    images_per_request: Annotated[int, Field(ge=1, le=4096)] = 32
    """Most images in one request; 32 of 512 x 512 are 15 MiB as PNG."""
    requests_per_endpoint: Annotated[int, Field(ge=1, le=64)] = 2
    """Requests of a rank under way at once: one is scored while the next one travels, where a call
    draws more images than ``imagesPerRequest``. The pods behind one address share them."""
    image_format: Literal["png", "webp"] = "png"
    """Both without loss. WebP is smaller and takes longer to write: for slow networks."""


class RewardTerm(Section):
    """One scorer and its share in the reward."""

    name: Name
    """What the reward is called in metrics; without ``uses`` also which one it is."""
    uses: (
        Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9_][\w.-]*(:\w+)?$")]
        | None
    ) = None
    """The scorer: the name of a built-in reward, of an entry point of the group
    ``tempflow.rewards`` in an installed package, or ``module:Class``. Without it the name decides.
    One that does not exist is an error that lists them all."""
    weight: Annotated[float, Field(ge=-1000, le=1000)] = 1.0
    """Share in the reward, see ``spec.algorithm.advantage.combination``. A term of weight 0 is
    held out: scored at evaluations and shown, never trained on."""
    required: bool = True
    """What follows from a missing score. Of a required reward: the group of draws that the image
    is compared with is left out of the update. Of another one: the image counts as the mean of
    its group in this reward. Both are counted. A required reward that fails as a whole ends the
    run."""
    parameters: Annotated[
        dict[str, Annotated[str, Field(max_length=1024)]], Field(max_length=32)
    ] = {}
    """Settings of the scorer, as strings."""
    placement: Literal["trainer", "service"] = "trainer"
    """``service``: on a cluster the operator starts pods for each attempt that serve this reward,
    as ``spec.compute.rewardPods`` says. ``trainer``: it starts nothing, and the reward is scored in
    the trainer's processes, or by a service that is there already."""
    service: RewardService | None = None
    """How a service is asked; with ``endpoints`` one that is there already, instead of scoring in
    the trainer's processes."""

    @property
    def is_served(self) -> bool:
        """Whether its scores come over HTTP."""
        return self.placement == "service" or self.service is not None


class Package(Section):
    """Code of your own, in the form in which Python ships it."""

    uri: Annotated[str, Field(max_length=1024, pattern=r"^s3://[a-z0-9][a-z0-9.-]+/.+\.whl$")]
    """``s3://bucket/….whl``: a wheel of pure Python, in the store that ``spec.checkpoint``
    describes. What it requires has to be in the trainer's image, or in another of these."""
    sha256: Annotated[str, Field(max_length=64, pattern=r"^[0-9a-f]{64}$")]
    """Of the wheel, as ``sha256sum`` prints it: what was tried is what runs, and nothing else."""


class Optimizer(Section):
    """AdamW."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 3e-4
    """For a LoRA; training every weight wants a tenth of it or less. Small models bear more."""
    beta1: Fraction = 0.9
    """Decay of the mean of the gradients; the usual value, as in Flow-GRPO's code."""
    beta2: Fraction = 0.999
    """Decay of the mean of their squares; the usual value, as in Flow-GRPO's code."""
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Added to the root of the mean square; the usual value."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-4
    """Pulls the trained weights, so the LoRA's update, towards zero; hardly felt by default."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Gradients are scaled down to this norm; the norm before is reported."""


class Evaluation(Section):
    """Images from fixed noise, scored by every reward, also by those held out."""

    every_epochs: PositiveInt = 20
    """Also before the first epoch and after the last."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 40
    """Denoising steps, all deterministic."""
    width: Annotated[int, Field(ge=8, le=8192)] | None = None
    """Pixels; those of ``sampling`` if absent."""
    height: Annotated[int, Field(ge=8, le=8192)] | None = None
    """Pixels; those of ``sampling`` if absent."""
    guidance_scale: Annotated[float, Field(ge=1, le=100)] | None = None
    """That of ``sampling`` if absent. Training without guidance wants an evaluation without it,
    too; pictures for people may want more."""
    prompts: Annotated[int, Field(ge=1, le=10_000)] = 16
    """At most so many of the prompts, from the top of the list."""
    images_per_prompt: Annotated[int, Field(ge=1, le=1000)] = 4
    """Drawn of each prompt, from noises that stay the same. Diversity needs two; with more, reward
    and diversity are less a matter of chance."""


class SelfTest(Section):
    """A test of model, precision and shapes before the first epoch; it changes nothing."""

    enabled: bool = True
    """It costs two trajectories and a few calls of the network."""
    log_prob_tolerance: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Most that a log-probability may differ between rollout and update, and with the number of
    rows in a call, as a share of ``algorithm.clipRange``; beyond that the run does not start. A
    tenth is for float32. Half precision rounds calls of different sizes differently, by as much as
    the clip range; no ratio has that in it, as both its sides come from the update's own calls,
    and a real fault is a hundred times larger. Ten leaves room for the one and finds the other."""


class Guard(Section):
    """Alarms about a run that is going wrong, after every epoch and evaluation. At 0 a signal is
    not watched."""

    action: Literal["warn", "stop", "rollback"] = "warn"
    """``warn`` tells it in log, metrics and progress. ``stop`` ends the run. ``rollback`` goes
    back to the newest checkpoint, which no alarm preceded, with a smaller learning rate."""
    ratio_drift: Annotated[float, Field(ge=0, le=1e9)] = 10.0
    """Alarm when the mean of |ratio - 1| is more than so many times the clip range: steps are too
    long, or the range is not made for latents of this size. With one update an epoch the ratio
    is always 1, and the other signals have to do."""
    grad_norm: Annotated[float, Field(ge=0, le=1e9)] = 10.0
    """Alarm when the gradient norm before clipping is more than so many times its median over
    the last 20 epochs; it usually stays within twice."""
    zero_spread_share: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Alarm when the share of groups without spread is at least this, three epochs in a row:
    there is nothing left to learn from, or all images are alike."""
    reward_drop: Annotated[float, Field(ge=0, le=1e9)] = 3.0
    """Alarm when the reward of an epoch is below that of the first epoch by more than so many of
    the first epoch's standard deviations."""
    held_out_drop: Annotated[float, Field(ge=0, le=1e9)] = 1.0
    """Alarm when a held-out reward is below its first evaluation by more than so many of its
    standard deviations then: the trained reward is being hacked."""
    learning_rate_factor: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Multiplies the learning rate at each rollback: the same steps would end the same way."""
    max_rollbacks: Annotated[int, Field(ge=1, le=100)] = 3
    """One more ends the run."""


class Compute(Section):
    """Where the run is computed. Nothing here changes what is learned."""

    device: Literal["cuda", "cpu"]
    """Asked for and absent is an error: there is no quiet fallback."""
    nodes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Pods; 1 with ``tempflow run``."""
    processes_per_node: Annotated[int, Field(ge=1, le=64)] = 1
    """One a GPU with ``cuda``."""
    strategy: Literal["replicate", "shard"] = "replicate"
    """``replicate``: every process holds all weights, and gradients are summed once an update.
    ``shard``: each holds its share of the weights, gradients and optimizer, and gathers a block
    while it runs (FSDP2): for models that do not fit otherwise, at the price of traffic. The
    result is the same, and a run may change it when it continues."""
    rows_per_call: Annotated[int, Field(ge=1, le=65_536)] = 64
    """Most latents in one call of the network without gradient: bounds the memory of a rollout."""
    groups_per_rollout: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """(Prompt, seed) pairs that a process draws at once; they are scored while the next ones are
    drawn. Without it all of them, or an eighth where a reward is served, so that an eighth
    of its time is waited for. It may move results by a rounding error, as rowsPerCall may."""
    rows_per_training_call: Annotated[int, Field(ge=1, le=65_536)] = 8
    """Most (seed, step) pairs in one call with gradient."""
    rows_per_decode: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Most latents that the autoencoder decodes at once; without it as many as rowsPerCall. Its
    activations are the largest of a rollout at high resolution."""
    tiled_decode: bool = False
    """Decode an image larger than the autoencoder was made for in overlapping tiles: its memory
    no longer grows with the resolution. The seams are blended, which changes pixels a little."""
    gradient_checkpointing: bool = False
    """Keep only the input of each block for the backward and compute the rest again: a third more
    work for an update, a fraction of its memory."""
    text_cache_mebibytes: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Host memory for encoded prompts, a process. Above 0 a prompt that is kept is not encoded
    again, and the text encoders stay in host memory while they are idle. 0 keeps them on the
    device and encodes the prompts of every epoch."""
    image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Container image of the trainer on a cluster; the operator has a default."""
    cpu: Quantity | None = None
    """Requested processors a pod."""
    memory: Quantity | None = None
    """Requested and limiting memory a pod."""
    shared_memory: Quantity = "2Gi"
    """Size of /dev/shm in a pod; counted in its memory limit."""
    secret_name: Annotated[str, Field(max_length=253)] | None = None
    """A Secret whose keys become environment variables of the trainer: the credentials of the
    store and of the model hub."""
    gpu_resource: Annotated[
        str, Field(max_length=128, pattern=r"^[a-z0-9.-]+/[A-Za-z0-9_.-]+$")
    ] = "nvidia.com/gpu"
    """Under which name nodes offer their GPUs; a slice of one has a name of its own."""
    gpus_per_process: Annotated[int, Field(ge=0, le=64)] | None = None
    """GPUs requested for each process. Left out: one with ``cuda``, none with ``cpu``."""
    extended_resources: Annotated[
        dict[str, Annotated[int, Field(ge=1, le=1_000_000)]], Field(max_length=8)
    ] = {}
    """What else a pod needs of its node by number, for instance ``rdma/ib: 8`` or
    ``vpc.amazonaws.com/efa: 4``."""
    network: Network = Network()
    pod_template: PodTemplate = PodTemplate()
    reward_pods: Annotated[list[RewardPods], Field(max_length=32)] = []
    """What the pods of rewards with ``placement: service`` need; one that is not listed gets a
    single pod without a GPU."""
    preflight: bool = False
    """Check GPUs, driver, /dev/shm, an all-reduce and the store before the model is loaded. A
    failed check uses none of runPolicy.maxRestarts, but one of maxPreflightRestarts."""


class RunPolicy(Section):
    """What the operator does about time and failure. ``tempflow run`` does not restart."""

    suspend: bool = False
    """Stop after a checkpoint and hold no resources until it is false again."""
    cancel: bool = False
    """Stop after a checkpoint and end the job as failed, for good; its records and checkpoints
    stay. Setting it to false again does not bring the job back."""
    queue: (
        Annotated[
            str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
        ]
        | None
    ) = None
    """A local queue of Kueue in the job's namespace. Each attempt is then created suspended, and
    the queue admits it, takes it back and admits it again; time in the queue counts towards
    nothing."""
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 3
    """Attempts after the first that failures may use; a disruption by the cluster uses none."""
    max_preflight_restarts: Annotated[int, Field(ge=0, le=1000)] = 20
    """Attempts after the first that failed checks of ``compute.preflight`` may use: with the pauses
    between them, 20 give about 80 minutes to repair a node or take it out of service."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    """The job fails when it has been active for so long."""
    pre_running_deadline_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    """The job fails when the pods of an attempt, once admitted, do not all run after so long: a
    missing image or a request that no node can meet does not get better with time."""
    stall_timeout_seconds: Annotated[int, Field(ge=30, le=31_536_000)] | None = None
    """An attempt whose progress has not moved for so long is ended as a failure. Longer than the
    longest evaluation and than loading the model take; writing a checkpoint never counts."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=31_536_000)] | None = None
    """The job is deleted so long after its end. Checkpoints stay."""
    termination_grace_period_seconds: Annotated[int, Field(ge=15, le=86_400)] = 120
    """Between the request to stop and the kill: time for a last checkpoint."""


class Wandb(Section):
    """A run of Weights & Biases. The key comes from the environment or ``compute.secretName``, as
    ``WANDB_API_KEY``."""

    project: Annotated[str, Field(min_length=1, max_length=128)] = "tempflow"
    """Where the run is listed."""
    entity: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Team or user; the key's own if absent."""
    mode: Literal["online", "offline"] = "online"
    """``offline`` writes below ``record/wandb``, to be sent by ``wandb sync``."""


class Tracking(Section):
    """What is recorded beside the metrics, which always go to ``record/metrics.jsonl``."""

    image_grids: bool = True
    """Write a picture of each evaluation to ``record/grids``."""
    tensorboard: bool = False
    """Write event files to ``record/tensorboard``; needs the extra ``tensorboard``."""
    wandb: Wandb | None = None
    """Follow the run in Weights & Biases; needs the extra ``wandb``."""


class JobSpec(Section):
    """A run of TempFlow-GRPO."""

    model: Model
    data: Data
    sampling: Sampling = Sampling()
    algorithm: Algorithm = Algorithm()
    rewards: Annotated[list[RewardTerm], Field(min_length=1, max_length=32)]
    """Scorers, by unique name; at least one with a weight."""
    packages: Annotated[list[Package], Field(max_length=16)] = []
    """Wheels that every process can import from, for instance with rewards in them; the first one
    wins."""
    optimizer: Optimizer = Optimizer()
    evaluation: Evaluation = Evaluation()
    self_test: SelfTest = SelfTest()
    guard: Guard = Guard()
    checkpoint: Checkpoint = Checkpoint()
    init_from: InitFrom | None = None
    """Absent: the run starts from the model itself."""
    compute: Compute
    model_cache: ModelCache = ModelCache()
    run_policy: RunPolicy = RunPolicy()
    managed_by: (
        Annotated[str, Field(max_length=63, pattern=r"^[a-z0-9.-]+/[A-Za-z0-9_./-]+$")] | None
    ) = None
    """Who looks after the job, for instance ``kueue.x-k8s.io/multikueue``. Left out, or
    ``tempflow.dev/operator``: this operator. With any other value it does nothing at all."""
    tracking: Tracking = Tracking()


class ObjectMeta(Section):
    """The part of Kubernetes' metadata that a manifest written by hand has."""

    name: Annotated[
        str, Field(min_length=1, max_length=45, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    ]
    """Becomes part of host names, so at most 45 characters: lower-case letters, digits, '-'."""
    namespace: Name | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class TempFlowGRPOJob(Section):
    """A manifest as people write it, and the object as the API server stores it."""

    api_version: Literal["tempflow.dev/v1alpha1"]
    kind: Literal["TempFlowGRPOJob"]
    metadata: ObjectMeta
    spec: JobSpec
    status: JobStatus | None = None
    """Written by the operator; ignored in a manifest."""
