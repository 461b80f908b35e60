"""The demo model as it is shipped."""

from zimage_client._embedded.stack import demo_model


def test_it_is_whole_and_small() -> None:
    files = [path for path in demo_model().rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == {
        *("zimage-demo", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"),
    }
    assert sum(path.stat().st_size for path in files) <= 16_000_000
