"""What a step computes again for its gradient rather than keep it: less memory, more arithmetic,
the same bits."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from dit_service.model.blocks import run_block
from dit_service.model.transformer import Call, ZImageTransformer
from zimage_core.planning.linears import block_counts
from zimage_core.planning.training import TrainingPlan
from zimage_core.planning.training_memory import BLOCKS, ELEMENTWISE, NOTHING, OFFLOADED

Run = Callable[..., Tensor]


def caller(plan: TrainingPlan, model: ZImageTransformer) -> Call:
    """How a training runs the model's blocks, of which every so-manieth computes again."""
    way = _WAYS[plan.recompute]
    ours = {
        model.get_submodule(f"{stack}.{index}")
        for stack, count in block_counts(model.config).items()
        for index in range(0, count, plan.recompute_interval)
    }

    def call(_run: Run, block: Any, *given: Any) -> Tensor:
        """Compiled blocks, with which pictures are drawn, have no gradient."""
        return (way if block in ours else run_block)(block, *given)

    return call


def _again(block: Any, *given: Any, **how: Any) -> Tensor:
    done: Tensor = checkpoint(
        run_block, block, *given, use_reentrant=False, preserve_rng_state=False, **how
    )
    return done


def _offloaded(block: Any, x_TD: Tensor, *given: Any) -> Tensor:
    with save_on_cpu(pin_memory=x_TD.is_cuda):
        return _again(block, x_TD, *given)


def _is_dear(_context: Any, operation: Any, *_given: Any, **_named: Any) -> CheckpointPolicy:
    """Products of matrices and attention are kept, as packages' own kernels are, and the rest is
    computed again."""
    name = operation.overloadpacket.__name__
    is_product = name in _PRODUCTS or name.startswith("_scaled_dot_product")
    is_kept = is_product or operation.namespace != "aten"
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


_PRODUCTS = ("mm", "addmm", "addmm_", "bmm")
"""With those in place: adapters add themselves to what linears give, which is then kept as it is
behind them."""

_elementwise = partial(
    _again,
    context_fn=partial(
        create_selective_checkpoint_contexts, _is_dear, allow_cache_entry_mutation=True
    ),
)
_WAYS: Mapping[str, Run] = {
    NOTHING: run_block,
    ELEMENTWISE: _elementwise,
    BLOCKS: _again,
    OFFLOADED: _offloaded,
}
