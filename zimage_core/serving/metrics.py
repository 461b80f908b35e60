"""Every number that services show to Prometheus: its name, its labels, its meaning."""

from collections.abc import Mapping

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 180, 600)
_SHARED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

RPC_STARTED = Counter("zimage_rpc_started_total", "calls that came in", ["method"])
RPC_ENDED = Counter("zimage_rpc_ended_total", "calls that ended, by status", ["method", "code"])
RPC_REFUSED = Counter(
    "zimage_rpc_refused_total", "calls that ended in an error, by its reason", ["method", "reason"]
)
RPC_RUNNING = Gauge("zimage_rpc_running", "calls that run", ["method"])
RPC_SECONDS = Histogram(
    "zimage_rpc_seconds",
    "seconds from a call's first byte to its status",
    ["method"],
    buckets=_SECONDS,
)
RPC_BYTES = Counter(
    "zimage_rpc_bytes_total",
    "bytes of messages; the direction is in or out",
    ["method", "direction"],
)

TASKS = Gauge("zimage_tasks", "tasks in the event loop of the service's front")
WORKER_READY = Gauge("zimage_worker_ready", "1 while the model is loaded and calls are served")
WORKER_STARTS = Counter(
    "zimage_worker_starts_total", "worker processes started, the first included"
)
WORKER_CALLS = Gauge("zimage_worker_calls", "calls that the worker has, running or waiting")
WORKER_SECONDS = Counter(
    "zimage_worker_busy_seconds_total", "seconds that the worker spent on a kind of work", ["work"]
)
WORKER_MEMORY = Gauge(
    "zimage_worker_memory_bytes",
    "what the worker's process holds: host, device (tensors), device_reserved (for tensors), and "
    "held at most: host_peak, device_peak",
    ["kind"],
)

QUEUE_CALLS = Gauge("zimage_queue_calls", "calls inside, worked on or waiting")
QUEUE_SECONDS = Gauge("zimage_queue_seconds", "seconds that their work is expected to take")
QUEUE_BYTES = Gauge("zimage_queue_bytes", "bytes that calls hold until their answers are read")
QUEUE_AGE = Gauge("zimage_queue_age_seconds", "seconds since the oldest of them came")

DIT_STAGE_SECONDS = Histogram(
    "zimage_dit_stage_seconds",
    "seconds of a request: encode and queue, both from its arrival; denoise (its share), decode",
    ["stage"],
    buckets=_SECONDS,
)
DIT_STEP_SECONDS = Histogram(
    "zimage_dit_step_seconds", "seconds of a step, the mean of a request", buckets=_SECONDS
)
DIT_STEP_REQUESTS = Histogram(
    "zimage_dit_step_requests", "requests in a step, the mean of a request", buckets=_SHARED
)
DIT_FORWARDS = Counter("zimage_dit_forwards_total", "samples through the transformer")
DIT_PICTURES = Counter("zimage_dit_pictures_total", "pictures made")
DIT_PIXELS = Counter("zimage_dit_pixels_total", "pixels of pictures made")
DIT_NAMED = Counter(
    "zimage_dit_named_blobs_total",
    "what requests only named; the source is store, or client where it had to be sent",
    ["source"],
)

ENCODER_PROMPTS = Counter("zimage_encoder_prompts_total", "prompts encoded")
ENCODER_TOKENS = Counter("zimage_encoder_tokens_total", "tokens of prompts encoded")
ENCODER_REUSED = Counter(
    "zimage_encoder_reused_tokens_total",
    "tokens that had run before, at the beginning of another prompt",
)
ENCODER_CACHE = Counter(
    "zimage_encoder_cache_total",
    "prompts by what the cache did: hit, joined (being encoded for somebody else) or miss",
    ["result"],
)
ENCODER_CACHE_BYTES = Gauge("zimage_encoder_cache_bytes", "bytes of embeddings that are kept")
ENCODER_BATCH_PROMPTS = Histogram(
    "zimage_encoder_batch_prompts", "prompts in a batch", buckets=_SHARED
)

ALL: tuple[MetricWrapperBase, ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, MetricWrapperBase)
)


def enter_memory(held: Mapping[str, int]) -> None:
    """What a worker says that its process holds."""
    for kind, count in held.items():
        WORKER_MEMORY.labels(kind).set(count)


def page() -> bytes:
    """What Prometheus reads; with the process's memory, files and seconds of CPU."""
    return generate_latest(REGISTRY)
