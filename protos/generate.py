"""Generates the Python code and the readable wire snapshot from the protos, or proves them fresh.

python protos/generate.py            writes protos/gen and protos/wire.txt
python protos/generate.py --check    changes nothing; exits 1 and says what differs
"""

import argparse
import filecmp
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
GENERATED = PROTOS / "gen"
SNAPSHOT = PROTOS / "wire.txt"


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "gen"
        snapshot = generate(fresh)
        if not check:
            shutil.rmtree(GENERATED, ignore_errors=True)
            shutil.copytree(fresh, GENERATED)
            SNAPSHOT.write_text(snapshot)
            return 0
        stale = sorted(differences(fresh, GENERATED))
        if not SNAPSHOT.is_file() or SNAPSHOT.read_text() != snapshot:
            stale.append(SNAPSHOT.name)
    for name in stale:
        sys.stderr.write(f"stale: {name}; run `make proto`\n")
    return 1 if stale else 0


def generate(target: Path) -> str:
    """Writes the generated packages into `target`; returns the snapshot's text."""
    target.mkdir(parents=True)
    sources = sorted(
        str(path.relative_to(PROTOS)) for path in (PROTOS / "zimage_rpc").rglob("*.proto")
    )
    descriptors = target / "descriptors.binpb"
    _protoc(sources, "--include_imports", f"--descriptor_set_out={descriptors}")
    described = descriptor_pb2.FileDescriptorSet.FromString(descriptors.read_bytes())
    descriptors.unlink()
    _protoc(sources, f"--python_out={target}", f"--mypy_out=quiet:{target}")
    with_service = [file.name for file in described.file if file.service and file.name in sources]
    _protoc(with_service, f"--grpc_python_out={target}", f"--mypy_grpc_out=quiet:{target}")
    for package in sorted(path for path in target.rglob("*") if path.is_dir()):
        (package / "__init__.py").touch()
    (target / "zimage_rpc" / "py.typed").touch()
    ours = [file for file in described.file if file.name in sources]
    return "".join(f"{line}\n" for line in sorted(_lines(ours)))


def differences(left: Path, right: Path) -> Iterator[str]:
    """Names of files that are not the same in both trees."""
    paths = {
        path.relative_to(root)
        for root in (left, right)
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    for path in paths:
        pair = left / path, right / path
        if not all(one.is_file() for one in pair) or not filecmp.cmp(*pair, shallow=False):
            yield str(path)


def _protoc(sources: list[str], *options: str) -> None:
    includes = [f"-I{PROTOS}", f"-I{files('grpc_tools') / '_proto'}"]
    plugins = [
        f"--plugin={name}={Path(sys.executable).with_name(name)}"
        for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    ]
    if protoc.main(["protoc", *includes, *plugins, *options, *sources]) != 0:
        raise SystemExit("protoc failed")


def _lines(described: list[descriptor_pb2.FileDescriptorProto]) -> Iterator[str]:
    for file in described:
        for service in file.service:
            for method in service.method:
                request = "stream " * method.client_streaming + method.input_type.lstrip(".")
                answer = "stream " * method.server_streaming + method.output_type.lstrip(".")
                yield f"{file.package}.{service.name}.{method.name}({request}) -> {answer}"
        yield from _type_lines(file.package, file.message_type, file.enum_type)


def _type_lines(
    scope: str,
    messages: "list[descriptor_pb2.DescriptorProto]",
    enums: "list[descriptor_pb2.EnumDescriptorProto]",
) -> Iterator[str]:
    for enum in enums:
        for value in enum.value:
            yield f"{scope}.{enum.name} = {value.number} {value.name}"
    for message in messages:
        name = f"{scope}.{message.name}"
        yield f"{name} message"
        for field in message.field:
            yield f"{name}.{field.name} = {field.number} {_field_type(message, field)}"
        for reserved in message.reserved_range:
            yield f"{name} reserved {reserved.start}..{reserved.end - 1}"
        yield from _type_lines(name, list(message.nested_type), list(message.enum_type))


def _field_type(
    message: descriptor_pb2.DescriptorProto, field: descriptor_pb2.FieldDescriptorProto
) -> str:
    kind = field.type_name.lstrip(".") or field.Type.Name(field.type).removeprefix("TYPE_").lower()
    if field.label == field.LABEL_REPEATED:
        return f"repeated {kind}"
    if field.proto3_optional:
        return f"optional {kind}"
    if field.HasField("oneof_index"):
        return f"oneof {message.oneof_decl[field.oneof_index].name} {kind}"
    return kind


if __name__ == "__main__":
    sys.exit(main())
