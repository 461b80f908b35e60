import asyncio
import contextlib
import hashlib
import logging
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from math import inf, nan
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fakes import services
from tests.fakes.services import Act, FakeDit, FakeEncoder, NeedyDit, Step
from zimage_client import (
    Accepted,
    AsyncClient,
    Cancelled,
    Client,
    Completed,
    DeadlineTooShort,
    DeviceLost,
    Embedding,
    Event,
    InternalError,
    InvalidRequest,
    InvalidSettings,
    Overloaded,
    Picture,
    Progress,
    Prompt,
    Unavailable,
    Waiting,
    ZImageError,
)
from zimage_client._replay import Replay
from zimage_core.embeddings import Numerics, Recipe
from zimage_core.tensors import TensorData
from zimage_core.wire import request_id
from zimage_rpc.dit.v1 import dit_pb2

LOADING = Unavailable("the model is being loaded", reason="LOADING", retry_after=0)
LOST = DeviceLost("the worker died", retry_after=0)
FULL = Overloaded("the queue is full", retry_after=0)


@asynccontextmanager
async def client_of(
    dit: FakeDit | None = None, encoder: FakeEncoder | None = None
) -> AsyncIterator[AsyncClient]:
    async with (
        services.serving(dit, encoder) as addresses,
        AsyncClient(
            addresses.server if dit else "", addresses.encoder if encoder else ""
        ) as client,
    ):
        yield client


async def events_of(client: AsyncClient, prompt: Any, **options: Any) -> list[Event]:
    async with aclosing(client.stream(prompt, **options)) as events:
        return [event async for event in events]


def without_waiting(events: list[Event]) -> list[type]:
    return [type(event) for event in events if not isinstance(event, Waiting)]


class TestEvents:
    async def test_generate_returns_whole_verified_pictures(self) -> None:
        dit = FakeDit()
        async with client_of(dit) as client:
            result = await client.generate("a red circle", seed=7, count=2, width=64)
        expected = [services.picture(dit.specs[0], index) for index in range(2)]
        assert [picture.data for picture in result.pictures] == expected
        assert [picture.seed for picture in result.pictures] == [7, 8]
        assert [picture.index for picture in result.pictures] == [0, 1]
        assert result.pictures[1].sha256 == hashlib.sha256(expected[1]).hexdigest()
        assert result.pictures[1].pixels_sha256 == "pixels 1"
        assert result.pictures[1].media_type == "image/png"
        assert (result.accepted.width, result.accepted.height) == (64, 128)
        assert result.accepted.sigmas == (1.0, 0.5, 0.0)
        assert result.completed.negative is None

    async def test_stream_tells_how_it_goes_on(self) -> None:
        async with client_of(FakeDit()) as client:
            events = await events_of(client, "a red circle", seed=7)
        assert [type(event) for event in events] == [
            Accepted,
            Progress,
            Progress,
            Picture,
            Completed,
        ]
        assert events[1] == Progress("denoising", index=0, step=1, steps=2)

    async def test_what_a_newer_server_says_is_passed_over(self) -> None:
        spec = dit_pb2.GenerateSpec(seed=3)
        first, *rest = services.happy(spec)
        news = [dit_pb2.GenerateResponse(), services.progress(99)]
        async with client_of(FakeDit([first, *news, *rest])) as client:
            events = await events_of(client, "x", seed=3)
        assert without_waiting(events) == [Accepted, Progress, Progress, Picture, Completed]

    async def test_a_damaged_picture_is_not_handed_out(self) -> None:
        spec = dit_pb2.GenerateSpec(seed=3)
        script: list[Step] = [
            services.accepted(spec),
            *services.pieces(0, b"some bytes", sha256="00" * 32),
        ]
        async with client_of(FakeDit(script)) as client:
            with pytest.raises(InternalError, match="damaged") as caught:
                await client.generate("x", seed=3)
        assert caught.value.reason == "CHECKSUM"

    @pytest.mark.parametrize("missing", [0, -1, -2])
    async def test_an_answer_with_a_hole_is_an_error(self, missing: int) -> None:
        spec = dit_pb2.GenerateSpec(seed=3)
        script = list(services.happy(spec))
        del script[missing]
        async with client_of(FakeDit(script)) as client:
            with pytest.raises(InternalError) as caught:
                await client.generate("x", seed=3)
        assert caught.value.reason == "MALFORMED_ANSWER"

    async def test_a_missing_piece_is_an_error(self) -> None:
        spec = dit_pb2.GenerateSpec(seed=3)
        _, second = services.pieces(0, b"some bytes")
        async with client_of(FakeDit([services.accepted(spec), second])) as client:
            with pytest.raises(InternalError, match="expected was picture 0 at byte 0"):
                await client.generate("x", seed=3)


class TestOptions:
    async def test_what_is_not_given_is_unset_on_the_wire_and_zero_is_zero(self) -> None:
        dit = FakeDit()
        async with client_of(dit) as client:
            await client.generate("x")
            await client.generate("x", guidance=0, seed=0, steps=None)
        unset, zero = dit.specs
        for name in ("width_px", "height_px", "step_count", "guidance_scale", "negative"):
            assert not unset.HasField(name)
        assert not unset.HasField("schedule")
        assert zero.HasField("guidance_scale")
        assert zero.guidance_scale == 0
        assert zero.seed == 0
        assert not zero.HasField("step_count")

    async def test_every_option_reaches_the_server(self) -> None:
        dit = FakeDit()
        async with client_of(dit) as client:
            await client.generate(
                Prompt("x", system="s", hidden_layer=-3),
                negative="y",
                width=32,
                height=48,
                seed=-5,
                count=2,
                steps=3,
                guidance=2.5,
                schedule="legacy",
                shift=3.5,
                force_guidance=True,
                cfg_normalization=1.5,
                cfg_truncation=0.5,
                format="webp",
                quality=80,
                previews="vae",
                preview_interval=2,
            )
            await client.generate("x", previews="auto")
            await client.generate("x", sigmas=[1.0, 0.25])
        spec, auto, listed = dit.specs
        assert spec.positive.segments[0].prompt.system == "s"
        assert spec.negative.segments[0].prompt.text == "y"
        assert spec.negative.segments[0].prompt.hidden_layer == -3
        assert (spec.width_px, spec.height_px, spec.seed, spec.image_count) == (32, 48, -5, 2)
        assert (spec.step_count, spec.guidance_scale) == (3, 2.5)
        assert (spec.schedule.rule, spec.schedule.shift) == (dit_pb2.Schedule.RULE_LEGACY, 3.5)
        assert spec.z_image == dit_pb2.ZImageOptions(
            force_guidance=True, cfg_normalization=1.5, cfg_truncation=0.5
        )
        assert spec.output == dit_pb2.Output(format=dit_pb2.Output.FORMAT_WEBP, quality=80)
        assert spec.previews == dit_pb2.Previews(
            source=dit_pb2.Previews.SOURCE_VAE, interval_steps=2
        )
        assert auto.HasField("previews")
        assert not listed.HasField("previews")
        assert list(listed.schedule.sigmas) == [1.0, 0.25]

    async def test_a_seed_is_drawn_below_two_to_the_32(self) -> None:
        dit = FakeDit()
        async with client_of(dit) as client:
            for _ in range(3):
                result = await client.generate("x")
                assert result.accepted.seed == dit.specs[-1].seed
        seeds = {spec.seed for spec in dit.specs}
        assert len(seeds) == 3
        assert all(0 <= seed < 1 << 32 for seed in seeds)

    @pytest.mark.parametrize(
        ("options", "field"),
        [
            ({"width": 1 << 40}, "width"),
            ({"steps": "eight"}, "steps"),
            ({"schedule": "karras"}, "schedule"),
            ({"format": "gif"}, "format"),
            ({"sigmas": ["high"]}, "sigmas"),
            ({"sigmas": []}, "sigmas"),
            *[({"timeout": seconds}, "timeout") for seconds in (inf, nan, 0, -1, 1e10, "long")],
        ],
    )
    async def test_a_value_that_cannot_be_said_is_refused_here(
        self, options: dict[str, Any], field: str
    ) -> None:
        async with AsyncClient("localhost:1") as client:
            with pytest.raises(InvalidRequest) as caught:
                client.stream("x", **options)
        assert caught.value.field == field

    @pytest.mark.parametrize("timeout", [inf, nan, 0, -1])
    async def test_what_is_no_timeout_is_refused_for_encode_too(self, timeout: float) -> None:
        async with AsyncClient(encoder="localhost:1") as client:
            with pytest.raises(InvalidRequest) as caught:
                await client.encode("x", timeout=timeout)
        assert caught.value.field == "timeout"

    @pytest.mark.parametrize("part", ["text", "system", "thinking", "assistant"])
    async def test_half_a_character_is_refused_by_name(self, part: str) -> None:
        prompt = Prompt(**{"text": "x", part: "caf\udce9"})  # type: ignore[arg-type]
        dit, encoder = FakeDit(), FakeEncoder()
        async with client_of(dit, encoder) as client, client_of(dit) as plain:
            for call in (plain.generate(prompt), client.generate(prompt), client.encode(prompt)):
                with pytest.raises(InvalidRequest, match=part) as caught:
                    await call
                assert caught.value.reason == "TEXT_ENCODING"
                caught.value.message.encode("ascii")
            with pytest.raises(InvalidRequest, match="half a character"):
                await plain.generate("x", negative=prompt)
        assert dit.specs == []

    async def test_wrong_arguments_are_type_errors(self) -> None:
        async with AsyncClient("localhost:1") as client:
            with pytest.raises(TypeError, match="did you mean 'guidance'"):
                client.stream("x", guidence=1.0)  # type: ignore[call-arg]
            with pytest.raises(TypeError, match="not bytes"):
                client.stream(b"x")  # type: ignore[arg-type]

    @pytest.mark.parametrize("address", ["localhost", "http://localhost:1", ":1", "a:b", "unix:"])
    def test_what_is_no_address_is_refused(self, address: str) -> None:
        with pytest.raises(InvalidSettings) as caught:
            AsyncClient(address)
        assert caught.value.reason == "ADDRESS"

    async def test_a_missing_address_is_named(self) -> None:
        async with AsyncClient() as client:
            with pytest.raises(InvalidSettings, match="server="):
                await client.generate("x")
            with pytest.raises(InvalidSettings, match="encoder="):
                await client.encode("x")


class TestReplay:
    @pytest.mark.parametrize("trouble", [Act.BREAK, LOADING, LOST, FULL])
    async def test_trouble_before_the_first_event_is_waited_out(self, trouble: Step) -> None:
        dit = FakeDit([trouble], [trouble])
        async with client_of(dit) as client:
            result = await client.generate("x")
        assert len(dit.specs) == 3
        assert dit.specs[0] == dit.specs[1] == dit.specs[2]
        assert result.pictures[0].seed == dit.specs[0].seed
        assert len(set(dit.request_ids)) == 1

    @pytest.mark.parametrize("trouble", [Act.BREAK, LOST])
    async def test_no_picture_is_handed_out_twice(self, trouble: Step) -> None:
        spec = dit_pb2.GenerateSpec(seed=3, image_count=2)
        first_half = [*list(services.happy(spec))[:6], trouble]
        dit = FakeDit(first_half)
        async with client_of(dit) as client:
            events = await events_of(client, "x", seed=3, count=2)
        assert [event.index for event in events if isinstance(event, Picture)] == [0, 1]
        assert [event.seed for event in events if isinstance(event, Picture)] == [3, 4]
        assert len([event for event in events if isinstance(event, Accepted)]) == 2
        assert len([event for event in events if isinstance(event, Waiting)]) == 1
        assert isinstance(events[-1], Completed)

    async def test_a_picture_that_comes_out_differently_is_told_in_the_log(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        spec = dit_pb2.GenerateSpec(seed=3, image_count=2)
        script = [services.accepted(spec), *services.pieces(0, b"another picture"), LOST]
        async with client_of(FakeDit(script)) as client:
            result = await client.generate("x", seed=3, count=2)
        assert result.pictures[0].data == b"another picture"
        assert "picture 0 came out differently" in caplog.text

    @pytest.mark.parametrize(
        "error",
        [
            InvalidRequest("no", reason="SIZE"),
            InternalError("internal error"),
            Overloaded("too large", reason="DEVICE_MEMORY", retry_after=0),
            Overloaded("nobody says when"),
        ],
    )
    async def test_what_another_try_would_not_mend_is_raised_at_once(
        self, error: ZImageError
    ) -> None:
        dit = FakeDit([error])
        async with client_of(dit) as client:
            with pytest.raises(type(error)) as caught:
                await client.generate("x")
        assert (caught.value.reason, caught.value.message) == (error.reason, error.message)
        assert caught.value.__suppress_context__
        assert len(dit.specs) == 1

    async def test_replay_can_be_turned_off(self) -> None:
        dit = FakeDit([LOADING])
        async with client_of(dit) as client:
            with pytest.raises(Unavailable):
                await client.generate("x", retry=False)
        assert len(dit.specs) == 1

    async def test_a_request_that_kills_its_server_ends(self) -> None:
        spec = dit_pb2.GenerateSpec(seed=3)
        step = services.progress(dit_pb2.Progress.STAGE_DENOISING, 0, 1, 2)
        deadly: list[Step] = [services.accepted(spec), step, LOST]
        dit = FakeDit(*[deadly] * 20)
        async with client_of(dit) as client:
            with pytest.raises(DeviceLost):
                await client.generate("x", seed=3)
        assert len(dit.specs) == 6

    async def test_a_request_that_only_queued_beside_a_deadly_one_goes_on(self) -> None:
        spec = dit_pb2.GenerateSpec(seed=3)
        dit = FakeDit(*[[services.accepted(spec), LOST]] * 20)
        async with client_of(dit) as client:
            await client.generate("x", seed=3)
        assert len(dit.specs) == 21

    async def test_the_timeout_ends_a_call_that_hangs(self) -> None:
        dit = FakeDit([Act.HOLD])
        async with client_of(dit) as client:
            with pytest.raises(ZImageError) as caught:
                await client.generate("x", timeout=2.0)
            assert await asyncio.to_thread(dit.cancelled.wait, 10)
        assert caught.value.reason == "DEADLINE_EXCEEDED"
        assert len(dit.specs) == 1

    async def test_a_timeout_behind_an_obstacle_is_none_in_front_of_it(self) -> None:
        spec = dit_pb2.GenerateSpec(seed=3)
        away = Unavailable("no encoder", reason="ENCODER_UNAVAILABLE", retry_after=0)
        queued = services.progress(dit_pb2.Progress.STAGE_QUEUED)
        taken = services.accepted(spec)
        async with client_of(FakeDit([taken, away], [taken, queued, Act.HOLD])) as client:
            with pytest.raises(DeadlineTooShort):
                await client.generate("x", timeout=2.0)

    async def test_a_service_that_does_not_describe_itself_is_no_end(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("zimage_client._calls.DESCRIBE_SECONDS", 0.2)
        dit = FakeDit()
        dit.describe_pauses.append(20.0)
        async with client_of(dit, FakeEncoder()) as client:
            events = await events_of(client, "x")
        [waiting] = [event for event in events if isinstance(event, Waiting)]
        assert waiting.reason == "UNREACHABLE"
        assert isinstance(events[-1], Completed)

    async def test_a_token_that_changes_meanwhile_is_taken_anew(self, tmp_path: Path) -> None:
        token, dit = tmp_path / "token", FakeDit([LOADING])
        token.write_text("old")
        async with services.serving(dit) as at, AsyncClient(at.server, token=token) as client:
            async for event in client.stream("x"):
                if isinstance(event, Waiting):
                    token.write_text("new")
        assert dit.tokens == ["Bearer old", "Bearer new"]
        assert len(set(dit.request_ids)) == 1

    async def test_a_closed_client_connects_no_more(self) -> None:
        connections = 0

        def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            writer.close()

        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            async with AsyncClient(f"{host}:{port}", f"{host}:{port}") as client:
                kept = []
                for call in (
                    client.generate("x", guidance=0, retry=False),
                    client.encode("x", retry=False),
                ):
                    with pytest.raises(Unavailable) as caught:
                        await call
                    kept.append(caught)
            await asyncio.sleep(0.5)  # an attempt under way at the end arrives
            before = connections
            await asyncio.sleep(2)  # an open one tries every second
        assert connections == before

    async def test_nobody_there_is_unreachable(self) -> None:
        async with AsyncClient("unix:/nowhere/at/all") as client:
            with pytest.raises(Unavailable) as caught:
                await client.generate("x", retry=False)
        assert caught.value.reason == "UNREACHABLE"


class TestPatience:
    """The rules by themselves, with a clock that the test turns."""

    def setup_method(self) -> None:
        self.now = 0.0

    def replay(self, timeout: float | None = None) -> Replay:
        return Replay(timeout=timeout, clock=lambda: self.now)

    def waited(self, replay: Replay, error: ZImageError) -> float:
        """How long the same error is borne."""
        began = self.now
        with contextlib.suppress(type(error)):
            while True:
                self.now += replay.pause_after(error)
        return self.now - began

    def test_loading_is_waited_for_long_and_nobody_there_only_shortly(self) -> None:
        loading = Unavailable("", reason="LOADING", retry_after=1)
        assert 500 < self.waited(self.replay(), loading) <= 600
        assert 5 < self.waited(self.replay(), Unavailable("", reason="UNREACHABLE")) <= 10

    def test_a_server_that_was_there_may_restart(self) -> None:
        gone = Unavailable("", reason="UNREACHABLE")
        accepted, answered = self.replay(), self.replay()
        accepted.taken()
        assert 50 < self.waited(accepted, gone) <= 60
        self.now += answered.pause_after(Unavailable("", reason="LOADING", retry_after=1))
        assert 50 < self.waited(answered, gone) <= 60

    def test_work_on_an_earlier_try_is_not_held_against_a_later_one(self) -> None:
        replay, lost = self.replay(), DeviceLost("", retry_after=1)
        replay.taken()
        replay.worked()
        for _ in range(50):
            self.now += replay.pause_after(lost)
            replay.taken()

    def test_the_timeout_bounds_all_tries(self) -> None:
        loading = Unavailable("", reason="LOADING", retry_after=1)
        assert self.waited(self.replay(timeout=5), loading) == 4

    def test_a_timeout_in_front_of_the_same_obstacle_is_told_as_that(self) -> None:
        late = DeadlineTooShort("")
        away = Unavailable("", reason="ENCODER_UNAVAILABLE", retry_after=1)
        loading = Unavailable("", reason="LOADING", retry_after=1)
        with pytest.raises(DeadlineTooShort):
            self.replay().pause_after(late)
        replay = self.replay()
        replay.pause_after(loading)
        replay.taken()  # loaded: not what the timeout passed for
        with pytest.raises(DeadlineTooShort):
            replay.pause_after(late)
        replay = self.replay()
        for _ in range(2):
            replay.taken()
            replay.pause_after(away)
        replay.taken()
        with pytest.raises(Unavailable) as caught:
            replay.pause_after(late)
        assert caught.value is away
        assert caught.value.__notes__ == ["the timeout passed while it was tried again"]

    def test_a_longer_pause_than_the_patience_is_not_begun(self) -> None:
        error = Unavailable("", reason="LOADING", retry_after=10_000)
        assert self.waited(self.replay(), error) == 0

    def test_a_server_that_comes_back_is_waited_for_anew(self) -> None:
        replay, gone = self.replay(), Unavailable("", reason="UNREACHABLE", retry_after=1)
        loading = Unavailable("", reason="LOADING", retry_after=1)
        for error in [gone] * 5 + [loading] * 100 + [gone] * 5:
            self.now += replay.pause_after(error)

    def test_reasons_in_turn_do_not_go_on_for_ever(self) -> None:
        replay, gone = self.replay(), Unavailable("", reason="UNREACHABLE", retry_after=1)
        loading = Unavailable("", reason="LOADING", retry_after=1)
        with contextlib.suppress(Unavailable):
            while True:
                self.now += replay.pause_after(gone)
                self.now += replay.pause_after(loading)
        assert 500 < self.now <= 600

    def test_a_request_that_was_worked_on_is_waited_for_anew(self) -> None:
        replay, loading = self.replay(), Unavailable("", reason="LOADING", retry_after=1)
        for _ in range(3):
            for _ in range(400):
                self.now += replay.pause_after(loading)
            replay.taken()
            replay.worked()

    def test_an_encoder_that_is_away_is_not_the_requests_fault(self) -> None:
        replay = self.replay()
        away = Unavailable("", reason="ENCODER_UNAVAILABLE", retry_after=1)
        for _ in range(50):
            replay.taken()
            self.now += replay.pause_after(away)

    def test_pauses_grow(self) -> None:
        replay, error = self.replay(), Unavailable("", reason="UNREACHABLE")
        pauses = [replay.pause_after(error) for _ in range(10)]
        assert pauses[0] <= 0.2
        assert 2.5 <= pauses[-1] <= 5

    def test_what_is_left_of_the_timeout_bounds_each_call(self) -> None:
        replay = self.replay(timeout=20)
        self.now += 5
        assert replay.within(None) == 15
        assert replay.within(10) == 10
        assert self.replay().within(None) is None


class TestCancel:
    async def test_leaving_a_stream_cancels_it_on_the_server(self) -> None:
        spec = dit_pb2.GenerateSpec(seed=3)
        dit = FakeDit([services.accepted(spec), Act.HOLD])
        async with client_of(dit) as client:
            async with aclosing(client.stream("x")) as events:
                async for event in events:
                    assert isinstance(event, Accepted)
                    break
            assert await asyncio.to_thread(dit.cancelled.wait, 10)

    async def test_cancelling_the_caller_cancels_it_on_the_server(self) -> None:
        dit = FakeDit([Act.HOLD])
        async with client_of(dit) as client:
            task = asyncio.create_task(client.generate("x"))
            await asyncio.to_thread(dit.holding.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(dit.cancelled.wait, 10)
        assert len(dit.specs) == 1

    async def test_a_closed_client_begins_nothing_more(self) -> None:
        dit = FakeDit([Unavailable("it loads", reason="LOADING", retry_after=0.2)])
        async with client_of(dit) as client, aclosing(client.stream("x")) as events:
            assert isinstance(await anext(events), Waiting)
            await client.aclose()
            with pytest.raises(Cancelled, match="closed"):
                await anext(events)
        assert len(dit.specs) == 1

    async def test_closing_the_client_ends_what_runs(self) -> None:
        dit = FakeDit([Act.HOLD])
        async with client_of(dit) as client:
            task = asyncio.create_task(client.generate("x"))
            await asyncio.to_thread(dit.holding.wait, 10)
            await client.aclose()
            with pytest.raises(ZImageError) as caught:
                await task
        assert caught.value.reason == "CANCELLED"


class TestEncoding:
    async def test_one_prompt_and_several(self) -> None:
        encoder = FakeEncoder()
        async with client_of(encoder=encoder) as client:
            one = await client.encode(Prompt("four", system="s"))
            several = await client.encode(["a", "bcd"])
        assert isinstance(one, Embedding)
        assert one.tensor.shape == (5, services.WIDTH)
        assert [embedding.token_count for embedding in several] == [2, 4]
        assert [prompt.text for prompt in encoder.prompts] == ["four", "a", "bcd"]
        assert encoder.prompts[0].system == "s"

    async def test_a_loading_encoder_is_waited_for(self) -> None:
        encoder = FakeEncoder(*[LOADING] * 5)  # as often as gRPC tries by itself
        async with client_of(encoder=encoder) as client:
            assert (await client.encode("abc")).token_count == 4

    async def test_a_loading_encoder_is_not_waited_for_without_retry(self) -> None:
        encoder = FakeEncoder(*[LOADING] * 5)  # as often as gRPC tries by itself
        async with client_of(encoder=encoder) as client:
            with pytest.raises(Unavailable) as refusal:
                await client.encode("x", retry=False)
            assert refusal.value.reason == "LOADING"

    async def test_only_direct_calls_have_a_time_limit_of_their_own(self) -> None:
        dit, encoder = FakeDit(), FakeEncoder()
        async with client_of(dit, encoder) as client:
            await client.generate("abc")
            await client.generate("abc", timeout=300)
            await client.encode("abc")
            await client.encode("abc", timeout=None)
        unbounded, whole, default, none = encoder.seconds_left
        assert unbounded is none is None
        assert whole is not None
        assert default is not None
        assert 200 < whole < 400
        assert default < 40

    async def test_what_is_needed_is_sent_whether_or_not_somebody_reads(self) -> None:
        dit = NeedyDit()
        data = bytes(range(256)) * (3 << 12)
        large = Embedding(
            tensor=TensorData("float32", (len(data) // 16, services.WIDTH), data),
            identity="ab" * 32,
            recipe=Recipe(chat_format=1, hidden_layer=-2, token_limit=512),
            numerics=Numerics("float32", "float32", "test", "cpu"),
            token_count=len(data) // 16,
            token_ids_sha256="",
        )
        async with client_of(dit) as client, aclosing(client.stream(large)) as events:
            assert isinstance(await anext(events), Accepted)
            await asyncio.wait_for(dit.has_all.wait(), 20)
            assert dit.received == data
            assert [type(event) async for event in events][-1] is Completed

    async def test_with_an_encoder_embeddings_are_sent(self) -> None:
        dit, encoder = FakeDit(), FakeEncoder()
        async with client_of(dit, encoder) as client:
            events = await events_of(client, "abc", guidance=1.0, negative="de")
        assert events[0] == Progress("encoding")
        (spec,) = dit.specs
        assert spec.positive.segments[0].embedding.token_count == 4
        assert spec.negative.segments[0].embedding.token_count == 3
        assert dit.request_ids == encoder.request_ids

    @pytest.mark.parametrize(
        ("default", "options", "texts"),
        [
            (2.5, {}, ["abc", ""]),
            (2.5, {"guidance": 0}, ["abc"]),
            (2.5, {"guidance": 0, "negative": "de"}, ["abc"]),
            (0, {}, ["abc"]),
            (0, {"guidance": 1}, ["abc", ""]),
        ],
    )
    async def test_the_negative_side_is_encoded_where_guidance_is_on(
        self, default: float, options: dict[str, Any], texts: list[str]
    ) -> None:
        dit, encoder = FakeDit(), FakeEncoder()
        dit.description.model.default_guidance_scale = default
        async with client_of(dit, encoder) as client:
            await client.generate(Prompt("abc", hidden_layer=-3), **options)
        assert [prompt.text for prompt in encoder.prompts] == texts
        assert {prompt.hidden_layer for prompt in encoder.prompts} == {-3}
        assert dit.specs[0].HasField("negative") == (len(texts) == 2)

    async def test_a_dit_that_loads_is_waited_for_before_its_default_is_used(self) -> None:
        dit, encoder = FakeDit(), FakeEncoder()
        dit.descriptions.append(dit_pb2.DescribeResponse(ready=False))
        async with client_of(dit, encoder) as client:
            events = await events_of(client, "abc")
        assert [event.reason for event in events if isinstance(event, Waiting)] == ["LOADING"]
        assert isinstance(events[-1], Completed)

    async def test_an_embedding_is_sent_as_it_is(self) -> None:
        dit, encoder = FakeDit(), FakeEncoder()
        async with client_of(dit, encoder) as client:
            embedding = await client.encode(Prompt("abc", hidden_layer=-3))
            await client.generate(embedding, guidance=1.0)
        assert [prompt.text for prompt in encoder.prompts] == ["abc", ""]
        assert encoder.prompts[1].hidden_layer == -3
        sent = dit.specs[0].positive.segments[0].embedding
        assert sent.tensors["embeddings"].data == embedding.tensor.data

    async def test_prompts_are_encoded_once_for_all_tries(self) -> None:
        dit, encoder = FakeDit([LOST], [LOST]), FakeEncoder()
        async with client_of(dit, encoder) as client:
            await client.generate("abc", guidance=0)
        assert len(dit.specs) == 3
        assert len(encoder.prompts) == 1

    async def test_the_id_at_hand_goes_along(self) -> None:
        dit, encoder = FakeDit(), FakeEncoder()
        token = request_id.current.set("mine")
        try:
            async with client_of(dit, encoder) as client:
                await client.generate("abc")
        finally:
            request_id.current.reset(token)
        assert dit.request_ids == encoder.request_ids == ["mine"]


class TestSynchronous:
    async def test_it_works_where_a_loop_is_running(self) -> None:
        dit, encoder = FakeDit(), FakeEncoder()
        with (
            services.serving_aside(dit, encoder) as addresses,
            Client(addresses.server, addresses.encoder) as client,
        ):
            result = client.generate("abc", seed=3)
            kinds = [type(event) for event in client.stream("abc", seed=3)]
            embedding = client.encode("abc")
            several = client.encode(["abc"])
            description = client.describe()
            ready = client.describe_encoder().ready
        assert result.pictures[0].data == services.picture(dit.specs[0])
        assert kinds == [Progress, Accepted, Progress, Progress, Picture, Completed]
        assert several == [embedding]
        assert description.model is not None
        assert description.model.default_guidance == 2.5
        assert ready

    def test_leaving_the_loop_cancels_it_on_the_server(self) -> None:
        spec = dit_pb2.GenerateSpec(seed=3)
        dit = FakeDit([services.accepted(spec), Act.HOLD])
        with services.serving_aside(dit) as addresses, Client(addresses.server) as client:
            for event in client.stream("x"):
                assert isinstance(event, Accepted)
                break
            assert dit.cancelled.wait(10)

    def test_closing_the_client_cancels_what_runs(self) -> None:
        spec = dit_pb2.GenerateSpec(seed=3)
        dit = FakeDit([services.accepted(spec), Act.HOLD])
        with services.serving_aside(dit) as addresses:
            client = Client(addresses.server)
            events = client.stream("x")
            assert isinstance(next(events), Accepted)
            client.close()
            assert dit.cancelled.wait(10)
            events.close()
            with pytest.raises(Cancelled, match="closed"):
                client.describe()
            client.close()

    async def test_closing_an_asynchronous_client_does_so_too(self) -> None:
        spec = dit_pb2.GenerateSpec(seed=3)
        dit = FakeDit([services.accepted(spec), Act.HOLD])
        with services.serving_aside(dit) as addresses:
            async with AsyncClient(addresses.server) as client:
                events = client.stream("x")
                assert isinstance(await anext(events), Accepted)
            assert await asyncio.to_thread(dit.cancelled.wait, 10)
            with pytest.raises(Cancelled, match="closed"):
                await anext(events)

    def test_closing_the_client_ends_the_pause_before_another_try(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        log, pausing = logging.getLogger("zimage_client"), threading.Event()
        caplog.set_level(logging.INFO, log.name)
        handler = logging.Handler()
        handler.emit = lambda _: pausing.set()  # type: ignore[method-assign]
        monkeypatch.setattr(log, "handlers", [handler])
        dit = FakeDit([Unavailable("it loads", reason="LOADING", retry_after=500)])
        with services.serving_aside(dit) as addresses, ThreadPoolExecutor() as pool:
            client = Client(addresses.server)
            call = pool.submit(client.generate, "x")
            assert pausing.wait(10)
            client.close()
            with pytest.raises(Cancelled, match="closed"):
                call.result(10)

    def test_a_stream_holds_its_client(self) -> None:
        with services.serving_aside(FakeDit()) as addresses:
            kinds = [type(event) for event in Client(addresses.server).stream("x")]
        assert kinds[-1] is Completed

    def test_errors_are_the_same(self) -> None:
        dit = FakeDit([InvalidRequest("no", reason="SIZE", fields={"field": "width_px"})])
        with (
            services.serving_aside(dit) as addresses,
            Client(addresses.server) as client,
            pytest.raises(InvalidRequest) as caught,
        ):
            client.generate("x")
        assert caught.value.field == "width_px"

    def test_clients_that_are_forgotten_leave_nothing_behind(self) -> None:
        here = psutil.Process()
        with services.serving_aside(FakeDit()) as addresses:
            Client(addresses.server).describe()
            threads, files = here.num_threads(), here.num_fds()
            clients = [Client(addresses.server) for _ in range(20)]
            for client in clients:
                client.describe()
            # None of their own; gRPC adds one of its own now and then.
            assert here.num_threads() < threads + len(clients) // 2
            del client, clients
            until = time.monotonic() + 10
            while here.num_fds() > files:
                assert time.monotonic() < until
                time.sleep(0.01)

    def test_the_child_of_a_fork_has_clients_of_its_own(self) -> None:
        program = (
            "import os, sys; from zimage_client import Client\n"
            "with Client(sys.argv[1]) as client: client.describe()\n"
            "pid = os.fork()\n"
            "if pid: sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
            "with Client(sys.argv[1]) as client: client.describe()\n"
        )
        with services.serving_aside(FakeDit()) as addresses:
            command = [sys.executable, "-c", program, addresses.server]
            subprocess.run(command, check=True, timeout=30)
