"""What users of the SDK may rely on: its names, and that importing it is light."""

import json
import subprocess
import sys
from importlib.resources import files

import zimage_client

NAMES = [
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
HEAVY = ("torch", "numpy", "transformers", "diffusers", "PIL", "pydantic", "platformdirs")
NEVER = (*HEAVY[:4], "zimage_core.serving")


def loaded_by(module: str) -> set[str]:
    """The modules of a fresh interpreter after one import."""
    program = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return set(json.loads(done.stdout))


def test_the_public_names_are_these_and_sorted() -> None:
    assert zimage_client.__all__ == NAMES == sorted(NAMES)
    assert all(hasattr(zimage_client, name) for name in NAMES)


def test_nothing_public_is_left_out() -> None:
    public = {
        name
        for name, value in vars(zimage_client).items()
        if not name.startswith("_") and not isinstance(value, type(zimage_client))
    }
    assert public == set(NAMES)


def test_importing_the_sdk_is_light() -> None:
    assert loaded_by("zimage_client").isdisjoint(HEAVY)


def test_the_command_line_never_loads_what_belongs_to_services() -> None:
    modules = ("main", "generate", "encode")
    for module in modules:
        assert loaded_by(f"zimage_client.cli.{module}").isdisjoint(NEVER)


def test_the_package_says_that_it_has_types() -> None:
    assert files(zimage_client).joinpath("py.typed").is_file()
