"""What the published models have in common and no tensor tells: needed where a model comes as a
single file, without the configs of a folder."""

from zimage_core.planning.flops import DitShape

HEAD_DIM = 128
"""A model with heads of another size has other constants, too."""

DIT_AXES_DIMS = (32, 48, 48)
DIT_AXES_LENS = (1536, 512, 512)
DIT_ROPE_THETA = 256.0
DIT_TIME_SCALE = 1000.0
DIT_NORM_EPS = 1e-5
DIT_PATCH_SIZE = 2

QWEN_ROPE_THETA = 1_000_000.0
QWEN_NORM_EPS = 1e-6
QWEN_MOST_POSITIONS = 40960

VAE_LATENT_CHANNELS = 16
VAE_SCALING_FACTOR = 0.3611
VAE_SHIFT_FACTOR = 0.1159
VAE_NORM_GROUPS = 32
VAE_SIDE_PX = 1024

DIT_SHAPE = DitShape(
    dim=3840,
    n_layers=30,
    n_refiner_layers=2,
    n_heads=30,
    in_channels=VAE_LATENT_CHANNELS,
    cap_feat_dim=2560,
    patch_size=DIT_PATCH_SIZE,
)
ENCODER_BYTES = 7_840_000_000
"""Its 35 layers in use and the embedding table, in bfloat16."""
VAE_BYTES = 168_000_000
