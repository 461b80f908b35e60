"""How a training runs a model's blocks, and what of them it computes again for the gradient rather
than keep it: less memory, more arithmetic, the same bits."""

from collections.abc import Mapping
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
from dit_service.model.transformer import Call, Run, ZImageTransformer, plainly
from dit_service.training.compiled import compiled
from zimage_core.planning.linears import block_counts
from zimage_core.planning.training import TrainingPlan
from zimage_core.planning.training_memory import BLOCKS, ELEMENTWISE, NOTHING, OFFLOADED


def caller(plan: TrainingPlan, model: ZImageTransformer) -> Call:
    """Every so-manieth block computes again."""
    run = compiled() if plan.compiled else run_block
    is_known_to_compiler = plan.compiled and plan.recompute == ELEMENTWISE
    way = plainly if is_known_to_compiler else _WAYS[plan.recompute]
    ours = {
        model.get_submodule(f"{stack}.{index}")
        for stack, count in block_counts(model.config).items()
        for index in range(0, count, plan.recompute_interval)
    }

    def call(_run: Run, block: Any, *given: Any) -> Tensor:
        """With code that pictures are drawn with gradients are lost."""
        return (way if block in ours else plainly)(run, block, *given)

    return call


def _again(run: Run, *given: Any, **how: Any) -> Tensor:
    done: Tensor = checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False, **how)
    return done


def _offloaded(run: Run, block: Any, x_TD: Tensor, *given: Any) -> Tensor:
    with save_on_cpu(pin_memory=x_TD.is_cuda):
        return _again(run, block, x_TD, *given)


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

_WAYS: Mapping[str, Call] = {
    NOTHING: plainly,
    ELEMENTWISE: partial(
        _again,
        context_fn=partial(
            create_selective_checkpoint_contexts, _is_dear, allow_cache_entry_mutation=True
        ),
    ),
    BLOCKS: _again,
    OFFLOADED: _offloaded,
}
