"""What best goes where, by seconds and bytes."""

from dataclasses import replace

from zimage_client._placing import DitHere, EncoderHere, Speed, advice

GPU = DitHere("gpu:50052", "cuda", 1024, 0.07, 0.1, 0.1, 1_600_000, Speed(100e6, 100e6))
SLOW = replace(GPU, address="cpu:50052", forward_seconds=60.0)
MAC = EncoderHere("mac:50051", "mps", 0.3, 330_000)
HOST = EncoderHere("host:50051", "cpu", 2.0, 330_000)


def test_the_fastest_are_taken_and_why_is_told() -> None:
    best = dict(advice([HOST, MAC], [SLOW, GPU]))
    assert best["DiT"].startswith("gpu:50052: 0.070 s a forward, the least of 2")
    assert best["encoder"].startswith("mac:50051: 0.30 s a prompt, and 0.33 MB to gpu:50052")
    assert best["trainer"].startswith("may be here: a sample that is new")


def test_a_thin_link_moves_the_trainer_to_the_device() -> None:
    thin = replace(GPU, speed=Speed(2e6, 2e6))
    best = dict(advice([MAC], [thin]))
    assert best["trainer"].startswith("best goes to the machine of gpu:50052")
    assert "1.05 MB of latents would travel as well, in 0.52 s" in best["VAE"]


def test_a_service_alone_is_told_alone() -> None:
    assert [what for what, _ in advice([MAC], [])] == ["encoder"]
    assert [what for what, _ in advice([], [GPU])] == ["DiT", "VAE"]
