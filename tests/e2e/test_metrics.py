"""What Prometheus reads of running services."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.services import Service, running
from zimage_client import Client, InvalidRequest
from zimage_core.serving import metrics

Values = dict[tuple[str, frozenset[str]], float]


@pytest.fixture(scope="module")
def services(model_folder: Path) -> Iterator[tuple[Service, Service]]:
    model = ["--model", str(model_folder)]
    with (
        running("encoder_service", *model) as encoder,
        running("dit_service", *model, "--encoder", encoder.address) as dit,
    ):
        for service in (encoder, dit):
            service.wait_until("SERVING")
        yield encoder, dit


def _values(service: Service) -> Values:
    return {
        (sample.name, frozenset(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(service.metrics_page())
        for sample in family.samples
    }


def test_the_numbers_count_what_was_done(services: tuple[Service, Service]) -> None:
    encoder, dit = services
    before, encoded_before = _values(dit), _values(encoder)
    with Client(dit.address) as client:
        client.generate("a red circle", width=64, height=48, steps=3, count=2)
        with pytest.raises(InvalidRequest):
            client.generate("a red circle", steps=0)
    after, encoded = _values(dit), _values(encoder)

    def grown(values: Values, old: Values, name: str, *labels: str) -> float:
        key = name, frozenset(labels)
        return values[key] - old.get(key, 0)

    generate = "DitService/Generate"
    assert grown(after, before, "zimage_rpc_started_total", generate) == 2
    assert grown(after, before, "zimage_rpc_ended_total", generate, "OK") == 1
    assert grown(after, before, "zimage_rpc_ended_total", generate, "INVALID_ARGUMENT") == 1
    assert after["zimage_rpc_running", frozenset([generate])] == 0
    assert grown(after, before, "zimage_dit_pictures_total") == 2
    assert grown(after, before, "zimage_dit_pixels_total") == 2 * 64 * 48
    assert grown(after, before, "zimage_dit_forwards_total") == 6
    assert grown(after, before, "zimage_dit_step_requests_sum") == pytest.approx(1.0)
    for stage in ("encode", "queue", "denoise", "decode"):
        assert grown(after, before, "zimage_dit_stage_seconds_count", stage) == 1
    assert grown(after, before, "zimage_worker_busy_seconds_total", "denoise") > 0
    assert grown(after, before, "zimage_rpc_bytes_total", generate, "out") > 1000
    assert after["zimage_worker_ready", frozenset()] == 1
    assert after["zimage_worker_starts_total", frozenset()] == 1
    assert after["zimage_worker_memory_bytes", frozenset(["host"])] > 100e6  # torch alone is more
    assert grown(encoded, encoded_before, "zimage_encoder_prompts_total") == 1
    assert grown(encoded, encoded_before, "zimage_encoder_tokens_total") > 3
    assert after["process_resident_memory_bytes", frozenset()] > 0


def test_fronts_know_no_torch_whatever_their_workers_say(
    services: tuple[Service, Service],
) -> None:
    for service in services:
        for process, has_torch in (
            (psutil.Process(service.process.pid), False),
            (service.worker, True),
        ):
            mapped = " ".join(one.path for one in process.memory_maps())
            assert ("libtorch" in mapped) == has_torch


def test_no_number_speaks_of_prompts_or_people(services: tuple[Service, Service]) -> None:
    encoder, dit = services
    labels = {name for metric in metrics.ALL for name in metric._labelnames}
    known = {"method", "code", "reason", "direction", "work", "stage", "kind", "source", "result"}
    assert labels == known
    with Client(dit.address) as client:
        client.generate("a red circle", steps=1)
    for service in (encoder, dit):
        assert "circle" not in service.metrics_page()
        assert not [line for line in service.log if "circle" in line]
