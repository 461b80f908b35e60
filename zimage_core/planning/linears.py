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
        found |= {f"{block}.{name}": size for name, size in block_linears(shape).items()}
        if not block.startswith("context_refiner."):
            found[f"{block}.adaLN_modulation.0"] = 4 * shape.dim, shape.time_dim
    return found


def block_linears(shape: DitShape) -> dict[str, tuple[int, int]]:
    """Those that make a block large, by their names in it."""
    return {
        "attention.to_q": (shape.dim, shape.dim),
        "attention.to_k": (shape.dim, shape.dim),
        "attention.to_v": (shape.dim, shape.dim),
        "attention.to_out.0": (shape.dim, shape.dim),
        "feed_forward.w1": (shape.ffn_dim, shape.dim),
        "feed_forward.w3": (shape.ffn_dim, shape.dim),
        "feed_forward.w2": (shape.dim, shape.ffn_dim),
    }


def _blocks(shape: DitShape) -> Iterator[str]:
    for stack, count in (
        ("noise_refiner", shape.n_refiner_layers),
        ("context_refiner", shape.n_refiner_layers),
        ("layers", shape.n_layers),
    ):
        yield from (f"{stack}.{index}" for index in range(count))
