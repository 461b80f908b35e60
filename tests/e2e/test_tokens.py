"""Tokens between real processes: on the way to the DiT service, and from there to the encoder."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.services import PATIENCE_SECONDS, Service, running
from zimage_client import (
    AsyncClient,
    Client,
    Forbidden,
    InvalidRequest,
    InvalidSettings,
    NotReady,
    Overloaded,
    Progress,
)
from zimage_client.cli.main import main as command

ENTRY = """
[[token]]
name = "{name}"
token = "{name}-0123456789abcdef"
roles = ["{role}"]
{more}
"""
POOR = ("poor", "hasty", "first")
LIMITS = {
    "rare": "calls_per_minute = 1",
    **dict.fromkeys(POOR, "device_seconds_per_hour = 0.01"),
}


def _file(folder: Path, **roles: str) -> list[str]:
    """The flag for a file of tokens by these names; beside it, a file with each token."""
    path = folder / f"{'-'.join(roles)}.toml"
    entries = []
    for name, role in roles.items():
        entries.append(ENTRY.format(name=name, role=role, more=LIMITS.get(name, "")))
        (folder / name).write_text(f"{name}-0123456789abcdef\n")
    path.write_text("".join(entries))
    return ["--tokens", str(path)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "stranger").write_text("stranger-0123456789abcdef\n")
    return folder


@pytest.fixture(scope="module")
def dit(model_folder: Path, folder: Path) -> Iterator[Service]:
    model = ["--model", str(model_folder)]
    with running("encoder_service", *model, *_file(folder, dit="encode")) as encoder:
        flags = ["--encoder", encoder.address, "--encoder-token-file", str(folder / "dit")]
        users = _file(
            folder,
            painter="generate",
            writer="encode",
            rare="generate",
            **dict.fromkeys(POOR, "generate"),
        )
        with running("dit_service", *model, *users, *flags) as service:
            service.wait_until("SERVING")  # health asks for no token
            yield service


def _generate(dit: Service, folder: Path, name: str, *more: str) -> int:
    token = ["--token-file", str(folder / name)] if name else []
    flags = ["--server", dit.address, "--steps", "2", "--overwrite", *token, *more]
    return command(["generate", "a red circle", "-o", str(folder / "x.png"), *flags])


def test_who_has_the_role_gets_pictures(dit: Service, folder: Path) -> None:
    assert _generate(dit, folder, "painter") == 0
    assert " by painter" in dit.wait_for_line("Generate OK")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "asks for a token"),
        ("stranger", "does not know the token"),
        ("writer", "needs generate"),
        ("nowhere", "No such file"),
    ],
)
def test_others_are_told_why_not(
    dit: Service, folder: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    assert _generate(dit, folder, name) == (2 if name == "nowhere" else 3)
    assert said in capsys.readouterr().err
    if name != "nowhere":
        dit.wait_for_line(said)


async def test_a_refusal_is_heard_also_where_it_crosses_a_message(
    dit: Service, folder: Path
) -> None:
    front = psutil.Process(dit.process.pid)

    async def files() -> AsyncIterator[bytes]:
        await asyncio.sleep(0.1)  # the call is begun
        front.resume()
        time.sleep(0.5)  # noqa: ASYNC251 - the refusal comes while nobody looks
        yield b"no picture"

    async with AsyncClient(dit.address, token=folder / "writer") as client:
        await client.describe()
        front.suspend()
        try:
            with pytest.raises(Forbidden, match="needs generate"):
                [one async for one in client.encode_images(files())]
        finally:
            front.resume()
    dit.wait_for_line("EncodeImages PERMISSION_DENIED")
    assert len([line for line in dit.log if "EncodeImages" in line]) == 1, "it was asked again"


def test_what_the_encoder_has_against_the_dit_is_not_the_users_fault(
    dit: Service, folder: Path
) -> None:
    right = (folder / "dit").read_text()
    for token, cause in (
        ((folder / "stranger").read_text(), "TOKEN_INVALID"),
        ("", "INVALID_SETTINGS"),
    ):
        (folder / "dit").write_text(token)
        try:
            with (
                Client(dit.address, token=folder / "painter") as client,
                pytest.raises(NotReady, match="refuses this DiT service") as caught,
            ):
                client.generate("x", steps=1)
        finally:
            (folder / "dit").write_text(right)
        assert caught.value.reason == "ENCODER_REFUSES"
        assert caught.value.fields["cause"] == cause
        assert str(folder) not in caught.value.message
    dit.wait_for_line("holds no token")


def test_what_others_do_on_the_device_only_admins_see(dit: Service, folder: Path) -> None:
    with (
        Client(dit.address, token=folder / "painter") as client,
        pytest.raises(Forbidden, match="needs admin"),
    ):
        client.trace()


@pytest.mark.parametrize(
    ("name", "check", "advice"),
    [
        ("", "service", "give --token-file"),
        ("stranger", "service", "give --token-file"),
        ("writer", "picture", "ask for a token with that role"),
        ("painter", "", ""),
    ],
)
def test_doctor_says_which_token_is_wanted(
    dit: Service,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    check: str,
    advice: str,
) -> None:
    token = ["--token-file", str(folder / name)] if name else []
    code = command(["doctor", "--json", "--server", dit.address, *token])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == (1 if check else 0)
    wrong = [(one["check"], one["advice"]) for one in found if one["verdict"] == "wrong"]
    assert [what for what, _ in wrong] == ([check] if check else [])
    assert all(advice in said for _, said in wrong)


def test_a_rate_is_kept(dit: Service, folder: Path) -> None:
    with Client(dit.address, token=folder / "rare") as client:
        client.describe()
        with pytest.raises(Overloaded, match="1 calls a minute") as caught:
            client.generate("x", retry=False)
    assert caught.value.reason == "RATE_LIMITED"
    assert 0 < (caught.value.retry_after or 0) <= 60


def _wrong_until_refused(client: Client) -> None:
    """Who leaves is charged a moment later; wrong requests cost nothing."""
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        with pytest.raises(InvalidRequest):
            client.generate("x", steps=0)


@pytest.mark.parametrize("name", POOR)
def test_a_quota_is_kept_also_by_who_leaves_early(dit: Service, folder: Path, name: str) -> None:
    if name == "hasty":
        with Client(dit.address, token=folder / "painter") as client:
            client.generate("x", steps=4, width=64, height=64)  # so that its seconds are known
    side = 192 if name == "first" else 64  # nothing so large was made yet
    with Client(dit.address, token=folder / name) as client:
        for event in client.stream("x", steps=50, width=side, height=side):
            if name != "poor" and isinstance(event, Progress) and event.step > 5:
                break
        with pytest.raises(Overloaded, match="of the device an hour") as caught:
            _wrong_until_refused(client)
    assert caught.value.reason == "QUOTA_SPENT"


def test_a_token_that_changes_in_its_file_is_the_next_one_sent(dit: Service, folder: Path) -> None:
    moved = folder / "moved"
    moved.write_text((folder / "writer").read_text())
    with Client(dit.address, token=moved) as client:
        with pytest.raises(Forbidden):
            client.generate("x", steps=1)
        moved.write_text((folder / "painter").read_text())
        client.generate("x", steps=1)


def test_no_token_leaves_in_the_clear() -> None:
    for address in ("gpu.local:50052", "192.0.2.1:50052"):
        with pytest.raises(InvalidSettings, match="for anybody on the way to read"):
            AsyncClient(address, token="x" * 16)
    for address in ("grpc://gpu.local:50052", "grpcs://gpu.local:50052", "127.0.0.1:1", "unix:/x"):
        AsyncClient(address, token="x" * 16)
