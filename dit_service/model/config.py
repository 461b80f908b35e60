"""The transformer's config file, as far as the model depends on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zimage_core.errors import InvalidModel
from zimage_core.planning.flops import DitShape

_CLASS_NAME = "ZImageTransformer2DModel"


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(DitShape):
    """Every number that shapes the transformer; none has a default here."""

    axes_dims: tuple[int, ...]
    axes_lens: tuple[int, ...]
    norm_eps: float
    rope_theta: float
    t_scale: float

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "TransformerConfig":
        """Reads `transformer/config.json`; refuses another family and variants we do not run."""
        _check_variant(values)
        try:
            return cls(
                dim=int(values["dim"]),
                n_layers=int(values["n_layers"]),
                n_refiner_layers=int(values["n_refiner_layers"]),
                n_heads=int(values["n_heads"]),
                in_channels=int(values["in_channels"]),
                cap_feat_dim=int(values["cap_feat_dim"]),
                patch_size=int(values["all_patch_size"][0]),
                axes_dims=tuple(int(dim) for dim in values["axes_dims"]),
                axes_lens=tuple(int(length) for length in values["axes_lens"]),
                norm_eps=float(values["norm_eps"]),
                rope_theta=float(values["rope_theta"]),
                t_scale=float(values["t_scale"]),
            )
        except KeyError as missing:
            raise _invalid(
                f"the transformer's config has no {missing}", "CONFIG_INCOMPLETE"
            ) from None
        except (TypeError, ValueError, IndexError) as error:
            raise _invalid(
                f"the transformer's config is malformed: {error}", "CONFIG_MALFORMED"
            ) from None

    def __post_init__(self) -> None:
        if len(self.axes_dims) != 3 or len(self.axes_lens) != 3:
            raise _invalid("axes_dims and axes_lens need three entries each", "CONFIG_MALFORMED")
        if self.n_heads * sum(self.axes_dims) != self.dim:
            raise _invalid(
                f"{self.n_heads} heads of {sum(self.axes_dims)} do not make dim {self.dim}",
                "CONFIG_MALFORMED",
            )


def _check_variant(values: Mapping[str, Any]) -> None:
    class_name = values.get("_class_name", _CLASS_NAME)
    if class_name != _CLASS_NAME:
        raise _invalid(
            f"the transformer is a {class_name}; this service runs {_CLASS_NAME}", "FOREIGN_MODEL"
        )
    if values.get("siglip_feat_dim") is not None:
        raise _invalid(
            "the transformer is a Z-Image Omni (siglip_feat_dim is set), which is not supported",
            "FOREIGN_MODEL",
        )
    if not values.get("qk_norm", True):
        raise _invalid("qk_norm=false is not supported", "FOREIGN_MODEL")
    patches = (values.get("all_patch_size"), values.get("all_f_patch_size"))
    if any(sizes is not None and len(sizes) != 1 for sizes in patches) or patches[1] not in (
        None,
        [1],
        (1,),
    ):
        raise _invalid(
            f"all_patch_size needs one entry and all_f_patch_size is [1]; given {patches}",
            "FOREIGN_MODEL",
        )


def _invalid(message: str, reason: str) -> InvalidModel:
    return InvalidModel(message, reason=reason)
