"""The Python SDK of Z-Image: `Client` and `AsyncClient`, typed events, typed errors.

with Client("localhost:50052") as client:
    result = client.generate("a red circle on a blue background", seed=1)
    Path("out.png").write_bytes(result.pictures[0].data)
"""

from zimage_client._client import AsyncClient
from zimage_client._conditioning import Condition
from zimage_client._description import (
    Adapter,
    AttentionBackend,
    DitDescription,
    Encoder,
    EncoderDescription,
    Limits,
    Model,
    Span,
    SpanPart,
    TokenCount,
    Trace,
    WorkerState,
)
from zimage_client._events import (
    Accepted,
    AdapterUse,
    Artifact,
    Completed,
    DecodedImage,
    Event,
    Generated,
    NumericPlan,
    Picture,
    Preview,
    Progress,
    Provenance,
    Stage,
    Usage,
    Waiting,
)
from zimage_client._jobs import (
    CacheKind,
    JobEvent,
    TrainCaching,
    TrainCheckpoint,
    TrainForecast,
    TrainJob,
    TrainNeeds,
    TrainPicture,
    TrainSamples,
    TrainStep,
)
from zimage_client._options import Options
from zimage_client._receipt import Receipt, read_receipt
from zimage_client._session import EncodeSession
from zimage_client._sync import Client
from zimage_client._sync_trainer import Trainer
from zimage_client._trainer import AsyncTrainer
from zimage_core.embeddings import Embedding, Numerics, Prompt, Recipe
from zimage_core.errors import (
    Cancelled,
    DeadlineTooShort,
    DeviceLost,
    Forbidden,
    InternalError,
    InvalidModel,
    InvalidRequest,
    InvalidSettings,
    NotFound,
    NotReady,
    Overloaded,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    ZImageError,
)
from zimage_core.tensors import TensorData
from zimage_core.tls import Tls

__all__ = [
    "Accepted",
    "Adapter",
    "AdapterUse",
    "Artifact",
    "AsyncClient",
    "AsyncTrainer",
    "AttentionBackend",
    "CacheKind",
    "Cancelled",
    "Client",
    "Completed",
    "Condition",
    "DeadlineTooShort",
    "DecodedImage",
    "DeviceLost",
    "DitDescription",
    "Embedding",
    "EncodeSession",
    "Encoder",
    "EncoderDescription",
    "Event",
    "Forbidden",
    "Generated",
    "InternalError",
    "InvalidModel",
    "InvalidRequest",
    "InvalidSettings",
    "JobEvent",
    "Limits",
    "Model",
    "NotFound",
    "NotReady",
    "NumericPlan",
    "Numerics",
    "Options",
    "Overloaded",
    "Picture",
    "Preview",
    "Progress",
    "Prompt",
    "Provenance",
    "Receipt",
    "Recipe",
    "Span",
    "SpanPart",
    "Stage",
    "TensorData",
    "Tls",
    "TokenCount",
    "Trace",
    "TrainCaching",
    "TrainCheckpoint",
    "TrainForecast",
    "TrainJob",
    "TrainNeeds",
    "TrainPicture",
    "TrainSamples",
    "TrainStep",
    "Trainer",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Usage",
    "Waiting",
    "WorkerState",
    "ZImageError",
    "read_receipt",
]
