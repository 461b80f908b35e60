"""How long a caption and how wide a picture may be, from the lengths of the model's RoPE tables."""

from collections.abc import Sequence

TOKEN_MULTIPLE = 32
"""Captions and pictures are filled up to multiples of this many tokens with learned pad tokens."""


def padded(token_count: int) -> int:
    """The token count with the pads that the model adds."""
    return -(-token_count // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def caption_token_limit(axes_lens: Sequence[int]) -> int:
    """The longest caption, in tokens.

    A caption of n tokens, pads included, takes the positions 1 to n of the first axis and the
    picture takes n + 1, which must still lie in the table.
    """
    return (axes_lens[0] - 2) // TOKEN_MULTIPLE * TOKEN_MULTIPLE


def side_limit_px(axes_lens: Sequence[int], token_side_px: int = 16) -> int:
    """The longest side of a picture, either way up; a token covers `token_side_px` squared."""
    return min(axes_lens[1], axes_lens[2]) * token_side_px
