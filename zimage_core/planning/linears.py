"""The linear layers of the transformer, by the names of diffusers: what an adapter can change."""

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
    for stack, count in block_counts(shape).items():
        sizes = block_linears(shape) | modulation_linears(shape, stack)
        for index in range(count):
            found |= {f"{stack}.{index}.{name}": size for name, size in sizes.items()}
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


def modulation_linears(shape: DitShape, stack: str) -> dict[str, tuple[int, int]]:
    """The small one of a block that brings the time in; captions know none."""
    if stack == "context_refiner":
        return {}
    return {"adaLN_modulation.0": (4 * shape.dim, shape.time_dim)}


def block_counts(shape: DitShape) -> dict[str, int]:
    """How many blocks there are of each stack."""
    return {
        "noise_refiner": shape.n_refiner_layers,
        "context_refiner": shape.n_refiner_layers,
        "layers": shape.n_layers,
    }
