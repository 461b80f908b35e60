"""Receipts as the text that a picture's file carries, and back."""

from google.protobuf import json_format

from zimage_core.errors import InvalidRequest
from zimage_rpc.dit.v1 import dit_pb2

FORMAT = 1
"""The version of the text's form."""


def to_text(receipt: dit_pb2.Receipt) -> str:
    """JSON in ASCII, with the names of the protos."""
    return json_format.MessageToJson(receipt, preserving_proto_field_name=True, indent=None)


def from_text(text: str, *, name: str) -> dit_pb2.Receipt:
    """The receipt in a file of this name; raises InvalidRequest for what is none."""
    try:
        receipt = json_format.Parse(text, dit_pb2.Receipt())
    except (json_format.ParseError, RecursionError) as error:
        raise _broken(name, f"its receipt cannot be read: {error}") from None
    if receipt.format != FORMAT:
        raise _broken(name, f"its receipt has format {receipt.format}, this version reads {FORMAT}")
    return receipt


def _broken(name: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: {what}", reason="RECEIPT", fields={"path": name})
