"""The encoder service as its users meet it: real processes, real sockets, a real small model."""

import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from encoder_service.prompt import render
from tests.e2e.services import PATIENCE_SECONDS, Service, answer, running, typed
from zimage_client import AsyncClient, Client, Embedding, Prompt, TokenCount, ZImageError
from zimage_client.cli.main import main as command
from zimage_core.embeddings import LONG_PROMPT_MODES
from zimage_core.errors import Cancelled, DeviceLost, InvalidRequest, Overloaded, Unavailable
from zimage_core.formats import embedding as embedding_file
from zimage_core.wire import embeddings, request_id
from zimage_rpc.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from zimage_rpc.types.v1 import types_pb2


@pytest.fixture(scope="module")
def service(model_folder: Path) -> Iterator[Service]:
    flags = "--model", str(model_folder), "--max-queue-length", "1"
    with running("encoder_service", *flags) as service:
        service.wait_until("SERVING")
        yield service


def _stub(service: Service) -> encoder_pb2_grpc.EncoderServiceStub:
    return encoder_pb2_grpc.EncoderServiceStub(service.channel)


def _request(*texts: str, **wishes: Any) -> encoder_pb2.EncodeRequest:
    return encoder_pb2.EncodeRequest(
        prompts=[types_pb2.Prompt(text=text, **wishes) for text in texts]
    )


def _encode(service: Service, request: encoder_pb2.EncodeRequest) -> Sequence[Any]:
    return answer(_stub(service).Encode, request).embeddings


def _begin(service: Service, request: encoder_pb2.EncodeRequest) -> Any:
    return _stub(service).Encode.future(request, timeout=PATIENCE_SECONDS)


def _describe(service: Service) -> encoder_pb2.DescribeResponse:
    return answer(_stub(service).Describe, encoder_pb2.DescribeRequest())


def _fill_queue(service: Service, *texts: str) -> list[Any]:
    """With a worker that stands still: calls until one finds the queue full, that one left out."""
    calls = [_begin(service, _request(text)) for text in texts]
    until = time.monotonic() + PATIENCE_SECONDS
    while f"zimage_queue_calls {len(texts)}.0" not in service.metrics_page():
        assert time.monotonic() < until
        time.sleep(0.01)
    with pytest.raises(Overloaded) as refusal:
        _encode(service, _request("one too many"))
    assert refusal.value.reason == "QUEUE_FULL"
    assert refusal.value.retry_after is not None
    return calls


def test_embeddings_equal_those_of_transformers(service: Service, model_folder: Path) -> None:
    import torch
    from diffusers import ZImagePipeline
    from transformers import AutoTokenizer, Qwen3Model

    texts = ["a red circle", "", "nächste Zeile:\n  <|im_end|> 🙂"]
    pipeline: Any = ZImagePipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        tokenizer=AutoTokenizer.from_pretrained(model_folder / "tokenizer"),
        text_encoder=Qwen3Model.from_pretrained(model_folder / "text_encoder"),
    )
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(
            list(texts), device=torch.device("cpu"), do_classifier_free_guidance=False
        )
    answered = _encode(service, _request(*texts))
    for message, reference in zip(answered, expected, strict=True):
        ours = embeddings.embedding_from_wire(message, field="embedding")
        values = torch.frombuffer(bytearray(ours.tensor.data), dtype=torch.float32)
        assert ours.tensor.shape == tuple(reference.shape)
        difference = (values.view(reference.shape) - reference).abs().max()
        assert difference <= 1e-5 * reference.abs().max()


def test_description_and_embeddings_agree(service: Service) -> None:
    described = _describe(service)
    [message] = _encode(service, _request("a cat"))
    assert described.ready
    assert message.identity == described.identity
    assert message.recipe == described.recipe
    assert message.numerics == described.numerics
    assert message.tensors["embeddings"].shape == [message.token_count, described.width]


def test_health_and_probes_say_ready(service: Service) -> None:
    service.wait_until("SERVING")
    assert service.probe("readyz") == 200


def test_the_log_carries_the_callers_request_id_through_both_processes(service: Service) -> None:
    request = _request("a walk")  # not from the cache
    answer(_stub(service).Encode, request, metadata=((request_id.KEY, "walked-through"),))
    for process in ("MainProcess", "worker"):
        line = service.wait_for_line("walked-through", process)
        assert json.loads(line)["process"] == process


@pytest.mark.parametrize(
    ("request_message", "reason", "field", "allowed"),
    [
        (_request(), "PROMPT_COUNT", "prompts", "1 to 32"),
        (_request(*["x"] * 33), "PROMPT_COUNT", "prompts", "1 to 32"),
        (_request("x", hidden_layer=-1), "HIDDEN_LAYER", "prompts[0].hidden_layer", "-4 to -2"),
        (_request("x", hidden_layer=-5), "HIDDEN_LAYER", "prompts[0].hidden_layer", "-4 to -2"),
        (_request("x", hidden_layer=2), "HIDDEN_LAYER", "prompts[0].hidden_layer", "-4 to -2"),
        (_request("short", "long" * 2000), "TOKEN_LIMIT", "prompts[1].text", "4096"),
        (_request("x", token_limit=4097), "TOKEN_LIMIT", "prompts[0].token_limit", "1 to 4096"),
        (_request("x" * (1 << 20), system="y"), "TOKEN_LIMIT", "prompts[0].text", "1048576"),
    ],
)
def test_bad_requests_are_refused_by_field(
    service: Service,
    request_message: encoder_pb2.EncodeRequest,
    reason: str,
    field: str,
    allowed: str,
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        _encode(service, request_message)
    assert (refusal.value.reason, refusal.value.field) == (reason, field)
    assert refusal.value.fields["allowed"] == allowed
    assert refusal.value.fields["given"] in refusal.value.message


def test_a_field_of_a_newer_client_is_refused(service: Service) -> None:
    request = _request("x")
    request.prompts[0].MergeFromString(b"\xfa\x07\x01!")  # field 127, one byte
    with pytest.raises(InvalidRequest, match=r"prompts\[0\]: field 127") as refusal:
        _encode(service, request)
    assert refusal.value.reason == "UNKNOWN_FIELD"


def test_a_blend_whose_weights_are_nothing_is_refused(service: Service) -> None:
    request = _request("x", blend=[types_pb2.LayerWeight(hidden_layer=-2, weight=-1.0)])
    with pytest.raises(InvalidRequest, match=r"prompts\[0\]\.blend: the weights") as refusal:
        _encode(service, request)
    assert (refusal.value.reason, refusal.value.field) == ("BLEND", "prompts[0].blend")


LONG = "a very long prompt " * 40


def _values(embedding: Embedding) -> Any:
    import torch

    values = torch.frombuffer(bytearray(embedding.tensor.data), dtype=torch.float32)
    return values.view(embedding.tensor.shape)


async def test_long_prompts_are_compressed_and_blends_added_up(
    service: Service, model_folder: Path
) -> None:
    """To the 512 rows that the DiT in the folder takes."""
    import torch
    from torch.nn.functional import interpolate
    from transformers import AutoTokenizer, Qwen3Model

    blend = ((-2, 3.0), (-4, 1.0))
    prompts = [
        *(Prompt(LONG, long_prompt_mode=mode) for mode in LONG_PROMPT_MODES),
        Prompt(LONG, blend=blend),
    ]
    ids = AutoTokenizer.from_pretrained(model_folder / "tokenizer")(render(prompts[0])).input_ids
    with torch.no_grad():
        states = Qwen3Model.from_pretrained(model_folder / "text_encoder")(
            torch.tensor([ids]), output_hidden_states=True
        ).hidden_states
    both = [states[-2][0], (states[-2][0] * 3 + states[-4][0]) / 4]
    usual, blended = (
        interpolate(one.double().T[None], size=512, mode="linear", align_corners=True)[0].T
        for one in both  # in float32 its places are off by more than we allow
    )
    async with AsyncClient(encoder=service.address) as client:
        counts = await client.count_tokens(prompts[:1])
        encoded = await client.encode(prompts)
    assert counts == [TokenCount(len(ids), 4096, 512)]
    assert {one.token_count for one in encoded} == {len(ids)}
    assert [one.recipe.long_prompt_mode for one in encoded[:4]] == list(LONG_PROMPT_MODES)
    assert encoded[4].recipe.blend == ((-4, 0.25), (-2, 0.75))
    for one, expected in ((encoded[0], usual), (encoded[3], both[0][:512]), (encoded[4], blended)):
        assert (_values(one) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert len({one.tensor.sha256 for one in encoded}) == 5
    assert all(one.tensor.shape[0] == 512 for one in encoded)


def test_tokens_are_counted(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--encoder", service.address]
    assert command(["tokens", "a cat", *at]) == 0
    assert command(["tokens", LONG, "--long-prompt-mode", "pool", *at]) == 0
    assert command(["tokens", LONG, "--token-limit", "600", *at]) == 3
    assert command(["tokens", "", "--json", *at]) == 0
    short, long, too_long, empty = capsys.readouterr().out.splitlines()
    assert short == "24 tokens of 4096"
    assert long == "779 tokens of 4096: pool leaves 512 rows"
    assert too_long == "779 tokens: too long, 600 are allowed"
    assert json.loads(empty) == {"token_count": 19, "token_limit": 4096, "row_count": 19}


def test_what_was_encoded_is_answered_without_the_worker(service: Service) -> None:
    [first] = _encode(service, _request("asked again"))
    worker = service.worker
    worker.suspend()
    try:
        assert _encode(service, _request("asked again")) == [first]
    finally:
        worker.resume()


def _reused(service: Service) -> float:
    found = re.search(r"^zimage_encoder_reused_tokens_total (\S+)", service.metrics_page(), re.M)
    assert found
    return float(found[1])


async def test_solo_is_the_same_to_the_last_bit_whatever_was_before(
    service: Service, model_folder: Path
) -> None:
    """That of the model alone; shared, what begins alike goes on from there, and is as near."""
    import torch

    from encoder_service.model.loading import load
    from encoder_service.model.qwen import Text
    from encoder_service.prompt import Tokenizer
    from zimage_core.formats.encoder_files import EncoderFiles

    prompts = [Prompt(f"number {n}", system="You draw. " * 9) for n in range(9)]
    before = _reused(service)
    async with AsyncClient(encoder=service.address) as client:
        shared = [await client.encode(prompt) for prompt in prompts]
        assert _reused(service) - before >= 8 * 80
        before = _reused(service)
        solo = await client.encode(prompts, packing="solo")
        assert _reused(service) == before
        assert await client.encode(prompts) == shared
    files = EncoderFiles.of(model_folder)
    alone, threads = load(files, -2, "cpu", "float32"), torch.get_num_threads()
    torch.set_num_threads(1)  # as the service does for a model of this size
    try:
        for ids, exact, near in zip(
            Tokenizer(files.tokenizer).encode(prompts), solo, shared, strict=True
        ):
            [run] = alone([Text(ids, ((-2, 1.0),))])
            assert torch.equal(_values(exact), run.state)
            assert (_values(near) - run.state).abs().max() <= 1e-5 * run.state.abs().max()
    finally:
        torch.set_num_threads(threads)


async def test_a_prompt_is_run_ahead_while_it_is_typed(service: Service) -> None:
    text = "a quiet harbour in the fog, with one red boat that leaves it, seen from far above"
    before = _reused(service)
    async with (
        AsyncClient(encoder=service.address) as client,
        client.encode_session() as session,
    ):
        for end in range(10, len(text), 10):
            session.edit(text[:end])
            while session.count is None or session.count.token_count < end:  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # it is run
        ahead = _reused(service)
        assert ahead - before > 100
        embedding = await session.submit(text)
        assert _reused(service) - ahead >= len(text) - 15
        alone = await client.encode(text, packing="solo")
        assert embedding.token_ids_sha256 == alone.token_ids_sha256
        expected = _values(alone)
        assert (_values(embedding) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert await session.submit(text) == embedding


async def test_of_many_edits_the_last_counts_and_each_submit_is_answered(service: Service) -> None:
    """What is wrong with one is its own; a lost worker costs nothing but time."""

    def prompts() -> float:
        found = re.search(r"^zimage_encoder_prompts_total (\S+)", service.metrics_page(), re.M)
        assert found
        return float(found[1])

    before = prompts()
    async with (
        AsyncClient(encoder=service.address) as client,
        client.encode_session() as session,
    ):
        for number in range(300):
            session.edit(f"edit {number}")
        first = await session.submit("done")
        assert prompts() - before < 150
        with pytest.raises(InvalidRequest, match="half a character"):
            session.edit("\ud83d")
        with pytest.raises(InvalidRequest, match="half a character"):
            await session.submit("\ud83d")
        with pytest.raises(InvalidRequest, match=r"prompt\.text: \d+ tokens given, 4096 allowed"):
            await session.submit("too long " * 2_000)
        service.worker.kill()
        session.edit("done, but for")
        again, other = await asyncio.gather(session.submit("done"), session.submit("and more"))
        assert again.token_ids_sha256 == first.token_ids_sha256 != other.token_ids_sha256
        waiting = asyncio.create_task(session.submit("never answered " * 200))
        await asyncio.sleep(0)
    with pytest.raises(Cancelled):
        await waiting
    async with (
        AsyncClient(encoder=service.address) as client,
        client.encode_session() as session,
    ):
        waiting = asyncio.create_task(session.submit("its stream has not begun"))
        await asyncio.sleep(0)
    with pytest.raises(Cancelled):
        await waiting
    with pytest.raises(Cancelled, match="closed"):
        session.edit("too late")


def test_a_file_of_prompts_becomes_a_folder_of_embeddings(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        *(json.dumps(f"prompt {number}") for number in range(40)),
        "",
        "no JSON",
        json.dumps({"prompt": "x", "promt": "y"}),
        json.dumps("far too long " * 2_000),
        json.dumps({"prompt": "named", "name": "by hand", "blend": [[-2, 1], [-3, 1]]}),
        json.dumps({"prompt": "x", "name": "../out"}),
        json.dumps({"prompt": "another", "name": "By Hand"}),
        "[" * 100_000,
        json.dumps("half a character \ud83d"),
        json.dumps("prompt 7"),
    ]
    source, folder = tmp_path / "prompts.jsonl", tmp_path / "out"
    source.write_text("\n".join(lines))
    asked = ["encode", "--batch", str(source), "-o", str(folder), "--encoder", service.address]
    folder.mkdir()
    (folder / "by hand.safetensors").write_text("somebody else's")
    assert command([*asked, "--timeout", "0.001"]) == 1
    assert "the same command goes on from here" in capsys.readouterr().err
    (folder / "index.jsonl").unlink(missing_ok=True)
    assert command(asked) == 1
    assert "is there, and of no batch; add --overwrite" in capsys.readouterr().err
    assert (folder / "by hand.safetensors").read_text() == "somebody else's"
    shutil.rmtree(folder)
    assert command([*asked, "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {
        "done": 42,
        "failed": 7,
        "index": str(folder / "index.jsonl"),
    }
    assert re.findall(r"^line (\d+)", shown.err, re.M) == ["42", "43", "46", "47", "48", "49", "44"]
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(written) == 41
    content = embedding_file.read(folder / "by hand.safetensors")
    assert content.prompt == Prompt("named", blend=((-2, 1.0), (-3, 1.0)))
    assert content.embedding.recipe.blend == ((-3, 0.5), (-2, 0.5))

    # Again, after a crash that tore the index and lost a file.
    index = folder / "index.jsonl"
    said = index.read_text().splitlines()
    (folder / "by hand.safetensors").unlink()
    index.write_text("\n".join(said[:-1]) + "\n" + said[-1][:20])
    lines[41:43] = [json.dumps("mended"), json.dumps({"prompt": "too", "name": "by hand too"})]
    source.write_text("\n".join(lines))
    assert command(asked) == 1
    assert "44 of 49 encoded, 5 failed" in capsys.readouterr().out
    again = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(again) == 43
    unchanged = [path for path, time in written.items() if again[path] == time]
    assert 39 <= len(unchanged) <= 40  # but for the lost one, and perhaps the torn


def test_two_encoders_are_compared(
    service: Service, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same in half precision is near; one with other weights is a stranger."""
    from safetensors.torch import load_file, save_file

    assert command(["verify-encoder", service.address, service.address]) == 0
    assert "cosine 1.000000 on average, 1.000000 at the worst" in capsys.readouterr().out
    with running("encoder_service", "--model", str(model_folder), "--dtype", "bfloat16") as half:
        half.wait_until("SERVING")
        assert command(["verify-encoder", service.address, half.address]) == 0
        assert re.search(r"0\.999\d+ at the worst: token \d+ of", capsys.readouterr().out)
    with running("encoder_service", "--model", str(model_folder), "--weights", "int8") as narrow:
        narrow.wait_until("SERVING")
        with Client(encoder=narrow.address) as client:
            model = client.describe_encoder().model
            assert model is not None
            assert model.numerics.weights == "int8"
        assert command(["verify-encoder", service.address, narrow.address]) == 0
        told = capsys.readouterr().out
        assert "taken: the same encoder" in told
        assert "weights int8" in told
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    [path] = (other / "text_encoder").glob("*.safetensors")
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("layers.0.mlp.down_proj.weight"))
    weights[name][:, 0] += 1.0
    save_file(weights, path, metadata={"format": "pt"})
    with running("encoder_service", "--model", str(other)) as stranger:
        stranger.wait_until("SERVING")
        asked = ["verify-encoder", service.address, stranger.address, "--json"]
        assert command(asked) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["same_identity"]
    assert told["worst_cosine"] < 0.999
    assert "ENCODER_MISMATCH" in told["verdict"]


def test_a_full_queue_refuses_and_serves_those_inside(service: Service) -> None:
    worker = service.worker
    worker.suspend()
    calls = _fill_queue(service, "first", "second")
    worker.resume()
    assert [len(call.result().embeddings) for call in calls] == [1, 1]


def test_a_killed_worker_is_replaced(service: Service) -> None:
    [before] = _encode(service, _request("a cat"))
    worker = service.worker
    worker.suspend()
    calls = _fill_queue(service, "running", "waiting")
    worker.kill()
    for call in calls:
        lost = typed(call.exception())
        assert isinstance(lost, DeviceLost)
        assert lost.retry_after is not None
    service.wait_until("SERVING")
    assert service.worker.pid != worker.pid
    assert _encode(service, _request("a cat")) == [before]


async def _results(
    service: Service, prompts: Iterable[str | Prompt]
) -> dict[int, Embedding | ZImageError]:
    async with AsyncClient(encoder=service.address) as client:
        return dict([one async for one in client.encode_stream(prompts)])


async def test_a_stream_answers_each_for_itself(service: Service) -> None:
    prompts = [Prompt(f"number {n}") for n in range(100)]
    prompts[7] = Prompt("too long " * 2_000)
    prompts[50] = Prompt("x", hidden_layer=-99)
    results = await _results(service, prompts)
    assert sorted(results) == list(range(100))
    failures = {n: one.reason for n, one in results.items() if isinstance(one, ZImageError)}
    assert failures == {7: "TOKEN_LIMIT", 50: "HIDDEN_LAYER"}
    assert str(results[50]).startswith("prompt.hidden_layer: -99 given")
    assert isinstance(results[50], InvalidRequest)
    for number in (0, 99):
        alone = embeddings.embedding_from_wire(
            _encode(service, _request(f"number {number}"))[0], field="x"
        )
        found = results[number]
        assert isinstance(found, Embedding)
        assert found.token_ids_sha256 == alone.token_ids_sha256
        assert len(found.tensor.data) == len(alone.tensor.data)


async def test_a_stream_takes_prompts_only_as_it_gets_on(service: Service) -> None:
    taken = 0

    async def prompts() -> AsyncIterator[str]:
        nonlocal taken
        for taken in range(1_000_000):
            yield f"{taken} " * 50

    async with (
        AsyncClient(encoder=service.address) as client,
        aclosing(client.encode_stream(prompts())) as results,
    ):
        async for number, _result in results:
            if number > 10:
                break
    assert taken < 20_000


async def test_a_stream_outlives_a_worker(service: Service) -> None:
    answered = asyncio.Event()

    async def prompts() -> AsyncIterator[str]:
        yield "first"
        await answered.wait()
        service.worker.kill()
        for number in range(40):
            yield f"number {number}"

    results = {}
    async with AsyncClient(encoder=service.address) as client:
        async for number, result in client.encode_stream(prompts()):
            assert number not in results
            results[number] = result
            answered.set()
    assert len(results) == 41
    assert all(isinstance(result, Embedding) for result in results.values())


async def test_a_prompt_that_cannot_be_sent_fails_alone(service: Service) -> None:
    results = await _results(service, ["fine", "\ud83d", "fine, too"])
    assert sorted(results) == [0, 1, 2]
    assert isinstance(results[1], InvalidRequest)
    assert "half a character" in str(results[1])
    assert isinstance(results[2], Embedding)


async def test_a_fault_of_the_iterable_comes_after_the_answers(service: Service) -> None:
    def prompts() -> Iterator[str]:
        yield "fine"
        raise OSError("the disk is gone")

    async with (
        AsyncClient(encoder=service.address) as client,
        aclosing(client.encode_stream(prompts())) as results,
    ):
        assert (await anext(results))[0] == 0
        with pytest.raises(OSError, match="the disk is gone"):
            await anext(results)


async def test_silent_streams_keep_nobody_out(service: Service) -> None:
    async def silent() -> AsyncIterator[str]:
        await asyncio.Event().wait()
        yield ""

    async def listen() -> None:
        async for _ in client.encode_stream(silent()):
            pass

    async with AsyncClient(encoder=service.address) as client:
        streams = [asyncio.create_task(listen()) for _ in range(80)]
        await asyncio.sleep(0)
        assert await client.encode("anybody?", retry=False)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)


def test_a_path_on_which_somebody_serves_is_not_taken(service: Service, model_folder: Path) -> None:
    flags = "--model", str(model_folder), "--listen", service.address
    code, complaint = _complaint(*flags)
    assert code == 2
    assert "another process serves there" in complaint
    assert _describe(service).ready


def test_it_speaks_while_it_loads_and_drains_to_its_end(model_folder: Path) -> None:
    with running("encoder_service", "--model", str(model_folder)) as service:
        service.wait_for_line("listens on")
        described = _describe(service)
        assert not described.ready
        assert described.max_prompt_count == 32
        assert service.probe("readyz") == 503
        with pytest.raises(Unavailable) as refusal:
            _encode(service, _request("too early"))
        assert refusal.value.reason == "LOADING"
        assert refusal.value.retry_after is not None

        service.wait_until("SERVING")
        worker = service.worker
        worker.suspend()
        call = _begin(service, _request("in flight"))
        _describe(service)  # the call before it has arrived too
        service.process.send_signal(signal.SIGTERM)
        service.wait_for_line("draining")
        worker.resume()
        assert len(call.result().embeddings) == 1
        assert service.wait_for_exit() == 0
        worker.wait(PATIENCE_SECONDS)


def test_a_hung_worker_is_killed(model_folder: Path) -> None:
    silence = {"ZIMAGE_ENCODER__WATCHDOG__SILENCE_SECONDS": "5"}
    with running("encoder_service", "--model", str(model_folder), **silence) as service:
        service.wait_until("SERVING")
        worker = service.worker
        worker.suspend()
        with pytest.raises(DeviceLost):
            _encode(service, _request("never"))
        service.wait_for_line("hung")
        worker.wait(PATIENCE_SECONDS)


def test_doctor_compares_replicas(
    service: Service, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--model", str(model_folder), "--dtype", "bfloat16"
    with running("encoder_service", *flags) as other:
        other.wait_until("SERVING")
        for beside, least in ((service, 0.999), (other, 0.95)):
            addresses = f"{service.address},{beside.address}"
            command(["doctor", "--json", "--encoder", addresses])
            lines = map(json.loads, capsys.readouterr().out.splitlines())
            [drift] = [found for found in lines if found["check"] == "drift"]
            cosine = float(drift["said"].split()[1])
            assert cosine >= least
            assert (drift["verdict"] == "ok") == (cosine >= 0.999)
        assert cosine < 1


def test_no_worker_outlives_its_front(service: Service) -> None:
    worker = service.worker
    service.process.kill()
    worker.wait(PATIENCE_SECONDS)


def test_it_does_not_start_without_what_it_needs(model_folder: Path, tmp_path: Path) -> None:
    nothing = _complaint("--model", str(tmp_path))
    assert nothing[0] == 1
    assert "tokenizer.json: this file is missing" in nothing[1]

    (tmp_path / "tokenizer").symlink_to(model_folder / "tokenizer")
    no_encoder = _complaint("--model", str(tmp_path))
    assert no_encoder[0] == 1
    assert "text_encoder: no such folder" in no_encoder[1]

    assert _complaint()[0] == 2
    open_to_all = _complaint("--model", str(model_folder), "--listen", "0.0.0.0:0")
    assert open_to_all[0] == 2
    assert "--insecure" in open_to_all[1]


def _complaint(*flags: str) -> tuple[int, str]:
    """The exit code and the last line of a service that cannot start."""
    command = [sys.executable, "-m", "encoder_service", "--probes", "", "--listen", "127.0.0.1:0"]
    ended = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    return ended.returncode, ended.stderr.splitlines()[-1]


def test_it_prints_its_settings(model_folder: Path) -> None:
    command = [sys.executable, "-m", "encoder_service", "--model", str(model_folder)]
    shown = subprocess.run(
        [*command, "--max-queue-length", "3", "--print-config"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "max_queue_length = 3  # flag" in shown.stdout
    assert "max_hidden_layer = -2  # built in" in shown.stdout
