"""Single files as ComfyUI has them: the same weights, encoders and pictures as folders."""

from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save_file

from dit_service.model.loading import load_transformer, load_vae
from encoder_service.model.loading import load as load_encoder
from encoder_service.model.qwen import Text
from tests import single_files
from zimage_core.errors import InvalidModel, InvalidSettings
from zimage_core.formats.encoder_files import EncoderFiles
from zimage_core.wire.identities import encoder_identities

CPU = torch.device("cpu")
FLOAT = torch.float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return single_files.build_folder(tmp_path_factory.mktemp("single") / "folder")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_transformer_is_the_same(folder: Path, tmp_path: Path, prefix: str) -> None:
    path = single_files.write_transformer(folder, tmp_path / "turbo.safetensors", prefix)
    ours, theirs = load_transformer(path, CPU, FLOAT), load_transformer(folder, CPU, FLOAT)
    assert ours.config == theirs.config
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name


def test_the_names_are_those_that_diffusers_reads(folder: Path, tmp_path: Path) -> None:
    """Or the test before would prove no more than that two of our tables fit each other."""
    path = single_files.write_transformer(folder, tmp_path / "turbo.safetensors")
    config = str(folder / "transformer")
    read = ZImageTransformer2DModel.from_single_file(
        str(path), config=config, torch_dtype=FLOAT, local_files_only=True
    )
    ours = load_transformer(folder, CPU, FLOAT).state_dict()
    assert all(torch.equal(weight, ours[name]) for name, weight in read.state_dict().items())


def test_a_pad_token_may_lack_a_dimension(folder: Path, tmp_path: Path) -> None:
    path = single_files.write_transformer(folder, tmp_path / "turbo.safetensors")
    pad = torch.randn(256)
    single_files.edit(path, cap_pad_token=pad)
    assert torch.equal(load_transformer(path, CPU, FLOAT).cap_pad_token[0], pad)


def test_a_vae_decodes_the_same(folder: Path, tmp_path: Path) -> None:
    path = single_files.write_vae(folder, tmp_path / "ae.safetensors")
    ours, theirs = load_vae(folder, CPU, FLOAT, path), load_vae(folder, CPU, FLOAT)
    latents_CHW = torch.randn(16, 8, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours.decode(latents_CHW)[0], theirs.decode(latents_CHW)[0])
    assert (ours.factor, ours.latent_channels) == (theirs.factor, theirs.latent_channels)
    again = load_vae(folder, CPU, FLOAT, folder / "vae")
    assert torch.equal(again.decode(latents_CHW)[0], theirs.decode(latents_CHW)[0])


@pytest.mark.parametrize("prefix", ["", "model."])
def test_an_encoder_is_the_same_and_no_stranger(folder: Path, tmp_path: Path, prefix: str) -> None:
    path = single_files.write_encoder(folder, tmp_path / "qwen_3_4b.safetensors", prefix)
    beside = EncoderFiles.of(path, folder / "tokenizer")
    within = EncoderFiles.of(folder)
    cache = tmp_path / "cache"
    assert encoder_identities(beside, cache) == encoder_identities(within, cache)
    prompt = [Text(range(5, 25), ((-2, 1.0),))]
    ours, theirs = (load_encoder(files, -2, "cpu", "float32") for files in (beside, within))
    assert torch.equal(ours(prompt)[0].state, theirs(prompt)[0].state)


def test_an_encoder_file_needs_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    path = single_files.write_encoder(folder, tmp_path / "qwen.safetensors")
    with pytest.raises(InvalidSettings, match="--tokenizer"):
        EncoderFiles.of(path)
    file = folder / "tokenizer" / "tokenizer.json"
    assert EncoderFiles.of(path, file) == EncoderFiles.of(path, folder / "tokenizer")


def test_what_is_no_transformer_is_refused(folder: Path, tmp_path: Path) -> None:
    flux, turbo = tmp_path / "flux.safetensors", tmp_path / "turbo.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, flux)
    with pytest.raises(InvalidModel, match=r"no Z-Image transformer.*double_blocks"):
        load_transformer(flux, CPU, FLOAT)
    single_files.write_transformer(folder, turbo)
    single_files.edit(turbo, **{"layers.1.attention.out.weight": None})
    with pytest.raises(InvalidModel, match=r"1 weights are missing.*layers\.1\.attention\.to_out"):
        load_transformer(turbo, CPU, FLOAT)


def test_a_small_model_needs_its_folder(model_folder: Path, tmp_path: Path) -> None:
    """Its constants are its own."""
    turbo = single_files.write_transformer(model_folder, tmp_path / "small.safetensors")
    with pytest.raises(InvalidModel, match="heads of 48"):
        load_transformer(turbo, CPU, FLOAT)
    encoder = single_files.write_encoder(model_folder, tmp_path / "encoder.safetensors")
    with pytest.raises(InvalidModel, match="heads of 32"):
        EncoderFiles.of(encoder, tmp_path).config()


def test_what_is_no_vae_is_refused(folder: Path, tmp_path: Path) -> None:
    turbo = single_files.write_transformer(folder, tmp_path / "turbo.safetensors")
    with pytest.raises(InvalidModel, match="no VAE of latent diffusion"):
        load_vae(folder, CPU, FLOAT, turbo)
    with pytest.raises(InvalidModel, match="no VAE of latent diffusion"):
        load_vae(folder, CPU, FLOAT, folder / "vae" / "diffusion_pytorch_model.safetensors")
    four = tmp_path / "sd.safetensors"
    shapes = {"decoder.conv_in.weight": (32, 4, 3, 3)}
    shapes["encoder.down.0.block.0.conv2.weight"] = (32, 32, 3, 3)
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, four)
    with pytest.raises(InvalidModel, match="this VAE has 4 latent channels"):
        load_vae(folder, CPU, FLOAT, four)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"decoder.conv_out.weight": None}, r"Missing key.*decoder\.conv_out"),
        ({"decoder.conv_in.weight": torch.ones(64, 16, 3, 3).to(torch.float8_e4m3fn)}, "F8_E4M3"),
        ({"quant_conv.weight": torch.ones(32, 32, 1, 1)}, "quant_conv"),
    ],
    ids=["incomplete", "quantized", "another family"],
)
def test_a_vae_with_other_weights_is_refused(
    folder: Path, tmp_path: Path, change: dict[str, torch.Tensor], complaint: str
) -> None:
    path = single_files.write_vae(folder, tmp_path / "ae.safetensors")
    single_files.edit(path, **change)
    with pytest.raises(InvalidModel, match=rf"(?s)ae\.safetensors.*{complaint}"):
        load_vae(folder, CPU, FLOAT, path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"layers.1.pre_feedforward_layernorm.weight": torch.ones(128)}, "no Qwen3"),
        ({"layers.1.self_attn.q_proj.bias": torch.ones(256)}, "no Qwen3"),
        ({"layers.1.self_attn.q_proj.weight_scale": torch.ones(1)}, "quantized"),
        ({"norm.weight": None}, "cut off"),
    ],
)
def test_an_encoder_of_another_kind_is_refused(
    folder: Path, tmp_path: Path, change: dict[str, torch.Tensor], complaint: str
) -> None:
    path = single_files.write_encoder(folder, tmp_path / "qwen.safetensors", prefix="")
    single_files.edit(path, **change)
    with pytest.raises(InvalidModel, match=complaint):
        EncoderFiles.of(path, folder / "tokenizer").config()


def test_a_tensor_under_two_names_is_refused(folder: Path, tmp_path: Path) -> None:
    path = single_files.write_transformer(folder, tmp_path / "turbo.safetensors")
    single_files.edit(path, **{"diffusion_model.x_pad_token": torch.zeros(1, 256)})
    with pytest.raises(InvalidModel, match="x_pad_token stands in this file twice"):
        load_transformer(path, CPU, FLOAT)
