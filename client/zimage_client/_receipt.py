"""What a picture's file says of how it was made: enough to make it again."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from zimage_client import _options, _reading
from zimage_client._events import NumericPlan, Provenance
from zimage_client._options import Options
from zimage_core.embeddings import Prompt
from zimage_core.errors import InvalidRequest, NotFound
from zimage_core.pictures import files
from zimage_core.pictures.files import PictureFile
from zimage_core.wire import embeddings, receipts
from zimage_rpc.dit.v1 import dit_pb2
from zimage_rpc.types.v1 import types_pb2

_OF_THE_FILE = ("format", "quality", "metadata")


@dataclass(frozen=True, slots=True)
class Receipt:
    """How one picture was made."""

    positive: Prompt | str
    """The prompt; for a conditioning that came as an embedding, that embedding's digest."""
    negative: Prompt | str | None
    """None where guidance was off."""
    options: Options
    """What `generate` needs besides to make the pixels again, to the last bit where that can be:
    every setting as it was given or decided, for this picture alone and without company."""
    pixels_sha256: str
    """The digest of its rows of 8-bit RGB, before compression."""
    positive_provenance: Provenance
    negative_provenance: Provenance | None
    numeric_plan: NumericPlan
    model_name: str
    version: str
    """Of the service."""
    text: str
    """All of it, as it stands in the file."""


def read_receipt(path: Path) -> Receipt:
    """The receipt in a picture's file; raises InvalidRequest for a file that is no picture of a
    known kind, NotFound for one without a receipt."""
    return read_picture(path)[0]


def read_picture(path: Path) -> tuple[Receipt, PictureFile]:
    """The same, with the picture."""
    picture = files.decode(path.read_bytes(), str(path))
    if not picture.text:
        raise NotFound(
            f"{path}: there is no receipt in this file; it was made by another program, without "
            "metadata, or a program in between left it out",
            reason="NO_RECEIPT",
            fields={"path": str(path)},
        )
    message = receipts.from_text(picture.text, name=str(path))
    has_negative = message.HasField("negative")
    receipt = Receipt(
        positive=_side(message.spec.positive, path),
        negative=_side(message.spec.negative, path) if has_negative else None,
        options=_repetition(message.spec),
        pixels_sha256=message.pixels_sha256,
        positive_provenance=_reading.provenance(message.positive),
        negative_provenance=_reading.provenance(message.negative) if has_negative else None,
        numeric_plan=_reading.numeric_plan(message.numeric_plan),
        model_name=message.model_name,
        version=message.version,
        text=picture.text,
    )
    return receipt, picture


def _repetition(spec: dit_pb2.GenerateSpec) -> Options:
    decided = _options.options(spec)
    kept = {name: value for name, value in decided.items() if name not in _OF_THE_FILE}
    return cast("Options", kept | {"packing": "solo"})


def _side(message: types_pb2.Conditioning, path: Path) -> Prompt | str:
    if len(message.segments) == 1:
        segment = message.segments[0]
        match segment.WhichOneof("content"):
            case "prompt":
                return embeddings.prompt_from_wire(segment.prompt, field=str(path))
            case "embedding_digest":
                return segment.embedding_digest.sha256
    raise InvalidRequest(
        f"{path}: its receipt names no prompt and no embedding",
        reason="RECEIPT",
        fields={"path": str(path)},
    )
