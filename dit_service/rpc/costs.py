"""What a request will take: the planning room's arithmetic, corrected by what requests took."""

from collections.abc import Sequence
from statistics import mean

from dit_service import messages
from dit_service.rpc.conditioning import Side
from dit_service.rpc.spec import Resolved
from zimage_core.planning.durations import Durations
from zimage_core.planning.flops import dit_step_flops
from zimage_core.planning.limits import padded
from zimage_core.planning.shares import Share
from zimage_core.serving.admission import Cost

_BYTES_PER_PIXEL = 3
"""Of a file that could not be made smaller at all."""


class Costs:
    """Remembers how fast this device denoises and decodes."""

    def __init__(self) -> None:
        self._denoising = Durations()
        self._decoding = Durations()

    def of(
        self, resolved: Resolved, sides: Sequence[Side], model: messages.Model, share: Share
    ) -> Cost:
        """What is expected of a request."""
        flops, pixels = _flops_per_forward(resolved, sides, model), _pixels(resolved)
        count = len(resolved.seeds)
        denoising = self._denoising.expected(flops, resolved.forward_count * flops)
        decoding = self._decoding.expected(pixels, count * pixels)
        return Cost(
            seconds=None if denoising is None else denoising + (decoding or 0.0),
            bytes=(
                resolved.spec.ByteSize()
                + sum(side.byte_count(model.caption_width) for side in sides)
                + count * pixels * _BYTES_PER_PIXEL
            ),
            turns=count * len(resolved.sigmas),  # the VAE's part counts as one more step
            share=share,
        )

    def learn(
        self,
        resolved: Resolved,
        sides: Sequence[Side],
        model: messages.Model,
        spent: messages.Spent,
    ) -> None:
        """Enters what a request took."""
        flops, pixels = _flops_per_forward(resolved, sides, model), _pixels(resolved)
        self._denoising.learn(flops, spent.forward_count * flops, spent.denoise_seconds)
        if not resolved.spec.HasField("previews"):  # which the VAE may have made, too
            self._decoding.learn(pixels, len(resolved.seeds) * pixels, spent.decode_seconds)


def _flops_per_forward(resolved: Resolved, sides: Sequence[Side], model: messages.Model) -> float:
    image_tokens = _pixels(resolved) // model.side_multiple_px**2
    return mean(
        dit_step_flops(model.shape, [(image_tokens, padded(side.token_count))]) for side in sides
    )


def _pixels(resolved: Resolved) -> int:
    return resolved.spec.width_px * resolved.spec.height_px
