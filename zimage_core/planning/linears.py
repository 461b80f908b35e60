"""The linear layers of the transformer, by the names of diffusers: what an adapter can change."""

from collections.abc import Iterator

from zimage_core.planning.flops import TIME_FREQUENCIES, TIME_HIDDEN, DitShape


def linears(shape: DitShape) -> dict[str, tuple[int, int]]:
    """The width of each linear's output and input."""
    patch = f"{shape.patch_size}-1"
    found = {
        f"all_x_embedder.{patch}": (shape.dim, shape.patch_dim),
        f"all_final_layer.{patch}.linear": (shape.patch_dim, shape.dim),
        f"all_final_layer.{patch}.adaLN_modulation.1": (shape.dim, shape.time_dim),
        "t_embedder.mlp.0": (TIME_HIDDEN, TIME_FREQUENCIES),
        "t_embedder.mlp.2": (shape.time_dim, TIME_HIDDEN),
        "cap_embedder.1": (shape.dim, shape.cap_feat_dim),
    }
    for block in _blocks(shape):
        found |= {f"{block}.attention.{one}": (shape.dim, shape.dim) for one in _ATTENTION}
        found |= {f"{block}.feed_forward.{one}": (shape.ffn_dim, shape.dim) for one in ("w1", "w3")}
        found[f"{block}.feed_forward.w2"] = shape.dim, shape.ffn_dim
        if not block.startswith("context_refiner."):
            found[f"{block}.adaLN_modulation.0"] = 4 * shape.dim, shape.time_dim
    return found


_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def _blocks(shape: DitShape) -> Iterator[str]:
    for stack, count in (
        ("noise_refiner", shape.n_refiner_layers),
        ("context_refiner", shape.n_refiner_layers),
        ("layers", shape.n_layers),
    ):
        yield from (f"{stack}.{index}" for index in range(count))
