"""The DiT service as it runs: real processes, real sockets, the SDK as its users have it."""

import json
import shutil
import signal
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.services import PATIENCE_SECONDS, Service, answer, free_address, running
from zimage_client import (
    Accepted,
    Client,
    Completed,
    DeadlineTooShort,
    DeviceLost,
    Event,
    InvalidRequest,
    NotReady,
    Overloaded,
    Picture,
    Progress,
    Prompt,
    Unavailable,
    Waiting,
)
from zimage_client.cli.main import main as command
from zimage_rpc.dit.v1 import dit_pb2, dit_pb2_grpc

PROMPT = "a red circle on a blue background"
LONG = {"steps": 1000, "width": 128, "height": 128}
"""Takes minutes unless somebody ends it."""


@pytest.fixture(scope="module")
def encoder(model_folder: Path) -> Iterator[Service]:
    with running("encoder_service", "--model", str(model_folder)) as service:
        service.wait_until("SERVING")
        yield service


@pytest.fixture(scope="module")
def dit(model_folder: Path, encoder: Service) -> Iterator[Service]:
    with running("dit_service", "--model", str(model_folder), "--encoder", encoder.address) as it:
        it.wait_until("SERVING")
        yield it


@pytest.fixture
def client(dit: Service) -> Iterator[Client]:
    with Client(dit.address) as client:
        yield client


def _pixels(picture: Picture) -> str:
    assert picture.pixels_sha256
    return picture.pixels_sha256


def _busy(client: Client) -> Generator[Event, None, None]:
    """A long request that is under way; closing it ends it."""
    events = client.stream(PROMPT, seed=1, retry=False, **LONG)
    for event in events:
        if isinstance(event, Progress) and event.step >= 2:
            break
    return events


def test_a_prompt_becomes_the_picture_that_diffusers_makes(
    client: Client, model_folder: Path
) -> None:
    import io

    import numpy as np
    import torch
    from diffusers import ZImagePipeline
    from PIL import Image

    pipeline = ZImagePipeline.from_pretrained(model_folder, dtype=torch.float32)
    [theirs] = pipeline(
        PROMPT,
        width=128,
        height=96,
        num_inference_steps=8,
        guidance_scale=0.0,
        generator=torch.Generator("cpu").manual_seed(5),
    ).images
    [ours] = client.generate(PROMPT, width=128, height=96, seed=5).pictures
    pixels = np.asarray(Image.open(io.BytesIO(ours.data))).astype(int)
    assert np.abs(pixels - np.asarray(theirs).astype(int)).max() <= 1


def test_info_says_what_the_services_are(
    dit: Service, encoder: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["info", "--server", dit.address]
    assert command([*here, "--encoder", encoder.address]) == 0
    shown = capsys.readouterr().out
    for said in (f"DiT service at {dit.address}", "turbo, shift 3", "sdpa", "idle", "8 steps"):
        assert said in shown
    assert f"encoder service at {encoder.address}" in shown
    assert command([*here, "--encoder", "unix:/nowhere", "--timeout", "1", "--json"]) == 4
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["worker"]["state"] == "idle"
    assert first["model"]["variant"] == "turbo"
    assert second["error"]
    assert command(["info"]) in (0, 4)  # whatever embedded stack somebody has here


def test_events_follow_the_grammar(client: Client) -> None:
    events = list(client.stream(PROMPT, seed=3, count=2, steps=3))
    assert isinstance(events[0], Accepted)
    assert (events[0].forward_count, len(events[0].sigmas)) == (6, 4)
    assert isinstance(events[-1], Completed)
    assert sum(isinstance(event, Completed) for event in events) == 1
    pictures = [event for event in events if isinstance(event, Picture)]
    assert [(picture.index, picture.seed) for picture in pictures] == [(0, 3), (1, 4)]
    steps = [
        (event.index, event.step)
        for event in events
        if isinstance(event, Progress) and event.stage == "denoising"
    ]
    assert steps == sorted(steps)  # fast steps may go untold
    assert {(0, 0), (1, 0)} <= set(steps) <= {(i, step) for i in (0, 1) for step in (0, 1, 2)}
    assert events[-1].usage.forward_count == 6


def test_raw_messages_are_numbered_and_timed(dit: Service) -> None:
    spec = dit_pb2.GenerateSpec(seed=1, step_count=1)
    spec.positive.segments.add().prompt.text = PROMPT
    stub = dit_pb2_grpc.DitServiceStub(dit.channel)
    requests = iter([dit_pb2.GenerateRequest(spec=spec)])
    call = stub.Generate(requests, timeout=PATIENCE_SECONDS)
    responses = list(call)
    assert [response.sequence for response in responses] == list(range(1, len(responses) + 1))
    assert all(response.event_time.seconds for response in responses)
    assert dict(call.trailing_metadata())["zimage-status"] == "ok"


def test_large_pictures_come_in_pieces(client: Client) -> None:
    [picture] = client.generate(PROMPT, width=704, height=640, steps=1, seed=1).pictures
    assert len(picture.data) > 1 << 20


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_every_format_is_a_file_of_its_kind(client: Client, file_format: str) -> None:
    import io

    from PIL import Image

    [picture] = client.generate(PROMPT, seed=1, steps=1, format=file_format).pictures
    image = Image.open(io.BytesIO(picture.data))
    assert image.format == file_format.upper()
    assert picture.media_type == f"image/{file_format}"


def test_leaving_ends_the_work_at_the_next_step(client: Client, dit: Service) -> None:
    events = _busy(client)
    events.close()
    # Behind a request that still ran, this one would wait for minutes.
    assert client.generate(PROMPT, seed=1, steps=1, timeout=PATIENCE_SECONDS).pictures
    assert dit.wait_for_line("Generate CANCELLED")


def test_a_deadline_ends_the_work(client: Client) -> None:
    with pytest.raises(DeadlineTooShort):
        client.generate(PROMPT, seed=1, timeout=1.0, **LONG)
    assert client.generate(PROMPT, seed=1, steps=1, timeout=PATIENCE_SECONDS).pictures


def test_the_request_id_goes_through_every_hop(dit: Service, encoder: Service) -> None:
    spec = dit_pb2.GenerateSpec(seed=1, step_count=1)
    spec.positive.segments.add().prompt.text = PROMPT
    stub = dit_pb2_grpc.DitServiceStub(dit.channel)
    requests = iter([dit_pb2.GenerateRequest(spec=spec)])
    list(stub.Generate(requests, metadata=[("x-request-id", "follow-me")]))
    for service in (dit, encoder):
        assert service.wait_for_line('"request_id": "follow-me"')


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"width": 100}, "spec.width_px"),
        ({"height": 2048}, "spec.height_px"),
        ({"steps": 0}, "spec.step_count"),
        ({"guidance": 2.0}, "spec.guidance_scale"),
        ({"sigmas": [0.1, 0.9]}, "spec.schedule.sigmas"),
    ],
)
def test_bad_requests_are_refused_by_field(
    client: Client, options: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        client.generate(PROMPT, **options)  # type: ignore[arg-type]
    assert refusal.value.field == field


def test_a_prompt_beyond_the_tables_is_refused(client: Client) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        client.generate("word " * 1000)
    assert refusal.value.reason == "TOKEN_LIMIT"


def test_embeddings_of_another_shape_or_with_holes_are_refused(
    client: Client, encoder: Service
) -> None:
    with Client(encoder=encoder.address) as encoding:
        embedding = encoding.encode(PROMPT)
    rows, width = embedding.tensor.shape
    narrow = replace(
        embedding.tensor, shape=(rows, width // 2), data=bytes(len(embedding.tensor.data) // 2)
    )
    with pytest.raises(InvalidRequest) as refusal:
        client.generate(replace(embedding, tensor=narrow))
    assert refusal.value.reason == "EMBEDDING_MISMATCH"
    holes = replace(embedding.tensor, data=b"\xff" * len(embedding.tensor.data))
    with pytest.raises(InvalidRequest) as refusal:
        client.generate(replace(embedding, tensor=holes))
    assert refusal.value.reason == "EMBEDDING_NOT_FINITE"


def test_embeddings_of_another_encoder_are_refused(client: Client, base_folder: Path) -> None:
    with running("encoder_service", "--model", str(base_folder)) as stranger:
        stranger.wait_until("SERVING")
        with Client(encoder=stranger.address) as encoding:
            embedding = encoding.encode(PROMPT)
    with pytest.raises(NotReady) as refusal:
        client.generate(embedding)
    assert refusal.value.reason == "ENCODER_MISMATCH"
    assert embedding.identity in refusal.value.message


def test_a_measured_stranger_is_taken_by_a_setting(
    encoder: Service, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that lost a little is another encoder; how near it is was measured."""
    other = Path(shutil.copytree(model_folder, tmp_path / "other"))
    [path] = (other / "text_encoder").glob("*.safetensors")
    save_file({name: one.half() for name, one in load_file(path).items()}, path)
    drifts = tmp_path / "drifts.json"
    with running("encoder_service", "--model", str(other)) as stranger:
        stranger.wait_until("SERVING")
        both = [encoder.address, stranger.address]
        assert command(["verify-encoder", *both, "--write", str(drifts)]) == 0
        assert "this is near" in capsys.readouterr().out
        with Client(encoder=stranger.address) as encoding:
            embedding = encoding.encode(PROMPT)
    model = "--model", str(model_folder), "--encoder-drifts", str(drifts)
    with running("dit_service", *model) as dit, Client(dit.address) as client:
        dit.wait_until("SERVING")
        of = client.generate(embedding, seed=1, steps=1).completed.positive
        assert not of.identity_verified
        assert of.worst_cosine is not None
        assert 0.995 < of.worst_cosine < 1
        told = dit.wait_for_line(embedding.identity, "are taken for those of")
        assert f"cosine {of.worst_cosine:.5f} at the worst" in told
        with pytest.raises(NotReady) as refusal:
            client.generate(replace(embedding, identity="ab" * 32))
        assert refusal.value.reason == "ENCODER_MISMATCH"
    limit = "--encoder-drift-limit", "1"
    with running("dit_service", *model, *limit) as dit, Client(dit.address) as client:
        dit.wait_until("SERVING")
        with pytest.raises(NotReady) as refusal:
            client.generate(embedding)
        assert refusal.value.reason == "ENCODER_DRIFT"
        own = json.loads(drifts.read_text())["drifts"][0]["pinned"]
        assert {embedding.identity, own} <= set(refusal.value.fields.values())


@pytest.mark.parametrize("layer", [0, 5, -9])
def test_no_layer_leads_around_the_pin(client: Client, encoder: Service, layer: int) -> None:
    with Client(encoder=encoder.address) as encoding:
        embedding = encoding.encode(PROMPT)
    stranger = replace(
        embedding, identity="ab" * 32, recipe=replace(embedding.recipe, hidden_layer=layer)
    )
    with pytest.raises(InvalidRequest, match="hidden layer"):
        client.generate(stranger)


def test_the_encoders_refusals_are_told_in_our_words(client: Client) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        client.generate(Prompt(PROMPT, hidden_layer=-1))
    assert refusal.value.reason == "HIDDEN_LAYER"
    assert refusal.value.field.startswith("spec.positive.segments[0].prompt")


def _nested(raw: bytes, depth: int) -> bytes:
    """The bytes as field 1 of field 1 of ..."""
    return raw if depth == 0 else _nested(b"\x0a" + bytes([len(raw)]) + raw, depth - 1)


@pytest.mark.parametrize(
    ("method", "raw"),
    [
        ("Generate", b"\xff\xff\xff"),
        ("Generate", _nested(b"\x0a\x01\xff", 4)),  # a prompt's text that is not UTF-8
        ("Describe", b"\xff\xff\xff"),
    ],
)
def test_bytes_that_are_no_message_are_a_typed_error(dit: Service, method: str, raw: bytes) -> None:
    call = dit.channel.stream_stream(f"/zimage_rpc.dit.v1.DitService/{method}")
    with pytest.raises(InvalidRequest) as refusal:
        answer(lambda raw, **options: list(call(iter([raw]), **options)), raw)
    assert refusal.value.reason == "MALFORMED"


def test_a_list_of_a_million_numbers_is_refused_in_a_few_words(client: Client) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        client.generate(PROMPT, sigmas=[0.1, 0.9] * 500_000)
    assert len(refusal.value.message) < 2_000


def _answers(dit: Service, *requests: dit_pb2.GenerateRequest) -> list[dit_pb2.GenerateResponse]:
    """What the service says to raw messages."""
    stub = dit_pb2_grpc.DitServiceStub(dit.channel)
    return answer(lambda sent, **options: list(stub.Generate(sent, **options)), iter(requests))


@pytest.mark.parametrize("specs", [0, 2])
def test_one_spec_is_wanted_and_no_more(dit: Service, specs: int) -> None:
    request = dit_pb2.GenerateRequest(spec=dit_pb2.GenerateSpec())
    with pytest.raises(InvalidRequest) as refusal:
        _answers(dit, *[request] * specs)
    assert refusal.value.reason == "GRAMMAR"


def test_unknown_fields_are_refused(dit: Service) -> None:
    spec = dit_pb2.GenerateSpec()
    spec.positive.segments.add().prompt.MergeFromString(b"\xf8\x3f\x01")
    with pytest.raises(InvalidRequest) as refusal:
        _answers(dit, dit_pb2.GenerateRequest(spec=spec))
    assert refusal.value.reason == "UNKNOWN_FIELD"
    assert refusal.value.field == "GenerateRequest.spec.positive.segments[0].prompt"


def test_a_killed_worker_costs_time_and_nothing_else(client: Client, dit: Service) -> None:
    [before] = client.generate(PROMPT, seed=4, steps=60).pictures
    waits, pixels = [], ""
    killed = False
    for event in client.stream(PROMPT, seed=4, steps=60):
        match event:
            case Progress(step=step) if step >= 2 and not killed:
                dit.worker.kill()
                killed = True
            case Waiting(reason=reason):
                waits.append(reason)
            case Completed(artifacts=(artifact,)):
                pixels = artifact.pixels_sha256
    assert waits[0] == "DEVICE_LOST"
    assert pixels == _pixels(before)


def test_without_retry_a_killed_worker_is_an_error(client: Client, dit: Service) -> None:
    events = _busy(client)
    dit.worker.kill()
    with pytest.raises(DeviceLost):
        list(events)
    dit.wait_until("SERVING")


def test_a_hung_worker_is_replaced(model_folder: Path, encoder: Service) -> None:
    with running(
        "dit_service",
        *("--model", str(model_folder), "--encoder", encoder.address),
        ZIMAGE_DIT__WATCHDOG__SILENCE_SECONDS="2",
    ) as dit:
        dit.wait_until("SERVING")
        dit.worker.suspend()
        with Client(dit.address) as client:
            assert client.generate(PROMPT, seed=1, steps=1).pictures
        assert dit.wait_for_line("hung")


def test_a_killed_front_takes_its_worker_along(model_folder: Path) -> None:
    with running("dit_service", "--model", str(model_folder)) as dit:
        dit.wait_until("SERVING")
        worker = dit.worker
        dit.process.kill()
        worker.wait(PATIENCE_SECONDS)
        assert not psutil.pid_exists(worker.pid)


def test_draining_finishes_what_runs(model_folder: Path, encoder: Service) -> None:
    flags = "--model", str(model_folder), "--encoder", encoder.address
    with running("dit_service", *flags, "--drain-delay-seconds", "2") as dit:
        dit.wait_until("SERVING")
        assert [dit.probe("livez"), dit.probe("readyz")] == [200, 200]
        with Client(dit.address) as client:
            events = client.stream(PROMPT, seed=1, steps=40, retry=False)
            for event in events:
                if isinstance(event, Progress) and event.step >= 2:
                    break
            worker = dit.worker
            worker.suspend()
            dit.process.send_signal(signal.SIGTERM)
            dit.wait_until("NOT_SERVING")
            assert [dit.probe("livez"), dit.probe("readyz")] == [200, 503]
            _ask_until_refused(client)
            worker.resume()
            assert isinstance(list(events)[-1], Completed)
        assert dit.wait_for_exit() == 0


def test_doctor_tells_an_encoder_of_another_model(
    dit: Service, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running("encoder_service", "--model", str(base_folder)) as stranger:
        stranger.wait_until("SERVING")
        between = ["--server", dit.address, "--encoder", stranger.address]
        assert command(["doctor", "--json", *between]) == 1
    wrong = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (wrong["check"], wrong["verdict"]) == ("encoder", "wrong")
    assert "the DiT service takes" in wrong["said"]


def test_what_best_goes_where_is_measured(
    dit: Service, encoder: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    between = ["--server", dit.address, "--encoder", encoder.address]
    assert command(["plan", "--here", "--json", *between]) == 0
    told = list(map(json.loads, capsys.readouterr().out.splitlines()))
    measured, advised = told[:2], told[2:]
    assert [one["address"] for one in measured] == [encoder.address, dit.address]
    seconds = [one[name] for one in measured for name in one if name.endswith("_seconds")]
    assert len(seconds) == 4
    assert all(0 < one < 60 for one in seconds)
    assert [one["part"] for one in advised] == ["DiT", "VAE", "encoder", "trainer"]


def test_what_is_not_done_by_the_end_of_grace_is_cut(model_folder: Path, encoder: Service) -> None:
    flags = "--model", str(model_folder), "--encoder", encoder.address
    with running("dit_service", *flags, "--grace-seconds", "0.5") as dit:
        dit.wait_until("SERVING")
        with Client(dit.address) as client:
            events = _busy(client)
            dit.process.send_signal(signal.SIGTERM)
            with pytest.raises(Unavailable) as caught:
                list(events)
        assert caught.value.reason == "UNREACHABLE"
        assert dit.wait_for_exit() == 0


def _ask_until_refused(client: Client) -> None:
    """Balancers have the drain's delay to notice; then nobody listens any more."""
    with suppress(Unavailable):
        while True:
            client.describe()


def test_an_old_connection_is_left_without_cutting_a_stream(
    model_folder: Path, encoder: Service
) -> None:
    flags = "--model", str(model_folder), "--encoder", encoder.address
    at = free_address()
    with running("dit_service", *flags, "--connection-age-seconds", "1", listen=at) as dit:
        dit.wait_until("SERVING")
        with Client(dit.address) as client:
            events = client.stream(PROMPT, seed=1, steps=10, retry=False)
            next(events)
            worker = dit.worker
            worker.suspend()
            used = _connections(dit)
            while not _connections(dit) - used:  # calls go over a fresh one
                client.describe()
            worker.resume()
            assert isinstance(list(events)[-1], Completed)


def _connections(dit: Service) -> set[Any]:
    """Those of this process to the service."""
    port = int(dit.address.rpartition(":")[2])
    mine = psutil.Process().net_connections("tcp")
    return {one.laddr for one in mine if one.raddr and one.raddr.port == port}


def test_a_full_queue_says_when_to_come_back(model_folder: Path, encoder: Service) -> None:
    with running(
        "dit_service",
        *("--model", str(model_folder), "--encoder", encoder.address, "--max-queue-length", "1"),
    ) as dit:
        dit.wait_until("SERVING")
        with Client(dit.address) as client:
            runs = _busy(client)
            waits = client.stream(PROMPT, seed=2, retry=False, **LONG)
            accepted = next(waits)
            assert isinstance(accepted, Accepted)
            assert accepted.queue_position == 1
            with pytest.raises(Overloaded) as refusal:
                client.generate(PROMPT, seed=3, retry=False)
            assert refusal.value.reason == "QUEUE_FULL"
            assert refusal.value.retry_after
            runs.close()
            waits.close()
            assert client.generate(PROMPT, seed=3, steps=1).pictures


def test_an_encoder_that_goes_and_comes_back_is_waited_for(model_folder: Path) -> None:
    flags = ("--model", str(model_folder))
    with running("encoder_service", *flags) as first:
        first.wait_until("SERVING")
        with running("dit_service", *flags, "--encoder", first.address) as dit:
            dit.wait_until("SERVING")
            first.process.kill()
            first.wait_for_exit()
            with Client(dit.address) as client:
                with pytest.raises(Unavailable) as refusal:
                    client.generate(PROMPT, retry=False)
                assert refusal.value.reason == "ENCODER_UNAVAILABLE"
                with running("encoder_service", *flags, listen=first.address):
                    assert client.generate(PROMPT, seed=1, steps=1).pictures


def test_without_an_encoder_prompts_are_refused_and_embeddings_taken(
    model_folder: Path, encoder: Service
) -> None:
    with running("dit_service", "--model", str(model_folder)) as dit:
        with Client(dit.address) as client:
            assert client.describe().ready in (True, False)  # answers while it loads, too
            dit.wait_until("SERVING")
            assert not client.describe().has_encoder
            with pytest.raises(NotReady) as refusal:
                client.generate(PROMPT)
            assert refusal.value.reason == "NO_ENCODER"
        with Client(dit.address, encoder.address) as client:
            assert client.generate(PROMPT, seed=1, steps=1).pictures


def test_base_is_guided_by_default(base_folder: Path) -> None:
    with running("encoder_service", "--model", str(base_folder)) as encoder:
        encoder.wait_until("SERVING")
        flags = ("--model", str(base_folder), "--encoder", encoder.address)
        with running("dit_service", *flags) as dit, Client(dit.address) as client:
            plain = client.generate(PROMPT, seed=1, steps=4)
            assert plain.accepted.guidance == 2.5
            assert plain.completed.usage.forward_count == 8
            assert plain.completed.negative is not None
            other = client.generate(PROMPT, seed=1, steps=4, negative="blurry")
            off = client.generate(PROMPT, seed=1, steps=4, guidance=0.0)
            assert off.completed.usage.forward_count == 4
            assert len({_pixels(one.pictures[0]) for one in (plain, other, off)}) == 3


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--model", "/nowhere"], 1, "there is no such model folder"),
        (["--model", "/nowhere", "--listen", "0.0.0.0:0"], 2, "--insecure"),
        (["--model", "/nowhere", "--device", "mps"], 2, "device mps"),
        (["--model", "/nowhere", "--dtype", "float64"], 2, "dtype (flag)"),
        (["--model", "/nowhere", "--devise", "cpu"], 2, "unrecognized"),
    ],
)
def test_what_cannot_be_served_is_said_at_start(flags: list[str], code: int, says: str) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "dit_service", "--listen", "127.0.0.1:0", "--probes", ""]
    result = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert says in result.stderr
    assert "Traceback" not in result.stderr
