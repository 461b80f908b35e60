"""What users call the values of the wire's enumerations."""

from collections.abc import Mapping

from zimage_core.planning import schedule, shares
from zimage_rpc.dit.v1 import dit_pb2
from zimage_rpc.types.v1 import types_pb2

FORMATS = {
    "png": dit_pb2.Output.FORMAT_PNG,
    "jpeg": dit_pb2.Output.FORMAT_JPEG,
    "webp": dit_pb2.Output.FORMAT_WEBP,
}
RULES = {
    schedule.OFFICIAL: dit_pb2.Schedule.RULE_OFFICIAL,
    schedule.LEGACY: dit_pb2.Schedule.RULE_LEGACY,
}
VARIANTS = {
    "turbo": dit_pb2.Model.VARIANT_TURBO,
    "base": dit_pb2.Model.VARIANT_BASE,
}
PACKINGS = {
    "shared": types_pb2.PACKING_SHARED,
    "solo": types_pb2.PACKING_SOLO,
}
PRIORITIES = {
    shares.INTERACTIVE: types_pb2.PRIORITY_INTERACTIVE,
    shares.NORMAL: types_pb2.PRIORITY_NORMAL,
    shares.BACKGROUND: types_pb2.PRIORITY_BACKGROUND,
}
METADATA = {
    "receipt": dit_pb2.Output.METADATA_RECEIPT,
    "none": dit_pb2.Output.METADATA_NONE,
}
PREVIEWS = {
    "auto": dit_pb2.Previews.SOURCE_UNSPECIFIED,
    "latents": dit_pb2.Previews.SOURCE_LATENTS,
    "vae": dit_pb2.Previews.SOURCE_VAE,
}
WORKER_STATES = {
    "loading": types_pb2.Worker.STATE_LOADING,
    "idle": types_pb2.Worker.STATE_IDLE,
    "working": types_pb2.Worker.STATE_WORKING,
}


def name_of(value: int, names: Mapping[str, int]) -> str:
    """The name of a value; empty for one that is unset or newer than this code."""
    return next((name for name, number in names.items() if number == value), "")
