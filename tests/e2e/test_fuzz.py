"""Every method under requests that no client sends: typed errors, nothing dies, nothing grows.

`make fuzz` asks 10,000 times; CI 500 times.
"""

import hashlib
import io
from collections.abc import Iterator

import grpc
import psutil
import pytest
from google.protobuf import duration_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from tests import adapter_files
from tests.e2e.hostile import hostile
from tests.e2e.services import PATIENCE_SECONDS, Service, running, typed
from zimage_client import Client
from zimage_client._embedded.stack import demo_model
from zimage_core.embeddings import Embedding, Numerics, Recipe
from zimage_core.errors import InternalError, Unavailable
from zimage_core.tensors import TensorData
from zimage_core.wire import embeddings, tensors
from zimage_core.wire.status import SERVED_BY_US
from zimage_rpc.blob.v1 import blob_pb2
from zimage_rpc.dit.v1 import dit_pb2, training_pb2
from zimage_rpc.encoder.v1 import encoder_pb2
from zimage_rpc.trainer.v1 import trainer_pb2
from zimage_rpc.types.v1 import types_pb2

WIDTH = 128
LIMITS = ("--max-side-px", "64", "--max-image-count", "2", "--max-step-count", "2")
_ENCODER, _DIT = "zimage_rpc.encoder.v1.EncoderService", "zimage_rpc.dit.v1.DitService"
_BLOBS = "zimage_rpc.blob.v1.BlobService"
_TRAINING = "zimage_rpc.dit.v1.TrainingService"
_TRAINER = "zimage_rpc.trainer.v1.TrainerService"
_WARM = 1000
_GROWTH = 1.02


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "png")
    return file.getvalue()


def _embedding(*, named: bool = False) -> types_pb2.PromptEmbedding:
    return embeddings.embedding_to_wire(
        Embedding(
            tensor=TensorData("float32", (2, WIDTH), bytes(8 * WIDTH)),
            identity="",
            recipe=Recipe(chat_format=1, hidden_layer=-2, token_limit=512),
            numerics=Numerics("float32", "float32", "test", "cpu"),
            token_count=2,
            token_ids_sha256="",
        ),
        named=named,
    )


def _spec(*adapters: dit_pb2.AdapterUse, **content: Message) -> dit_pb2.GenerateRequest:
    side = types_pb2.Conditioning(segments=[types_pb2.Segment(**content)])  # type: ignore[arg-type]
    return dit_pb2.GenerateRequest(
        spec=dit_pb2.GenerateSpec(
            positive=side,
            negative=side,
            width_px=32,
            height_px=32,
            seed=1,
            image_count=1,
            step_count=1,
            schedule=dit_pb2.Schedule(rule=dit_pb2.Schedule.RULE_OFFICIAL, shift=3.0),
            guidance_scale=1.0,
            output=dit_pb2.Output(format=dit_pb2.Output.FORMAT_JPEG, quality=90),
            z_image=dit_pb2.ZImageOptions(force_guidance=True, cfg_normalization=1.0),
            packing=types_pb2.PACKING_SHARED,
            previews=dit_pb2.Previews(interval_steps=1),
            priority=types_pb2.PRIORITY_NORMAL,
            adapters=adapters,
        )
    )


PROMPT = types_pb2.Prompt(text="a red circle", system="s", thinking="t")
LATENTS = tensors.to_wire(TensorData("float32", (16, 4, 4), bytes(4 * 16 * 16)))
SHA256 = "0123456789abcdef" * 4
_CHANGED = {"layers.0.attention.to_q": (192, 192)}  # of the demo model
ADAPTER = save(adapter_files.LAYOUTS["bare"](adapter_files.random_lora(_CHANGED))[0])
ADAPTER_SHA256 = hashlib.sha256(ADAPTER).hexdigest()
ZEROS = hashlib.sha256(bytes(8 * WIDTH)).hexdigest()
PLAN = training_pb2.TrainingPlan(
    seed=1,
    step_count=2,
    lora=training_pb2.LoraPlan(
        groups=[
            training_pb2.LoraGroup(
                stack="layers", end_block=1, linears=["attention.to_q"], rank=1, alpha=1.0
            )
        ]
    ),
    noise=training_pb2.NoisePlan(shift=3.0),
    learning_rate=training_pb2.LearningRatePlan(peak=1e-3),
)
_FILE = types_pb2.Digest(sha256=SHA256, size_bytes=9)
METHODS: dict[str, list[Message]] = {
    f"{_ENCODER}/Describe": [encoder_pb2.DescribeRequest()],
    f"{_ENCODER}/Encode": [encoder_pb2.EncodeRequest(prompts=[PROMPT, PROMPT])],
    f"{_ENCODER}/CountTokens": [encoder_pb2.CountTokensRequest(prompts=[PROMPT, PROMPT])],
    f"{_ENCODER}/EncodeStream": [encoder_pb2.EncodeStreamRequest(item_id=1, prompt=PROMPT)],
    f"{_ENCODER}/EncodeSession": [
        encoder_pb2.EncodeSessionRequest(item_id=1, prompt=PROMPT),
        encoder_pb2.EncodeSessionRequest(item_id=2, prompt=PROMPT, submit=True),
    ],
    f"{_DIT}/Describe": [dit_pb2.DescribeRequest()],
    f"{_DIT}/Generate": [
        _spec(embedding=_embedding()),
        _spec(embedding=_embedding(named=True)),
        dit_pb2.GenerateRequest(chunk=dit_pb2.BlobChunk(sha256=ZEROS, data=bytes(8 * WIDTH))),
        _spec(prompt=PROMPT),
        _spec(
            dit_pb2.AdapterUse(name="style", scale=0.5),
            dit_pb2.AdapterUse(digest=types_pb2.Digest(sha256=ADAPTER_SHA256)),
            prompt=PROMPT,
        ),
    ],
    f"{_DIT}/AddAdapter": [
        dit_pb2.AddAdapterRequest(name="style", sha256=ADAPTER_SHA256, replace=True)
    ],
    f"{_DIT}/GetAdapter": [dit_pb2.GetAdapterRequest(name="style")],
    f"{_DIT}/ListAdapters": [dit_pb2.ListAdaptersRequest(page_size=3)],
    f"{_DIT}/RemoveAdapter": [dit_pb2.RemoveAdapterRequest(name="style")],
    f"{_DIT}/EncodeImages": [dit_pb2.EncodeImagesRequest(item_id=1, image=_png())],
    f"{_DIT}/DecodeLatents": [dit_pb2.DecodeLatentsRequest(item_id=1, latents=LATENTS)],
    f"{_DIT}/Trace": [dit_pb2.TraceRequest(last=Duration(seconds=60))],
    f"{_BLOBS}/Find": [blob_pb2.FindRequest(sha256=[SHA256])],
    f"{_BLOBS}/Put": [
        blob_pb2.PutRequest(start=blob_pb2.PutStart(sha256=SHA256, size_bytes=9)),
        blob_pb2.PutRequest(chunk=b"123456789"),
    ],
    f"{_BLOBS}/Get": [blob_pb2.GetRequest(sha256=SHA256, offset=1)],
    f"{_TRAINING}/TrainSession": [
        training_pb2.TrainSessionRequest(
            open=training_pb2.OpenTraining(job="job", session_epoch=1, plan=PLAN)
        ),
        training_pb2.TrainSessionRequest(
            batch=training_pb2.TrainBatch(
                step=0, samples=[training_pb2.TrainSample(latents=_FILE, caption=_FILE, weight=1)]
            )
        ),
        training_pb2.TrainSessionRequest(checkpoint=training_pb2.TakeCheckpoint()),
        training_pb2.TrainSessionRequest(chunk=dit_pb2.BlobChunk(sha256=SHA256, data=b"123")),
    ],
    f"{_TRAINER}/Describe": [trainer_pb2.DescribeRequest()],
    f"{_TRAINING}/PlanTraining": [
        training_pb2.PlanTrainingRequest(
            plan=PLAN,
            largest_batch=[training_pb2.SampleSize(image_tokens=64, caption_tokens=20)],
        )
    ],
    f"{_TRAINER}/PlanTrainJob": [
        trainer_pb2.PlanTrainJobRequest(
            spec=trainer_pb2.TrainJobSpec(name="style", dataset=_FILE, training=PLAN)
        )
    ],
    f"{_TRAINER}/CreateTrainJob": [
        trainer_pb2.CreateTrainJobRequest(
            spec=trainer_pb2.TrainJobSpec(
                name="style", dataset=_FILE, training=PLAN, batch_size=2, sides_px=[64]
            ),
            request_id="request",
        )
    ],
    f"{_TRAINER}/GetTrainJob": [trainer_pb2.GetTrainJobRequest(id="job")],
    f"{_TRAINER}/ListTrainJobs": [
        trainer_pb2.ListTrainJobsRequest(page_size=3, page_token=str(1.5))
    ],
    f"{_TRAINER}/WatchTrainJob": [trainer_pb2.WatchTrainJobRequest(id="job", after_step=1)],
    f"{_TRAINER}/PauseTrainJob": [trainer_pb2.PauseTrainJobRequest(id="job")],
    f"{_TRAINER}/ResumeTrainJob": [trainer_pb2.ResumeTrainJobRequest(id="job")],
    f"{_TRAINER}/CancelTrainJob": [trainer_pb2.CancelTrainJobRequest(id="job")],
    f"{_TRAINER}/DeleteTrainJob": [trainer_pb2.DeleteTrainJobRequest(id="job")],
    f"{_TRAINER}/DescribeCache": [trainer_pb2.DescribeCacheRequest()],
    f"{_TRAINER}/VerifyCache": [trainer_pb2.VerifyCacheRequest(page_token="captions/")],  # noqa: S106
    f"{_TRAINER}/PruneCache": [
        trainer_pb2.PruneCacheRequest(unused_for=duration_pb2.Duration(seconds=3))
    ],
}
"""What clients send, as a place to begin."""
_UNARY = (
    "Describe",
    "Encode",
    "CountTokens",
    "Find",
    "Trace",
    *(f"{verb}Adapter" for verb in ("Add", "Get", "Remove")),
    "ListAdapters",
    *(f"{verb}TrainJob" for verb in ("Create", "Get", "Pause", "Resume", "Cancel", "Delete")),
    *(f"{verb}Cache" for verb in ("Describe", "Verify", "Prune")),
    "ListTrainJobs",
    "PlanTrainJob",
    "PlanTraining",
)


# The demo model's tokenizer knows where words end, and so how much of them to remember.
@pytest.fixture(scope="module")
def encoder() -> Iterator[Service]:
    with running("encoder_service", "--model", str(demo_model())) as service:
        service.wait_until("SERVING")
        yield service


@pytest.fixture(scope="module")
def dit(encoder: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    store = str(tmp_path_factory.mktemp("store"))
    flags = "--model", str(demo_model()), "--encoder", encoder.address, "--store", store
    with running("dit_service", *flags, *LIMITS) as service:
        service.wait_until("SERVING")
        file = tmp_path_factory.mktemp("adapters") / "style.safetensors"
        file.write_bytes(ADAPTER)
        with Client(service.address) as client:
            client.add_adapter("style", file)
        yield service


@pytest.fixture(scope="module")
def trainer(
    encoder: Service, dit: Service, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("trainer")
    flags = "--encoder", encoder.address, "--dit", dit.address, "--store", str(folder / "store")
    with running("trainer_service", *flags, "--database", f"sqlite:///{folder}/jobs") as service:
        service.wait_until("SERVING")
        yield service


def test_every_method_is_here() -> None:
    files = (
        encoder_pb2.DESCRIPTOR,
        dit_pb2.DESCRIPTOR,
        training_pb2.DESCRIPTOR,
        trainer_pb2.DESCRIPTOR,
        blob_pb2.DESCRIPTOR,
    )
    services = [service for file in files for service in file.services_by_name.values()]
    assert set(METHODS) == {f"{s.full_name}/{m.name}" for s in services for m in s.methods}


@pytest.mark.timeout(0)
@pytest.mark.parametrize("method", METHODS)
def test_whatever_comes_gets_an_answer(
    method: str, request: pytest.FixtureRequest, pytestconfig: pytest.Config
) -> None:
    name = {_ENCODER: "encoder", _TRAINER: "trainer"}.get(method.partition("/")[0], "dit")
    service: Service = request.getfixturevalue(name)
    call = service.channel.stream_stream(f"/{method}")
    workers = [] if name == "trainer" else [service.worker]
    processes = [psutil.Process(service.process.pid), *workers]
    one = st.one_of([hostile(base) for base in METHODS[method]])
    is_unary = method.rpartition("/")[2] in _UNARY
    count = pytestconfig.getoption("--fuzz-requests")
    sizes: list[int] = []

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count <= _WARM,  # CI asks the same every time, `make fuzz` never
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(one, min_size=1, max_size=1) if is_unary else st.lists(one, max_size=3))
    def ask(requests: list[bytes]) -> None:
        answers = call(iter(requests), timeout=PATIENCE_SECONDS)
        try:
            for _ in answers:
                pass
        except grpc.RpcError:
            assert SERVED_BY_US in dict(answers.trailing_metadata()), answers.details()
            error = typed(answers)
            assert not isinstance(error, InternalError | Unavailable), error
            assert answers.code() != grpc.StatusCode.DEADLINE_EXCEEDED
        sizes.append(sum(process.memory_info().rss for process in processes))

    ask()
    assert service.process.poll() is None
    assert not workers or [service.worker] == workers
    assert not [line for line in service.log if "Traceback" in line]
    if len(sizes) > 2 * _WARM:
        assert max(sizes[-100:]) <= _GROWTH * max(sizes[:_WARM])
