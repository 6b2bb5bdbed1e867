"""The areas of the settings: one frozen model each. Every field says why, its unit, and what None means."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    IPvAnyAddress,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    field_validator,
    model_validator,
)

from configs.base import Area, Probability, Share


class ObjectStoreSettings(Area):
    """Where models, data and reports are kept: any S3 service."""

    endpoint_url: str | None = Field(default=None, description="Address of the S3 service. None means AWS itself.")
    region: str = Field(default="us-east-1", description="Region that requests are signed for.")
    access_key_id: str | None = Field(default=None, description="None lets boto3 find credentials (role, profile).")
    secret_access_key: SecretStr | None = Field(default=None, description="Belongs to access_key_id.")
    models_bucket: str = Field(
        default="khet-guard-models", description="Versions, aliases, leases and release records."
    )
    data_bucket: str = Field(default="khet-guard-data", description="Training sets and the inference log.")
    create_buckets: bool = Field(
        default=False, description="Make missing buckets. Off in production: they are provisioned."
    )
    connect_timeout_s: PositiveFloat = Field(default=3.0, description="Time to open a connection.")
    read_timeout_s: PositiveFloat = Field(
        default=20.0, description="Silence on a connection after which a call is retried."
    )
    max_attempts: PositiveInt = Field(default=4, description="Tries of one request inside the client.")
    patience_s: NonNegativeFloat = Field(
        default=60.0, description="How long a step goes on retrying an unreachable store before it fails."
    )
    upload_threads: PositiveInt = Field(default=16, description="Objects in flight when a folder is copied.")


class DatabaseSettings(Area):
    """PostgreSQL: audit log, and later users, scans, feedback, incidents."""

    dsn: SecretStr | None = Field(
        default=None, description="libpq connection string. None: audit goes to the spool file only."
    )
    connect_timeout_s: PositiveInt = Field(default=5, description="Time to connect.")


class OrchestratorSettings(Area):
    """The Prefect server that flows report to."""

    api_url: str | None = Field(
        default=None, description="Prefect API. None: an ephemeral server in the flow's process."
    )
    auth_string: SecretStr | None = Field(
        default=None, description="user:password of the API. None: the API asks for none."
    )
    work_pool: str = Field(default="default", description="Work pool of the deployments.")
    train_pool: str | None = Field(
        default=None, description="Work pool of the deployment `train`, whose runs need GPUs. None: work_pool."
    )
    heartbeat_s: PositiveInt = Field(
        default=30, description="Heartbeat of flow runs; three missed ones mark a run crashed."
    )
    approval_timeout_s: PositiveInt = Field(
        default=3600, description="An unanswered approval counts as no after this long."
    )


class ServingSettings(Area):
    """One replica of the model's HTTP service."""

    threads: PositiveInt = Field(default=2, description="Requests decoded and predicted at the same time.")
    max_waiting: NonNegativeInt = Field(
        default=64, description="Requests that may wait for a thread; more get 503 + Retry-After."
    )
    onnx_threads: PositiveInt = Field(default=1, description="Threads onnxruntime uses for one request.")
    max_body_bytes: PositiveInt = Field(default=12_000_000, description="Largest request body; more gets 413.")
    max_pixels: PositiveInt = Field(
        default=50_000_000, description="Largest width x height; more gets 413 before it is decoded."
    )
    min_side_px: PositiveInt = Field(default=16, description="Shorter images get 422.")
    body_timeout_s: PositiveFloat = Field(default=15.0, description="Time a client has to send its body; then 408.")
    top_k: PositiveInt = Field(default=3, description="Classes listed in an answer.")
    drain_s: PositiveFloat = Field(default=10.0, description="After SIGTERM requests in flight may take this long.")
    log_predictions: bool = Field(default=True, description="Write one Parquet row a prediction to the data bucket.")
    log_batch_rows: PositiveInt = Field(default=500, description="Rows in one Parquet object at most.")
    log_flush_s: PositiveFloat = Field(default=5.0, description="Age at which a smaller batch is written anyway.")
    spool_max_bytes: PositiveInt = Field(
        default=200_000_000, description="Disk used for batches the store did not take; then the oldest go."
    )
    cache_dir: Path | None = Field(
        default=None, description="Verified model files and the spool. None: below the home folder."
    )


class RegistrySettings(Area):
    """Who signs and who is trusted."""

    signing_key: Path | None = Field(
        default=None, description="Ed25519 private key (PEM). None: this process cannot publish."
    )
    trusted_keys: tuple[Path, ...] = Field(
        default=(), description="Ed25519 public keys (PEM) whose signatures are accepted."
    )
    keep_work_folders: PositiveInt = Field(
        default=5, description="Newest releases whose checkpoints and logs stay on this machine after a promotion."
    )


class KubernetesSettings(Area):
    """A Kubernetes cluster, and the pods that serve there. Quantities are Kubernetes' own (500m, 1Gi)."""

    kubeconfig: Path | None = Field(
        default=None, description="None: the pod's own service account, else what kubectl would use."
    )
    context: str | None = Field(default=None, description="Context of the kubeconfig. None: its current one.")
    namespace: str = Field(default="khet-guard", description="Everything of the service is in this namespace.")
    service: str = Field(
        default="ml-service", description="Deployment and Service of users' traffic; names of the others begin with it."
    )
    image: str = Field(default="ghcr.io/khet-guard/serving:v0.1.0", description="Image that replicas run.")
    command: tuple[str, ...] = Field(default=(), description="Program in the image. Empty: the image's entry point.")
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = Field(
        default="IfNotPresent", description="When nodes pull the image."
    )
    pull_secret: str | None = Field(default=None, description="Secret to pull with. None: the node's own credentials.")
    service_account: str | None = Field(
        default=None, description="Of the replicas, without a token in them. None: the namespace's default."
    )
    config_map: str = Field(
        default="ml-service", description="Mounted at /etc/khet where it exists; its settings.yaml is the replicas'."
    )
    object_store_secret: str = Field(
        default="ml-secrets",
        description="Secret whose keys object-store-access-key and object-store-secret-key the replicas get, if any.",
    )
    requests: dict[str, str] = Field(
        default={"cpu": "250m", "memory": "512Mi"}, description="What a replica is promised; `room` counts by it."
    )
    limits: dict[str, str] = Field(default={"cpu": "2", "memory": "1Gi"}, description="What a replica may use at most.")
    traffic: Literal["auto", "gateway-api", "replica-ratio"] = Field(
        default="auto",
        description="Who splits traffic. auto: the Gateway API where `gateway` is set and the cluster serves it, "
        "else the number of pods behind the Service.",
    )
    gateway: str | None = Field(
        default=None, description="Gateway that the HTTPRoute attaches to, NAME or NAMESPACE/NAME. None: there is none."
    )
    metrics_from: Literal["auto", "pods", "api-server"] = Field(
        default="auto",
        description="Where replicas' /metrics are read. auto: from the pods inside the cluster, else through the API "
        "server.",
    )
    field_manager: str = Field(default="khet-pipelines", description="Owner of the fields that are set here.")
    pre_stop_s: PositiveInt = Field(
        default=5, description="A pod that ends goes on serving for so long, until nobody sends it requests any more."
    )


class ClusterSettings(Area):
    """Where replicas run, and how patient the flows are with them."""

    backend: Literal["local-node", "kubernetes"] = Field(
        default="local-node", description="Adapter that runs replicas."
    )
    kubernetes: KubernetesSettings = Field(
        default=KubernetesSettings(), description="The cluster of backend=kubernetes."
    )
    node_url: str | None = Field(
        default=None, description="Control API of the local node. None: no node is configured."
    )
    node_token: SecretStr | None = Field(default=None, description="Bearer token of that control API.")
    gateway_url: str | None = Field(default=None, description="Address that clients send predictions to.")
    replicas: PositiveInt = Field(default=1, description="Replicas of the stable track.")
    canary_replicas: PositiveInt = Field(default=1, description="Replicas of the canary track.")
    keep_previous_s: NonNegativeInt = Field(
        default=0,
        description="After a promotion the version before is kept ready on replicas without traffic for so long: a "
        "rollback to it takes seconds. It costs as many replicas again. 0: not kept.",
    )
    ready_timeout_s: PositiveFloat = Field(default=90.0, description="A replica that is not ready by then has failed.")
    call_timeout_s: PositiveFloat = Field(default=10.0, description="Time for one control call.")
    replica_command: tuple[str, ...] = Field(
        default=(), description="Program that the local node starts as a replica. Empty: this Python's `-m ml.serve`."
    )
    health_interval_s: PositiveFloat = Field(default=0.5, description="Time between two looks at a replica's /readyz.")
    request_timeout_s: PositiveFloat = Field(
        default=10.0, description="Time one replica has to answer; then the gateway asks another."
    )
    max_in_flight: PositiveInt = Field(
        default=256, description="Requests the gateway works on at a time; more get 503 + Retry-After."
    )


class CanarySettings(Area):
    """How much traffic an unproven version may see, and for how long."""

    shadow_requests: NonNegativeInt = Field(
        default=200, description="Mirrored pairs compared before any user sees the canary. 0 skips."
    )
    steps: tuple[Share, ...] = Field(default=(0.05, 0.25, 0.5), description="Shares of traffic, ascending.")
    min_samples: PositiveInt = Field(default=40, description="Canary requests a step needs before it is judged.")
    lease_s: PositiveInt = Field(
        default=60, description="An unjudged canary loses its traffic after this many seconds without a heartbeat."
    )
    deadline_s: PositiveInt = Field(default=600, description="Time a step has to decide; see undecided.")
    undecided: Literal["ask", "extend", "rollback"] = Field(
        default="rollback",
        description="After the deadline: ask a person, wait for another deadline (then roll back), or roll back.",
    )
    max_extensions: PositiveInt = Field(default=1, description="How often `extend` waits for another deadline.")
    baseline: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Run the champion once more, as large as the canary, and compare with it, not with the whole "
        "stable track. auto: where stable is larger than the canary and the cluster has room.",
    )
    poll_s: PositiveFloat = Field(default=0.5, description="Time between two looks at the evidence.")

    @model_validator(mode="after")
    def _ascending(self) -> CanarySettings:
        if not self.steps or list(self.steps) != sorted(set(self.steps)):
            raise ValueError("steps must be ascending, without repeats, and not empty")
        return self


class GateRule(Area):
    """One gate of the canary's judge."""

    margin: Probability = Field(description="Share by which the canary may be worse before it counts as harm.")
    min_samples: PositiveInt = Field(default=20, description="Canary samples below which the gate says nothing.")
    critical: bool = Field(default=True, description="Harm rolls back. Off: harm only stops the promotion.")
    dry_run: bool = Field(default=False, description="On: reported, never counted.")


class TailRule(GateRule):
    """The slowest answers, as a quantile of latency."""

    margin: Probability = Field(default=0.0, description="Not used: factor says what is allowed.")
    quantile: Share = Field(default=0.99, description="Which quantile.")
    factor: PositiveFloat = Field(
        default=2.0, ge=1.0, description="The canary's may be this many times the baseline's, or the latency objective."
    )


class JudgeSettings(Area):
    """What counts as harm of a canary, against the champion on the same traffic, and how sure the judge must be."""

    alpha: Share = Field(
        default=0.05, description="Probability of rolling back a harmless version, all gates, looks and steps together."
    )
    latency_objective_ms: PositiveFloat = Field(default=250.0, description="Answers slower than this are slow.")
    errors: GateRule = Field(default=GateRule(margin=0.001), description="5xx answers, broken connections, silence.")
    slow: GateRule = Field(default=GateRule(margin=0.05), description="Answers over the latency objective.")
    tail: TailRule = Field(default=TailRule(min_samples=100), description="The slowest answers.")
    ood: GateRule = Field(default=GateRule(margin=0.10), description="Answers that say: this is no leaf.")
    disagreement: GateRule = Field(
        default=GateRule(margin=0.35),
        description="Other answers than the champion's to mirrored requests; the margin is the bound.",
    )
    class_disagreement: GateRule = Field(
        default=GateRule(margin=0.60), description="The same for each of the champion's answers by itself."
    )
    class_mix: GateRule = Field(
        default=GateRule(margin=0.20), description="Share of each class among the answers, in both directions."
    )
    accuracy: GateRule = Field(
        default=GateRule(margin=0.01), description="Wrong answers to labelled images that both versions answered."
    )
    first_error_rate: Probability = Field(
        default=0.02, description="Limit on errors of a first version, which has no champion to be compared with."
    )
    first_slow_share: Probability = Field(default=0.10, description="Limit on slow answers of a first version.")
    hard_error_requests: PositiveInt = Field(
        default=20, description="This many requests in a row that all failed end the canary at once."
    )
    unready_s: PositiveFloat = Field(
        default=2.0, description="A canary without a ready replica for so long ends at once."
    )

    @model_validator(mode="before")
    @classmethod
    def _complete_rules(cls, values: Any) -> Any:
        """A rule that is given in part keeps its own defaults for the rest."""
        if not isinstance(values, dict):
            return values
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        partial = {n: v for n, v in values.items() if isinstance(v, dict) and isinstance(defaults.get(n), GateRule)}
        return values | {name: defaults[name].model_dump() | given for name, given in partial.items()}


class Harm(Area):
    """A rate as it usually is, and as it must not become unnoticed."""

    usual: Probability = Field(description="What the champion does, and a healthy canary too.")
    harm: Probability = Field(description="What a rollout is expected to see before it ends.")


class TailHarm(Area):
    """The same for the slowest answers."""

    usual: PositiveFloat = Field(description="The champion's quantile of latency (judge.tail.quantile) in ms.")
    harm: PositiveFloat = Field(description="The harmful canary's, in ms.")


class HarmSettings(Area):
    """The harm that `khet canary plan` plans for, gate by gate. The judge itself knows only its margins."""

    errors: Harm = Field(default=Harm(usual=0.005, harm=0.05), description="Requests that end in an error.")
    slow: Harm = Field(default=Harm(usual=0.01, harm=0.25), description="Answers over the latency objective.")
    tail_ms: TailHarm = Field(default=TailHarm(usual=100.0, harm=1500.0), description="The slowest answers.")
    ood: Harm = Field(default=Harm(usual=0.02, harm=0.30), description="Answers that say: this is no leaf.")
    disagreement: Harm = Field(default=Harm(usual=0.08, harm=0.60), description="Other answers than the champion's.")
    class_disagreement: Harm = Field(
        default=Harm(usual=0.08, harm=0.95), description="The same for one class of the champion's answers."
    )
    class_mix: Harm = Field(default=Harm(usual=0.125, harm=0.50), description="One class's share of the answers.")
    accuracy: Harm = Field(default=Harm(usual=0.96, harm=0.85), description="Right answers to labelled images.")


class GateSettings(Area):
    """What a challenger must show on the holdout before it meets any traffic."""

    min_accuracy: Probability = Field(default=0.80, description="Floor on holdout accuracy.")
    min_recall: Probability = Field(default=0.50, description="Floor on every class's recall.")
    min_slice_accuracy: Probability = Field(
        default=0.40, description="Floor on the accuracy of every band of severity and every source of photos."
    )
    min_slice_images: PositiveInt = Field(
        default=20, description="A class, band or source with fewer holdout images is reported, not judged."
    )
    comparison: Literal["not_shown_worse", "shown_not_worse"] = Field(
        default="not_shown_worse",
        description="What the challenger must be against the champion. not_shown_worse: it loses no more than the "
        "margin, and no loss, however small, is proven (significance). shown_not_worse: the 95 % interval of the "
        "difference lies above the margin; a proven loss inside it is allowed, and a small holdout shows nothing.",
    )
    accuracy_margin: Probability = Field(default=0.02, description="Accuracy it may lose against the champion.")
    missed_disease_margin: Probability = Field(
        default=0.02, description="Missed-disease rate it may add to the champion's."
    )
    significance: Probability = Field(
        default=0.01, description="A loss counts as proven when chance explains it with a smaller probability."
    )
    max_ece: Probability = Field(default=0.10, description="Calibration error after temperature scaling.")
    max_parity_diff: PositiveFloat = Field(
        default=1e-4, description="Largest difference of a probability between model.onnx and what was trained."
    )
    max_latency_ms: PositiveFloat = Field(
        default=100.0, description="Median inference time of one image on this hardware."
    )
    max_model_bytes: PositiveInt = Field(default=500_000_000, description="Size of model.onnx.")
    max_holdout_uses: PositiveInt = Field(
        default=20, description="A holdout that decided more releases than this is worn out: the gate warns."
    )


class ReviewSettings(Area):
    """Labels that arrive after a promotion: for how long they may call for a rollback, and what counts as harm."""

    window_days: PositiveInt = Field(
        default=14,
        description="Predictions of the new version count this long after its promotion, those of the version before "
        "it this long before.",
    )
    label_delay_days: NonNegativeInt = Field(
        default=14, description="Labels of these predictions are waited for this much longer; then the review closes."
    )
    alpha: Share = Field(
        default=0.05, description="Probability of calling a harmless promotion harmful, over all nights of its review."
    )
    accuracy_margin: Probability = Field(
        default=0.02, description="Share of wrong answers it may have over the version before it."
    )
    class_margin: Probability = Field(
        default=0.10, description="The same for the photos of each class; small groups and other weeks differ more."
    )
    promise_margin: Probability = Field(
        default=0.05, description="Accuracy it may lose between the holdout and the field."
    )
    min_samples: PositiveInt = Field(
        default=50, description="Labelled predictions a version needs before anything is concluded from them."
    )
    lookup_days: PositiveInt = Field(
        default=60, description="An import looks for predictions in the inference log of this many days."
    )


class ReplaySettings(Area):
    """Traffic made from holdout images where users send too little."""

    enabled: bool = Field(default=True, description="Off where real traffic is enough.")
    rate_per_s: PositiveFloat = Field(default=80.0, description="Requests a second through the gateway.")
    concurrency: PositiveInt = Field(default=8, description="Requests in flight.")
    max_images: PositiveInt = Field(default=512, description="Holdout images that are cycled.")


class DataSettings(Area):
    """What an import accepts."""

    min_side_px: PositiveInt = Field(default=32, description="Images with a shorter side are quarantined.")
    max_pixels: PositiveInt = Field(default=50_000_000, description="Larger images are quarantined before decoding.")
    max_bad_share: Probability = Field(
        default=0.10, description="The import fails when more files than this are quarantined."
    )
    duplicate_hamming: NonNegativeInt = Field(
        default=8, description="pHash distance up to which two images are the same scene."
    )
    validation_share: Share = Field(
        default=0.15, description="Share of groups held out for calibration and early stopping."
    )
    test_share: Share = Field(default=0.15, description="Share of groups held out for the gate.")
    split_seed: int = Field(default=0, description="Seed of the split.")


class TrainingSettings(Area):
    """Where a release trains, and how its training survives the loss of the machine."""

    where: Literal["here", "deployment"] = Field(
        default="here",
        description="here: in the release's own process and folder. deployment: as a run of the deployment "
        "`train`, in orchestrator.train_pool, whose state and result travel through the object store.",
    )
    attempts: PositiveInt = Field(
        default=4,
        description="Runs of the deployment that a release starts at most, where its pods are evicted or crash. Each "
        "goes on from the last one's checkpoint.",
    )
    checkpoint_every_s: NonNegativeFloat = Field(
        default=30.0, description="Least time between two checkpoints that are sent to the object store."
    )
    poll_s: PositiveFloat = Field(default=2.0, description="Time between two looks at a training that runs elsewhere.")


class TrackingSettings(Area):
    """Weights & Biases. A failing tracker never fails a flow."""

    mode: Literal["offline", "online", "disabled"] = Field(default="offline", description="offline needs no network.")
    project: str = Field(default="khet-guard", description="W&B project.")
    entity: str | None = Field(default=None, description="W&B team. None: the key's default.")
    api_key: SecretStr | None = Field(default=None, description="Only used online.")


class StackSettings(Area):
    """The embedded local stack. Ports of 0 are chosen free and remembered."""

    object_store: Literal["embedded", "external"] = Field(
        default="embedded", description="external: object_store.* says where."
    )
    database: Literal["embedded", "external"] = Field(
        default="embedded", description="external: database.dsn says where."
    )
    orchestrator: Literal["embedded", "external"] = Field(
        default="embedded", description="external: orchestrator.api_url says where; its workers run elsewhere too."
    )
    postgres_bin: Path | None = Field(
        default=None, description="Folder with initdb and pg_ctl. None: the wheel's, then PATH."
    )
    prefect_port: int = Field(default=0, ge=0, le=65535, description="Prefect UI and API.")
    s3_port: int = Field(default=0, ge=0, le=65535, description="S3 service.")
    postgres_port: int = Field(default=0, ge=0, le=65535, description="PostgreSQL.")
    gateway_port: int = Field(default=0, ge=0, le=65535, description="Predictions.")
    prefect_database: Literal["postgres", "sqlite"] = Field(
        default="postgres",
        description="Where the embedded Prefect server keeps its records. postgres needs database=embedded; on a busy "
        "machine SQLite answers 503 (database is locked) and loses events. Without it, or by choice: sqlite.",
    )
    prefect_auth: bool = Field(default=False, description="Ask for a generated password on the Prefect API and UI.")
    listen: IPvAnyAddress | None = Field(
        default=None,
        description="One more address of this machine where object store, PostgreSQL and Prefect are reached, for pods "
        "of a cluster: every one of them asks for a password then, none offers TLS. None: the loopback only.",
    )
    start_timeout_s: PositiveFloat = Field(default=180.0, description="A part that is not healthy by then has failed.")
    stop_timeout_s: PositiveFloat = Field(default=8.0, description="Parts get this long between SIGTERM and SIGKILL.")
    worker_poll_s: PositiveFloat = Field(default=2.0, description="How often the worker looks for scheduled runs.")

    @field_validator("listen")
    @classmethod
    def _one_address(cls, listen: Any) -> Any:
        """Every address would be those of foreign networks too, and pods could not be told which."""
        if listen is not None and (listen.is_unspecified or listen.is_loopback or listen.is_multicast):
            raise ValueError("must be the one address that pods reach, not every address and not the loopback")
        return listen
