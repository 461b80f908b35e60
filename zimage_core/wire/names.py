"""What users call the values of the wire's enumerations."""

from collections.abc import Mapping

from zimage_core import embeddings
from zimage_core.planning import schedule, shares
from zimage_rpc.dit.v1 import dit_pb2, training_pb2
from zimage_rpc.trainer.v1 import trainer_pb2
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
LONG_PROMPT_MODES = {
    embeddings.INTERPOLATE: types_pb2.LONG_PROMPT_MODE_INTERPOLATE,
    embeddings.POOL: types_pb2.LONG_PROMPT_MODE_POOL,
    embeddings.ATTENTION_POOL: types_pb2.LONG_PROMPT_MODE_ATTENTION_POOL,
    embeddings.TRUNCATE: types_pb2.LONG_PROMPT_MODE_TRUNCATE,
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
DISTRIBUTIONS = {
    "uniform": training_pb2.NoisePlan.DISTRIBUTION_UNIFORM,
    "logit_normal": training_pb2.NoisePlan.DISTRIBUTION_LOGIT_NORMAL,
    "schedule": training_pb2.NoisePlan.DISTRIBUTION_SCHEDULE,
}
OPTIMIZERS = {
    "adamw": training_pb2.OptimizerPlan.NAME_ADAMW,
    "adafactor": training_pb2.OptimizerPlan.NAME_ADAFACTOR,
    "prodigy": training_pb2.OptimizerPlan.NAME_PRODIGY,
    "adamw_8bit": training_pb2.OptimizerPlan.NAME_ADAMW_8BIT,
}
COURSES = {
    "constant": training_pb2.LearningRatePlan.COURSE_CONSTANT,
    "cosine": training_pb2.LearningRatePlan.COURSE_COSINE,
    "one_cycle": training_pb2.LearningRatePlan.COURSE_ONE_CYCLE,
}
JOB_STATES = {
    "waiting": trainer_pb2.TrainJob.STATE_WAITING,
    "running": trainer_pb2.TrainJob.STATE_RUNNING,
    "paused": trainer_pb2.TrainJob.STATE_PAUSED,
    "completed": trainer_pb2.TrainJob.STATE_COMPLETED,
    "failed": trainer_pb2.TrainJob.STATE_FAILED,
    "cancelled": trainer_pb2.TrainJob.STATE_CANCELLED,
}
SAVE_DTYPES = {
    "bfloat16": training_pb2.SavePlan.DTYPE_BFLOAT16,
    "float16": training_pb2.SavePlan.DTYPE_FLOAT16,
    "float32": training_pb2.SavePlan.DTYPE_FLOAT32,
}
RECOMPUTES = {
    "blocks": training_pb2.TrainingPlan.RECOMPUTE_BLOCKS,
    "elementwise": training_pb2.TrainingPlan.RECOMPUTE_ELEMENTWISE,
    "offloaded": training_pb2.TrainingPlan.RECOMPUTE_OFFLOADED,
    "nothing": training_pb2.TrainingPlan.RECOMPUTE_NOTHING,
}


def name_of(value: int, names: Mapping[str, int]) -> str:
    """The name of a value; empty for one that is unset or newer than this code."""
    return next((name for name, number in names.items() if number == value), "")
