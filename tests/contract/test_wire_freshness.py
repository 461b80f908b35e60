"""The generated code is what the protos say, and asks for no newer libraries than we do."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUF = ROOT / "protos/node_modules/.bin/buf"
GENERATED = ROOT / "protos/gen/zimage_rpc"


def _floor(package: str) -> tuple[int, ...]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [requirement] = [r for r in project["dependencies"] if r.split(">=")[0] == package]
    floor = re.match(r"[^>]+>=([\d.]+)", requirement)
    assert floor
    return tuple(int(part) for part in floor[1].split("."))


def test_generated_code_and_snapshot_are_fresh() -> None:
    command = [sys.executable, str(ROOT / "protos/generate.py"), "--check"]
    check = subprocess.run(command, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr


def test_a_changed_proto_is_noticed(tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "protos"
    shutil.copytree(ROOT / "protos", copy, ignore=shutil.ignore_patterns("node_modules"))
    proto = copy / "zimage_rpc/types/v1/types.proto"
    proto.write_text(proto.read_text().replace("string text = 1;", "string text = 99;"))
    command = [sys.executable, str(copy / "generate.py"), "--check"]
    check = subprocess.run(command, capture_output=True, text=True, check=False)
    assert check.returncode == 1
    assert "types_pb2.py" in check.stderr
    assert "wire.txt" in check.stderr


def test_the_floor_of_grpcio_is_the_stamp_in_the_stubs() -> None:
    stamps = {
        found[1]
        for path in GENERATED.rglob("*_pb2_grpc.py")
        if (found := re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", path.read_text()))
    }
    assert stamps == {".".join(map(str, _floor("grpcio")))}


def test_the_floor_of_protobuf_is_the_stamp_in_the_messages() -> None:
    stamps = {
        tuple(int(part) for part in found.groups())
        for path in GENERATED.rglob("*_pb2.py")
        if (found := re.search(r"Python Version: (\d+)\.(\d+)\.(\d+)", path.read_text()))
        or (found := re.search(r"Protobuf Python Version: (\d+)\.(\d+)\.(\d+)", path.read_text()))
    }
    assert stamps == {_floor("protobuf")}


@pytest.mark.skipif(not BUF.exists(), reason="npm has not installed buf")
@pytest.mark.parametrize("command", [["lint"], ["format", "--diff", "--exit-code"]])
def test_buf_is_content(command: list[str]) -> None:
    check = subprocess.run(
        [str(BUF), *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stdout + check.stderr
