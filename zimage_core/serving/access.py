"""Who may call what, and how often: tokens from a file, judged by a call's metadata alone.

Limits count in this process: with three replicas behind one name, three times as much gets through.
"""

import hashlib
import hmac
import logging
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from zimage_core.errors import Forbidden, InvalidSettings, Overloaded, Unauthenticated
from zimage_core.files import stamp
from zimage_core.planning.shares import DEFAULT_PROJECT

_log = logging.getLogger(__name__)
Role = Literal["generate", "encode", "train", "admin"]

HEADER = "authorization"
_SCHEME = "Bearer "
_MINUTE, _HOUR = 60.0, 3600.0

ROLES: dict[str, Role | None] = {
    "/zimage_rpc.blob.v1.BlobService/Find": "generate",
    "/zimage_rpc.blob.v1.BlobService/Put": "generate",
    "/zimage_rpc.blob.v1.BlobService/Get": "generate",
    "/zimage_rpc.encoder.v1.EncoderService/Describe": None,
    "/zimage_rpc.encoder.v1.EncoderService/CountTokens": "encode",
    "/zimage_rpc.encoder.v1.EncoderService/Encode": "encode",
    "/zimage_rpc.encoder.v1.EncoderService/EncodeStream": "encode",
    "/zimage_rpc.encoder.v1.EncoderService/EncodeSession": "encode",
    "/zimage_rpc.dit.v1.DitService/Describe": None,
    "/zimage_rpc.dit.v1.DitService/Generate": "generate",
    "/zimage_rpc.dit.v1.DitService/EncodeImages": "generate",
    "/zimage_rpc.dit.v1.DitService/DecodeLatents": "generate",
    "/zimage_rpc.dit.v1.DitService/AddAdapter": "train",
    "/zimage_rpc.dit.v1.DitService/GetAdapter": "generate",
    "/zimage_rpc.dit.v1.DitService/ListAdapters": "generate",
    "/zimage_rpc.dit.v1.DitService/RemoveAdapter": "train",
    "/zimage_rpc.dit.v1.DitService/Trace": "admin",
    "/zimage_rpc.dit.v1.TrainingService/TrainSession": "train",
    "/zimage_rpc.dit.v1.TrainingService/PlanTraining": "train",
    "/zimage_rpc.trainer.v1.TrainerService/Describe": None,
    "/zimage_rpc.trainer.v1.TrainerService/PlanTrainJob": "train",
    "/zimage_rpc.trainer.v1.TrainerService/CreateTrainJob": "train",
    "/zimage_rpc.trainer.v1.TrainerService/GetTrainJob": "train",
    "/zimage_rpc.trainer.v1.TrainerService/ListTrainJobs": "train",
    "/zimage_rpc.trainer.v1.TrainerService/WatchTrainJob": "train",
    "/zimage_rpc.trainer.v1.TrainerService/PauseTrainJob": "train",
    "/zimage_rpc.trainer.v1.TrainerService/ResumeTrainJob": "train",
    "/zimage_rpc.trainer.v1.TrainerService/CancelTrainJob": "train",
    "/zimage_rpc.trainer.v1.TrainerService/DeleteTrainJob": "train",
    "/zimage_rpc.trainer.v1.TrainerService/DescribeCache": "train",
    "/zimage_rpc.trainer.v1.TrainerService/VerifyCache": "admin",
    "/zimage_rpc.trainer.v1.TrainerService/PruneCache": "admin",
}
"""The role that a method needs; for None any token does, and an admin may do everything."""


_CHARGED = (
    "/zimage_rpc.encoder.v1.EncoderService/Encode",
    "/zimage_rpc.encoder.v1.EncoderService/EncodeStream",
    "/zimage_rpc.encoder.v1.EncoderService/EncodeSession",
    "/zimage_rpc.dit.v1.DitService/Generate",
)
"""What costs seconds of the device that are counted."""


class Token(BaseModel):
    """What a token lets its bearer do."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(min_length=1, description="of the bearer, for the log")
    token: str | None = Field(None, min_length=16, description="the token itself")
    sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="or its digest, so that the file is no secret"
    )
    roles: frozenset[Role] = Field(min_length=1)
    project: str = Field(DEFAULT_PROJECT, pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    calls_per_minute: float | None = Field(None, gt=0, description="on average; as many at once")
    calls_at_once: int | None = Field(None, ge=1)
    device_seconds_per_hour: float | None = Field(
        None, gt=0, description="of pictures and prompts; the call that spends the last is finished"
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.token is None) == (self.sha256 is None):
            raise ValueError("give either token or sha256")
        return self

    @property
    def digest(self) -> bytes:
        """Of the token."""
        return bytes.fromhex(self.sha256) if self.sha256 else _digest(self.token or "")


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    token: tuple[Token, ...] = Field(min_length=1)


@dataclass(slots=True)
class _Allowance:
    """So much of something, which comes back evenly over a time; full at first."""

    left: float = 0.0
    counted_at: float = float("-inf")

    def at(self, now: float, most: float, pace: float) -> float:
        """What is left of it."""
        self.left = min(most, self.left + (now - self.counted_at) * pace)
        self.counted_at = now
        return self.left


@dataclass(slots=True)
class _Account:
    """What a bearer may still take, and has."""

    calls: _Allowance = field(default_factory=_Allowance)
    device_seconds: _Allowance = field(default_factory=_Allowance)
    running: int = 0


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever makes a call."""

    token: Token
    account: _Account
    clock: Callable[[], float]

    def refuse_spent(self) -> None:
        """Raises Overloaded when the device's seconds are spent. Not what a call will take counts
        but what others took: nobody has to guess."""
        most = self.token.device_seconds_per_hour
        if most is None:
            return
        left = self.account.device_seconds.at(self.clock(), most, most / _HOUR)
        if left <= 0:
            limit = f"{most:g} s of the device an hour"
            raise _limited(self.token, limit, max(1.0, -left * _HOUR / most), "QUOTA_SPENT")


current: ContextVar[Caller | None] = ContextVar("caller", default=None)
"""Who makes the call at hand; None where no tokens are asked for."""


def project() -> str:
    """Whose call is at hand."""
    caller = current.get()
    return caller.token.project if caller else DEFAULT_PROJECT


def refuse_spent() -> None:
    """For calls that go on for long: raises Overloaded when nothing is left for more."""
    caller = current.get()
    if caller:
        caller.refuse_spent()


def charge(device_seconds: float) -> None:
    """Whoever's call is at hand has used the device for so long."""
    caller = current.get()
    if caller:
        caller.account.device_seconds.left -= device_seconds


@contextmanager
def inside(caller: Caller | None) -> Iterator[None]:
    """A call of the caller's; raises Overloaded when as many run as may."""
    current.set(caller)  # each call is a task of its own, with its own context
    if caller is None:
        yield
        return
    most = caller.token.calls_at_once
    if most is not None and caller.account.running >= most:
        raise _limited(caller.token, f"{most} calls at once", 1.0)
    caller.account.running += 1
    try:
        yield
    finally:
        caller.account.running -= 1


class Access:
    """The tokens in a file, which is read anew when it changes."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._stamp = stamp(path)
        self._tokens = _read(path)
        self._accounts: dict[str, _Account] = {}

    def caller(self, method: str, metadata: Mapping[str, str | bytes]) -> Caller:
        """Whoever calls; raises what keeps the call out."""
        token = self._bearer(metadata.get(HEADER))
        role = ROLES[method]
        if role and not token.roles & {role, "admin"}:
            raise Forbidden(
                f"the token of {token.name} has the roles {', '.join(sorted(token.roles))}; this "
                f"call needs {role}",
                reason="ROLE_MISSING",
                fields={"role": role},
            )
        account = self._accounts.setdefault(token.name, _Account())
        caller = Caller(token, account, self._clock)
        if method in _CHARGED:
            caller.refuse_spent()
        self._count(token, account)
        return caller

    def _bearer(self, header: str | bytes | None) -> Token:
        if header is None:
            raise Unauthenticated("this service asks for a token", reason="TOKEN_MISSING")
        self._refresh()
        text = header if isinstance(header, str) else header.decode(errors="replace")
        given = _digest(text.removeprefix(_SCHEME))
        # All of them, so that the time tells nothing.
        found = [token for token in self._tokens if hmac.compare_digest(token.digest, given)]
        if not found or not text.startswith(_SCHEME):
            raise Unauthenticated("this service does not know the token", reason="TOKEN_INVALID")
        return found[0]

    def _count(self, token: Token, account: _Account) -> None:
        if token.calls_per_minute is None:
            return
        pace = token.calls_per_minute / _MINUTE
        left = account.calls.at(self._clock(), max(1.0, token.calls_per_minute), pace)
        if left < 1:
            raise _limited(token, f"{token.calls_per_minute:g} calls a minute", (1 - left) / pace)
        account.calls.left -= 1

    def _refresh(self) -> None:
        now = stamp(self._path)
        if now == self._stamp:
            return
        self._stamp = now
        try:
            self._tokens = _read(self._path)
        except InvalidSettings as error:
            _log.error("the tokens stay what they were: %s", error.message)
        else:
            _log.info("%s tokens in %s", len(self._tokens), self._path)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _limited(
    token: Token, limit: str, retry_after: float, reason: str = "RATE_LIMITED"
) -> Overloaded:
    return Overloaded(
        f"the token of {token.name} is good for {limit}; there is more in {retry_after:.0f} s",
        reason=reason,
        fields={"allowed": limit},
        retry_after=retry_after,
    )


def _read(path: Path) -> tuple[Token, ...]:
    try:
        tokens = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).token
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise _unusable(path, f"{where}: {first['msg']}") from None  # it would show the token
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _unusable(path, str(error)) from error
    for what, values in (
        ("name", [token.name for token in tokens]),
        ("token", [token.digest for token in tokens]),
    ):
        if len(set(values)) < len(values):
            raise _unusable(path, f"two entries have the same {what}")
    return tokens


def _unusable(path: Path, why: str) -> InvalidSettings:
    return InvalidSettings(
        f"tokens {path}: {why}", reason="TOKENS", fields={"field": "tokens", "given": str(path)}
    )
