"""Blocks as compiled code that gradients go through. Attention is between its two halves, and not
in it: traced, the lengths would specialise it to every batch."""

from functools import partial

import torch
from torch import Tensor

from dit_service.model.adapters import BesidePart
from dit_service.model.attention.backends import attend
from dit_service.model.blocks import Block
from dit_service.model.layout import Segments
from dit_service.model.transformer import Run

_MOST_FORMS_OF_ALL = 1 << 20
_MOST_FORMS = 64
"""Of code: blocks that learn this or that, one sample or several, with gradients before or not."""


def compiled() -> Run:
    """What runs a block, of one training: each has its own code, made while it is first run, so
    that no other changes what it computes with."""
    # A service opens many trainings in its life, and each has its own code.
    torch._dynamo.config.accumulated_recompile_limit = _MOST_FORMS_OF_ALL
    how = partial(
        torch.compile,
        fullgraph=True,
        dynamic=True,
        isolate_recompiles=True,
        recompile_limit=_MOST_FORMS,
    )
    before, behind = how(Block.before_attention), how(Block.behind_attention)

    def run(
        block: Block,
        x_TD: Tensor,
        norm_weights_S4D: Tensor,
        segments: Segments,
        backend: str,
        beside: BesidePart,
    ) -> Tensor:
        """For pictures nobody waits for a compiler; here everybody does."""
        norm_weights_S4D = norm_weights_S4D.clone()  # views and others would be two forms
        with torch.compiler.set_stance("default"):
            q_THE, k_THE, v_THE = before(block, x_TD, norm_weights_S4D, segments, beside)
            attended_THE = attend(backend, q_THE, k_THE, v_THE, segments)
            out_TD: Tensor = behind(block, x_TD, attended_THE, norm_weights_S4D, segments, beside)
            return out_TD

    return run
