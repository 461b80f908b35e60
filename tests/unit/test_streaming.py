"""Weights that take turns on the device: the same numbers in less memory."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dit_service.model.loading import Residence, load_transformer
from dit_service.model.streaming import Streaming
from dit_service.model.transformer import Sample, ZImageTransformer
from tests.device.full_size import CONFIG
from zimage_core.errors import InvalidSettings
from zimage_core.planning.memory import WeightBytes, turn_count, turning_blocks, weight_bytes

CPU = torch.device("cpu")


def _velocities(model: ZImageTransformer, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(8, 12, 20), (16, 8, 40)]
    channels, width = model.config.in_channels, model.config.cap_feat_dim
    features = [torch.randn(tokens, width, generator=generator) for *_, tokens in sizes]
    captions = model.encode_captions(features)
    moments = model.modulate(torch.rand(len(sizes), generator=generator))
    samples = [
        Sample(torch.randn(channels, height, wide, generator=generator), caption, moment)
        for (height, wide, _), caption, moment in zip(sizes, captions, moments, strict=True)
    ]
    layout = model.layout([model.shape_of(one.latents_CHW, one.caption) for one in samples])
    velocities: list[Tensor] = model(samples, layout)
    return velocities


def _bytes_on_device(model: ZImageTransformer) -> int:
    storages = {
        weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes()
        for weight in model.state_dict().values()
    }
    return sum(storages.values())


@pytest.mark.parametrize("form", ["full", "int8", "fp8"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_pictures_are_the_same_in_less_memory(model_folder: Path, form: str, share: float) -> None:
    whole = load_transformer(model_folder, CPU, torch.float32, Residence(form))
    wanted = weight_bytes(whole.config, 4, form)
    assert _bytes_on_device(whole) == wanted.all
    room = wanted.least + share * (wanted.all - wanted.least)
    streamed = load_transformer(model_folder, CPU, torch.float32, Residence(form, room))
    count = wanted.block_count - (wanted.block_count % 2 if share == 0 else 0)
    assert streamed.streamed_block_count % 2 == 0
    assert (streamed.streamed_block_count == count) == (share == 0)
    assert _bytes_on_device(streamed) <= room + 512 * 14
    with torch.inference_mode():
        for seed in (1, 2, 3):
            expected = _velocities(whole, seed)
            for ours, theirs in zip(_velocities(streamed, seed), expected, strict=True):
                assert torch.equal(ours, theirs)


def test_too_little_room_is_refused_with_what_is_needed(model_folder: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"max_weight_bytes: 1000 bytes .* \d+ are the least"):
        load_transformer(model_folder, CPU, torch.float32, Residence("full", 1000))


@pytest.mark.parametrize("form", ["full", "int8", "nf4"])
def test_what_takes_turns_fits_at_every_size_and_no_more_than_has_to(form: str) -> None:
    wanted = weight_bytes(CONFIG, 2, form)
    assert turn_count(wanted, wanted.all) == 0
    for share in range(100):
        room = wanted.least + (wanted.all - 1 - wanted.least) * share / 99
        count = turn_count(wanted, room)
        assert _taken(wanted, count) <= room
        assert _taken(wanted, count - 2) > room
        names = turning_blocks(CONFIG, count)
        assert len(set(names)) == count
        assert names == sorted(names, key=lambda name: (name[0] == "l", int(name.split(".")[1])))
    with pytest.raises(ValueError, match="are the least"):
        turn_count(wanted, wanted.least - 1)


def _taken(wanted: WeightBytes, count: int) -> int:
    return wanted.lasting + wanted.block * (wanted.block_count - count + 2)


class Recorder:
    """Stands for a device with two queues of work: says in which order what is asked may happen."""

    def __init__(self) -> None:
        self.computed: list[tuple[str, int]] = []
        """Blocks, and how many copies had arrived for certain when each began."""
        self.copied: list[int] = []
        """How many blocks had been computed for certain when each copy began."""
        self.arrived = self.may_begin = 0

    def stream(self, _device: object) -> "Recorder":
        return self

    def event(self, _device: object) -> "Arrival":
        return Arrival()

    def wait_stream(self, _other: object) -> None:
        self.may_begin = len(self.computed)

    def wait_event(self, arrival: "Arrival") -> None:
        self.arrived = max(self.arrived, arrival.copies)

    def __enter__(self) -> None:
        self.copied.append(self.may_begin)

    def __exit__(self, *_error: object) -> None:
        pass


class Arrival:
    copies = 0

    def record(self, stream: Recorder) -> None:
        self.copies = len(stream.copied)


@pytest.mark.parametrize("count", [2, 4, 6])
def test_no_copy_meets_what_computes_and_no_block_computes_before_its_copy(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the copies beside the computing, as on a GPU."""
    recorder = Recorder()
    monkeypatch.setattr(torch, "Stream", recorder.stream)
    monkeypatch.setattr(torch, "Event", recorder.event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda *_device: recorder)
    names = [f"layers.{index}" for index in range(count)]
    linears = {name: [torch.nn.Linear(4, 4, bias=False)] for name in names}
    streaming = Streaming(linears, torch.device("meta"))
    for name in names * 3:
        streaming.bring(name)
        recorder.computed.append((name, recorder.arrived))
    for position, (_, arrived) in enumerate(recorder.computed):
        assert arrived == position + 1, "its own copy, the last one asked for before it, is there"
    for number, computed in enumerate(recorder.copied):
        assert computed >= number - 1, "who had the buffer before has been computed"
    assert recorder.copied[2:] == list(range(1, len(recorder.copied) - 1)), "and none waits longer"
