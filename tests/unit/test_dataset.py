"""Pictures and captions as they are found on a disk."""

import json
from pathlib import Path

import pytest
from PIL import Image

from zimage_client._dataset import Source, gather
from zimage_core.errors import InvalidRequest
from zimage_core.formats import dataset_file

LEAST_PX = 32


def _picture(path: Path, size: tuple[int, int] = (64, 48), colour: object = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)  # type: ignore[arg-type]


def test_pictures_with_texts_beside_them(tmp_path: Path) -> None:
    _picture(tmp_path / "b.png", colour="blue")
    _picture(tmp_path / "deep/a.jpg", (80, 40))
    (tmp_path / "c.png").write_bytes((tmp_path / "b.png").read_bytes())
    (tmp_path / "c.txt").write_text("blue, too")
    (tmp_path / "b.txt").write_text("\ufeffblue \n", encoding="utf-8")
    (tmp_path / "deep/a.txt").write_text("red")
    source = Source(tmp_path, trigger="glorp", repeats=3, weight=0.5, flips=True)
    found = gather([source], LEAST_PX)
    found.check(skips_faulty=False)
    named = [(one.name, one.caption, one.width_px, one.height_px) for one in found.examples]
    assert named == [
        ("b.png", "glorp blue", 64, 48),
        ("c.png", "glorp blue, too", 64, 48),
        ("deep/a.jpg", "glorp red", 80, 40),
    ]
    assert found.again == ["c.png"]
    assert {(one.repeats, one.weight, one.flips) for one in found.examples} == {(3, 0.5, True)}
    assert set(found.paths) == {one.sha256 for one in found.examples}
    assert dataset_file.load(dataset_file.dump(found.examples)) == tuple(found.examples)


def test_lines_name_pictures_and_their_captions(tmp_path: Path) -> None:
    _picture(tmp_path / "a.png")
    _picture(tmp_path / "left.png")
    lines = [
        {"file_name": "a.png", "text": "one\u2028still one"},
        {"file_name": "a.png", "text": "two"},
        {"file_name": "gone.png", "text": "three"},
        {"file_name": "../secret.png", "text": "four"},
    ]
    texts = (json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(texts))
    found = gather([Source(tmp_path)], LEAST_PX)
    assert [one.caption for one in found.examples] == ["one\u2028still one", "two"]
    assert found.again == []
    assert found.faults == {
        "without a line in metadata.jsonl": ["left.png"],
        "that cannot be read (No such file or directory)": ["gone.png"],
        "outside of their folder": ["../secret.png"],
    }


@pytest.mark.parametrize(
    "line",
    [b'{"file_name": "a.png"}', b'{"file_name": "a.png", "text": null}', b"\xff", b"[" * 100_000],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "metadata.jsonl").write_bytes(line)
    with pytest.raises(InvalidRequest, match=r"metadata\.jsonl, line 1: .*file_name and one of"):
        gather([Source(tmp_path)], LEAST_PX)


def test_what_cannot_be_learnt_from_is_counted_and_named(tmp_path: Path) -> None:
    _picture(tmp_path / "good.png")
    (tmp_path / "good.txt").write_text("good")
    for number in range(7):
        _picture(tmp_path / f"mute-{number}.png")
    _picture(tmp_path / "tiny.png", (64, 16))
    (tmp_path / "tiny.txt").write_text("tiny")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "torn.txt").write_text("torn")
    found = gather([Source(tmp_path)], LEAST_PX)
    with pytest.raises(InvalidRequest) as caught:
        found.check(skips_faulty=False)
    said = caught.value.message
    assert "7 without a text file beside it: mute-0.png, mute-1.png" in said
    assert "and 2 more" in said
    assert "1 with a side of less than 32 pixels: tiny.png" in said
    assert "torn.png" in said
    found.check(skips_faulty=True)
    assert [one.name for one in found.examples] == ["good.png"]


def test_nothing_left_is_an_error_even_where_faults_are_skipped(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no pictures to learn from"):
        gather([Source(tmp_path)], LEAST_PX).check(skips_faulty=True)
    with pytest.raises(InvalidRequest, match="there is no such folder"):
        gather([Source(tmp_path / "other")], LEAST_PX)


def test_masks_go_with_their_pictures(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        _picture(tmp_path / f"{name}.jpg")
    _picture(tmp_path / "masks/a.png", colour="white")
    _picture(tmp_path / "masks/b.png", (64, 64), "white")
    _picture(tmp_path / "masks/c.png", colour="black")
    found = gather([Source(tmp_path, caption="x", masks=tmp_path / "masks")], LEAST_PX)
    [example] = found.examples
    assert example.name == "a.jpg"
    assert found.paths[example.mask_sha256] == tmp_path / "masks/a.png"
    assert found.faults == {
        "with a mask of another size": ["b.jpg"],
        "with a mask that is black": ["c.jpg"],
        f"without a mask in {tmp_path / 'masks'}": ["d.jpg"],
    }
