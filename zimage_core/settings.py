"""One settings model per program, and the one way values come to be.

A flag wins over the environment, that over the chosen profile, that over the file's [default], that
over what is built in. Tables are `[profile.program]`, variables `ZIMAGE_PROGRAM__KEY`. An unknown
key is an error that names the nearest known one; a broken file is fatal.
"""

import difflib
import hashlib
import json
import os
import tomllib
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from zimage_core.drift import NEAR_COSINE
from zimage_core.errors import InvalidSettings
from zimage_core.tls import Credentials, Tls

Device = Literal["auto", "cpu", "cuda", "mps"]
ElementType = Literal["auto", "float32", "bfloat16", "float16"]


class Watchdog(BaseModel):
    """When a worker counts as hung."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    factor: float = Field(10.0, ge=1, description="times the expected duration of a piece of work")
    least_seconds: float = Field(60.0, gt=0, description="but never less than this")
    silence_seconds: float = Field(120.0, gt=0, description="longest time without a sign of life")


class _Program(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServiceSettings(_Program):
    """What every service has."""

    listen: str = Field(description="address to listen on, host:port or unix:path")
    probes: str = Field(description="host:port for /livez, /readyz and /metrics; empty for none")
    insecure: bool = Field(False, description="allow a non-loopback address without TLS")
    tls_cert: Path | None = Field(
        None, description="certificate of this service, PEM; unset: no TLS; read anew on change"
    )
    tls_key: Path | None = Field(None, description="key to the certificate")
    tokens: Path | None = Field(
        None, description="file of tokens (TOML), read anew on change; unset: none is asked for"
    )
    tls_client_ca: Path | None = Field(
        None, description="authorities that callers must have a certificate from (mutual TLS)"
    )
    traces: str = Field(
        "", description="OpenTelemetry collector, http://host:4317 (OTLP over gRPC); unset: none"
    )
    drain_delay_seconds: float = Field(
        0.0, ge=0, description="pause after SIGTERM for balancers to notice"
    )
    connection_age_seconds: float | None = Field(
        None,
        gt=0,
        description="after it clients connect anew, so that they find new replicas; "
        "calls under way end first",
    )
    grace_seconds: float = Field(
        30.0, ge=0, description="how long running calls may take after that"
    )
    exit_with_stdin: bool = Field(
        False, description="stop when standard input ends, for whoever starts this as a child"
    )

    @property
    def own_tls(self) -> Tls | None:
        """What callers meet; None without TLS."""
        if self.tls_client_ca and not self.tls_cert:
            raise _invalid("tls_client_ca needs tls_cert and tls_key beside it", "tls_cert", "")
        own = Tls(self.tls_client_ca, self.tls_cert, self.tls_key)
        return own if own.cert else None


class ModelSettings(ServiceSettings):
    """What every service with a model has."""

    model: Path = Field(
        description="model folder in diffusers layout, or a single file; for the encoder also a "
        "folder with Qwen3 alone"
    )
    device: Device = Field("auto", description="where the model runs")
    dtype: ElementType = Field("auto", description="type that the model computes in")
    watchdog: Watchdog = Field(Watchdog(), description="when a worker counts as hung")


class EncoderSettings(ModelSettings):
    """The encoder service."""

    listen: str = Field(
        "127.0.0.1:50051", description="address to listen on, host:port or unix:path"
    )
    probes: str = Field(
        "127.0.0.1:9464", description="host:port for /livez, /readyz and /metrics; empty for none"
    )
    tokenizer: Path | None = Field(
        None, description="tokenizer.json or its folder; needed where --model is a single file"
    )
    weights: Literal["full", "int8", "int8_dynamic", "int4"] = Field(
        "full",
        description="form of the layers' weights: full, as the model computes; int8, a byte each; "
        "int8_dynamic, a byte each and multiplied with bytes, which is fastest; int4, half of one",
    )
    cpu_offload: bool = Field(
        False,
        description="keep the weights in host memory, and on a GPU only while prompts are encoded: "
        "for an encoder and a DiT on one card",
    )
    max_hidden_layer: int = Field(
        -2, le=-1, description="deepest hidden state to compute, from the end; -1 loads all layers"
    )
    token_limit: int = Field(4096, ge=1, description="longest prompt in tokens, the chat included")
    row_limit: int | None = Field(
        None,
        ge=1,
        description="most rows of an embedding, to which longer prompts are compressed; unset: "
        "what the DiT's tables allow",
    )
    max_queue_length: int = Field(64, ge=1, description="calls inside beside one")
    max_queue_seconds: float = Field(
        60.0, gt=0, description="seconds of work that may be ahead of a call"
    )
    max_queue_bytes: int = Field(
        1 << 30, gt=0, description="bytes that prompts and embeddings may take"
    )
    max_batch_ms: float = Field(
        1000.0,
        gt=0,
        description="how long prompts that are encoded together may take: so long whoever comes "
        "waits for the device at most, unless a single prompt takes longer",
    )
    max_batch_tokens: int = Field(
        4096, ge=1, description="tokens encoded together at most, which bounds memory"
    )
    cache_bytes: int = Field(
        256 << 20, ge=0, description="bytes of embeddings kept for whoever asks the same again"
    )
    prefix_cache_bytes: int = Field(
        512 << 20,
        ge=0,
        description="bytes on the device, for prompts that begin like an earlier one to go on "
        "from there; 0: none",
    )


class DitSettings(ModelSettings):
    """The DiT service."""

    listen: str = Field(
        "127.0.0.1:50052", description="address to listen on, host:port or unix:path"
    )
    probes: str = Field(
        "127.0.0.1:9465", description="host:port for /livez, /readyz and /metrics; empty for none"
    )
    encoder: str = Field(
        "", description="encoder service, host:port or unix:path; several joined by commas"
    )
    encoder_token_file: Path | None = Field(
        None, description="file with the token for the encoder service"
    )
    tls_ca: Path | None = Field(
        None, description="authorities of the encoder's certificate; unset: no TLS towards it"
    )
    encoder_identity: str = Field(
        "", description="digest of the encoder to insist on, where none lies beside the model"
    )
    encoder_drifts: Path | None = Field(
        None,
        description="file of `zimage-client verify-encoder --write`: other encoders that are "
        "taken, with a warning, and what they were measured to lose",
    )
    encoder_drift_limit: float = Field(
        NEAR_COSINE, gt=0, le=1, description="least cosine of the worst token of one of these"
    )
    vae: Path | None = Field(
        None,
        description="VAE, a diffusers folder or a single file; unset: vae/ of the model folder",
    )
    variant: Literal["auto", "turbo", "base"] = Field(
        "auto", description="auto: by the scheduler's shift, which a single file does not tell"
    )
    max_side_px: int = Field(4096, ge=16, description="longest side of a picture")
    max_image_count: int = Field(64, ge=1, description="most pictures in one request")
    max_step_count: int = Field(1000, ge=1, description="most steps of one picture")
    max_step_ms: float = Field(
        250.0,
        gt=0,
        description="how long a step may become by several requests sharing it: so long whoever "
        "comes waits for its first",
    )
    attention_backend: str = Field(
        "auto",
        description="sdpa, sdpa_cudnn, torch_varlen, flash_attn_3, flash_attn_2, xformers or sage; "
        "auto: the fastest that computes right here",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="run compiled blocks, which takes up to a minute of the first start and is "
        "kept; auto: on an NVIDIA or AMD GPU",
    )
    fused_adapter: Path | None = Field(
        None,
        description="LoRA file that becomes part of the weights as they are loaded, for all "
        "pictures; unset: none",
    )
    fused_adapter_scale: float = Field(
        1.0, allow_inf_nan=False, description="how strong it is, 1 as it was trained"
    )
    weights: Literal["auto", "full", "int8", "fp8", "fp8_matmul", "nf4", "fastest"] = Field(
        "auto",
        description="form of the transformer's large weights on the device: full, as the compute "
        "type; int8 or fp8, a byte each; nf4, half of one; fp8_matmul, multiplied as they are "
        "(NVIDIA from compute capability 8.9 on); fastest, fp8_matmul where it is; auto: as the "
        "file has them",
    )
    weights_gate: bool = Field(
        True,
        description="refuse weights that lose more than the file has, by a picture drawn at the "
        "first start: latents' cosine below 0.995, or PSNR below 30 dB",
    )
    training_weight: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="how much of the device's time a project's trainings get while others want it, "
        "too: background pictures have 1, normal ones 4, interactive ones 16",
    )
    training_cache_bytes: int = Field(
        4 << 30,
        ge=0,
        description="host memory for what trainings learn from, as much as 3,000 pictures of "
        "1024x1024; what is not there is read from disk when it is needed",
    )
    train_devices: int = Field(
        1,
        ge=1,
        description="GPUs of this machine that train together, each with a part of every batch; "
        "the first of them draws pictures, too",
    )
    full_training: bool = Field(
        False,
        description="let full trainings, one at a time, learn the model's own weights, with which "
        "pictures are drawn as they are by then; adapters are learnt at other services",
    )
    max_weight_bytes: int | None = Field(
        None,
        gt=0,
        description="memory of the device for the transformer's weights: blocks that do not fit "
        "stay in host memory and come for their turn in every step; unset: what a GPU has free "
        "besides adapters and 2 GiB",
    )
    vae_device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="device of the VAE; auto: that of the transformer"
    )
    vae_tile_px: int | None = Field(
        None,
        ge=128,
        multiple_of=64,
        description="side of the tiles in which pictures with a longer one are encoded and "
        "decoded: smaller ones take less memory; unset: 1024, for pictures beyond 1536x1536 alone",
    )
    max_step_bytes: int | None = Field(
        None, gt=0, description="memory of such a step; unset: most of what is free"
    )
    max_adapter_bytes: int = Field(
        1 << 30, gt=0, description="memory for adapters on the device, in use or used last"
    )
    max_queue_length: int = Field(64, ge=1, description="requests inside beside one")
    max_queue_seconds: float = Field(
        600.0, gt=0, description="seconds of work that may be ahead of a request"
    )
    max_queue_bytes: int = Field(
        2 << 30, gt=0, description="bytes that requests and pictures may take"
    )

    store: str = Field(
        "",
        description="folder or URL for blobs; unset: a folder of this user; URLs need fsspec's "
        "library for their kind",
    )
    store_quota_bytes: int = Field(
        64 << 30, gt=0, description="bytes that blobs may take, as far as this replica knows"
    )
    store_keep_seconds: float = Field(
        7 * 86_400.0, gt=0, description="how long blobs without a name stay after their last use"
    )

    @model_validator(mode="after")
    def _learns_what_it_has(self) -> Self:
        for other, value in (
            ("fused_adapter", self.fused_adapter),
            ("max_weight_bytes", self.max_weight_bytes),
            ("weights", self.weights if self.weights not in ("auto", "full") else None),
        ):
            if self.full_training and value is not None:
                raise ValueError(f"full_training learns the model's own weights, without {other}")
            if self.train_devices > 1 and value is not None and other != "weights":
                raise ValueError(f"train_devices load the model as it is, without {other}")
        return self

    @property
    def store_at(self) -> tuple[str, Path]:
        """The store's URL, and a folder for what comes in for one that is elsewhere."""
        return _store_at(self.store)

    @property
    def encoder_credentials(self) -> Credentials:
        """For the way to the encoder, where this service shows its own certificate."""
        tls = Tls(self.tls_ca, self.tls_cert, self.tls_key) if self.tls_ca else None
        return Credentials(tls=tls, token=self.encoder_token_file or "")


class TrainerSettings(ServiceSettings):
    """The trainer service."""

    listen: str = Field(
        "127.0.0.1:50053", description="address to listen on, host:port or unix:path"
    )
    probes: str = Field(
        "127.0.0.1:9466", description="host:port for /livez, /readyz and /metrics; empty for none"
    )
    encoder: str = Field(
        description="encoder service, host:port or unix:path; several joined by commas"
    )
    dit: str = Field(
        description="DiT service that trains, host:port or unix:path; several joined by commas, of "
        "which the one with the fewest jobs has the next"
    )
    token_file: Path | None = Field(None, description="file with the token for both services")
    tls_ca: Path | None = Field(
        None, description="authorities of their certificates; unset: no TLS towards them"
    )
    jobs_at_once: int | None = Field(
        None,
        ge=1,
        description="jobs that learn at the same time; those of one DiT service share its device; "
        "unset: one for each DiT service",
    )
    database: str = Field(
        "", description="URL of the database of jobs; unset: SQLite in a folder of this user"
    )
    store: str = Field(
        "",
        description="folder or URL for blobs; unset: a folder of this user; URLs need fsspec's "
        "library for their kind",
    )
    store_quota_bytes: int = Field(
        256 << 30, gt=0, description="bytes that blobs may take, as far as this replica knows"
    )
    store_keep_seconds: float = Field(
        7 * 86_400.0, gt=0, description="how long blobs without a name stay after their last use"
    )

    @property
    def database_url(self) -> str:
        """With the usual place."""
        usual = platformdirs.user_data_path("zimage") / "trainer.sqlite"
        return self.database or f"sqlite:///{usual}"

    @property
    def store_at(self) -> tuple[str, Path]:
        """The store's URL, and a folder for what comes in for one that is elsewhere."""
        return _store_at(self.store)

    @property
    def credentials(self) -> Credentials:
        """For the way to both services, where this one shows its own certificate."""
        tls = Tls(self.tls_ca, self.tls_cert, self.tls_key) if self.tls_ca else None
        return Credentials(tls=tls, token=self.token_file or "")


class ClientSettings(_Program):
    """The command line client."""

    server: str = Field(
        "",
        description="DiT service, host:port or unix:path; several joined by commas; else embedded",
    )
    encoder: str = Field("", description="encode here and send the embedding")
    trainer: str = Field("", description="trainer service, host:port or unix:path")
    token_file: Path | None = Field(None, description="file with the token for the services")
    tls_ca: Path | None = Field(
        None, description="authorities of the services' certificates, PEM; unset: no TLS"
    )
    tls_cert: Path | None = Field(None, description="certificate to show them (mutual TLS)")
    tls_key: Path | None = Field(None, description="key to the certificate")

    models: Path | None = Field(
        None, description="folder of `models add`; unset: a folder of this user"
    )
    traces: str = Field(
        "", description="OpenTelemetry collector, http://host:4317 (OTLP over gRPC); unset: none"
    )

    @property
    def models_folder(self) -> Path:
        """With the usual place."""
        return self.models or platformdirs.user_data_path("zimage") / "models"

    @property
    def credentials(self) -> Credentials:
        """For the way to the services."""
        own = Tls(self.tls_ca, self.tls_cert, self.tls_key)
        return Credentials(tls=own if own.ca or own.cert else None, token=self.token_file or "")


S = TypeVar("S", bound=BaseModel)

PROGRAMS: dict[str, type[BaseModel]] = {
    "client": ClientSettings,
    "encoder": EncoderSettings,
    "dit": DitSettings,
    "trainer": TrainerSettings,
}
_PREFIX = "ZIMAGE_"
_SHORT_VARIABLES = {
    "ZIMAGE_SERVER": "server",
    "ZIMAGE_ENCODER": "encoder",
    "ZIMAGE_TRAINER": "trainer",
}
"""The client's addresses, by the names that people type."""

Values = dict[str, Any]


@dataclass(frozen=True)
class Loaded(Generic[S]):
    """Settings, and for each value the place it came from."""

    values: S
    origins: Mapping[str, str]

    def __str__(self) -> str:
        return "".join(
            f"{name} = {json.dumps(value)}  # {self.origins.get(name, 'built in')}\n"
            for name, value in self.values.model_dump(mode="json").items()
        )


def add_flags(parser: ArgumentParser, model: type[BaseModel], file_flag: str = "--config") -> None:
    """One flag for each plain setting of a program, and those that choose the file and profile."""
    parser.add_argument(
        file_flag, dest="config", type=Path, metavar="FILE", help="settings file (TOML)"
    )
    parser.add_argument(
        "--isolated", action="store_true", help="obey flags alone: no file and no environment"
    )
    parser.add_argument("--profile", help="table of the settings file to use")
    parser.add_argument(
        "--print-config", action="store_true", help="show the effective settings and their origin"
    )
    for name, field in model.model_fields.items():
        flag = "--" + name.replace("_", "-")
        if field.annotation is bool:
            parser.add_argument(
                flag, action=BooleanOptionalAction, default=None, help=field.description
            )
        elif not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            parser.add_argument(flag, metavar=name.upper(), help=field.description)


def load(
    model: type[S], flags: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Loaded[S]:
    """The effective settings of a program; `flags` that are None were not given."""
    environment = os.environ if environment is None else environment
    is_isolated = bool(flags.get("isolated"))
    environment = {} if is_isolated else environment
    program = next(name for name, known in PROGRAMS.items() if known is model)
    path = None if is_isolated else _file(flags.get("config"), environment)
    profile = flags.get("profile") or environment.get(f"{_PREFIX}PROFILE")
    given = {name: flags[name] for name in model.model_fields if flags.get(name) is not None}
    layers = [
        *_tables(path, profile, program),
        ("environment", _variables(program, model, environment)),
        ("flag", given),
    ]
    merged: Values = {}
    origins: dict[str, str] = {}
    for origin, values in layers:
        merged = _merged(merged, values)
        origins.update(dict.fromkeys(values, origin))
    try:
        return Loaded(model.model_validate(merged), origins)
    except ValidationError as error:
        raise _refusal(error, model, origins) from error


def _file(flag: Path | None, environment: Mapping[str, str]) -> Path | None:
    named = flag or environment.get(f"{_PREFIX}CONFIG")
    if named:
        return Path(named)
    usual = platformdirs.user_config_path("zimage") / "config.toml"
    return usual if usual.is_file() else None


def _tables(path: Path | None, profile: str | None, program: str) -> Iterator[tuple[str, Values]]:
    """The file's [default] and the chosen profile; all its other tables are checked as well."""
    if path is None:
        if profile:
            raise _invalid(f"profile {profile}: there is no settings file", "profile", profile)
        return
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _invalid(f"{path}: {error}", "config", str(path)) from error
    _refuse_unknown_keys(path, tables)
    if profile and profile not in tables:
        raise _unknown(f"{path}: profile {profile}", profile, tables)
    for name in dict.fromkeys(("default", profile or "default")):
        yield f"[{name}.{program}] in {path}", tables.get(name, {}).get(program, {})


def _refuse_unknown_keys(path: Path, tables: Values) -> None:
    for name, programs in tables.items():
        if not isinstance(programs, dict):
            raise _invalid(f"{path}: {name} stands outside of a table like [default.dit]", name, "")
        for program, values in programs.items():
            if program not in PROGRAMS:
                raise _unknown(f"{path}: [{name}.{program}]", program, PROGRAMS)
            for key in values:
                known = PROGRAMS[program].model_fields
                if key not in known:
                    raise _unknown(f"{path}: {key} in [{name}.{program}]", key, known)


def _variables(program: str, model: type[BaseModel], environment: Mapping[str, str]) -> Values:
    values: Values = {}
    if program == "client":
        for variable, key in _SHORT_VARIABLES.items():
            if variable in environment:
                values[key] = environment[variable]
    prefix = f"{_PREFIX}{program.upper()}__"
    for variable, text in environment.items():
        if not variable.startswith(prefix):
            continue
        first, *rest = variable.removeprefix(prefix).lower().split("__")
        if first not in model.model_fields:
            raise _unknown(variable, first, model.model_fields)
        value: Any = text
        for key in reversed(rest):
            value = {key: value}
        values = _merged(values, {first: value})
    return values


def _merged(below: Values, above: Values) -> Values:
    """Tables merge, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        tables = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merged(old or {}, value) if tables else value
    return merged


def _refusal(
    error: ValidationError, model: type[BaseModel], origins: Mapping[str, str]
) -> InvalidSettings:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        flag = "--" + path.replace("_", "-")
        return _invalid(f"{path} is not set; give {flag}", path, "")
    if first["type"] == "extra_forbidden":
        known = Watchdog.model_fields if len(first["loc"]) > 1 else model.model_fields
        return _unknown(path, str(first["loc"][-1]), known)
    origin = origins.get(str(first["loc"][0]), "built in")
    return _invalid(f"{path} ({origin}): {first['msg']}", path, str(first["input"]))


def _unknown(where: str, key: str, known: Mapping[str, object]) -> InvalidSettings:
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known)}"
    return _invalid(f"{where} is unknown; {hint}", where, key)


def _store_at(store: str) -> tuple[str, Path]:
    at = store or str(platformdirs.user_data_path("zimage") / "store")
    name = hashlib.sha256(at.encode()).hexdigest()[:16]
    return at, platformdirs.user_cache_path("zimage") / f"store-{name}"


def _invalid(message: str, field: str, given: str) -> InvalidSettings:
    return InvalidSettings(message, fields={"field": field, "given": given})


_KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
_KERNELS = "32"
"""In bfloat16 on a CPU a kernel takes half a megabyte, and every number of tokens is another shape:
the usual 1,024 grew an encoder of 1 MB to 1.2 GB. A forward needs about ten."""


def keep_compiled_code() -> None:
    """Where PyTorch and Triton keep what they compiled for the next start, unless their user said
    so already: by themselves, where it is gone after a restart of the machine."""
    folder = platformdirs.user_cache_path("zimage") / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that may only be read
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def are_threads_given() -> bool:
    """Whether somebody has decided how many threads libraries compute with."""
    return bool(os.environ.get("OMP_NUM_THREADS"))


def bound_kernel_caches() -> None:
    """How many kernels, each made for one shape, PyTorch and oneDNN keep in this process, unless
    its user said so already. They look when torch is imported, and not later."""
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, _KERNELS)
