"""Context parallelism after Ulysses (Jacobs et al., arXiv 2309.14509) for diffusers' Wan: tokens are shared out between
ranks, and for self-attention each rank gets all tokens of a part of the heads.

Every rank sees whole sequences in attention, so a tile, its FP8 scale and its window are what they are on one rank.
That is why ring attention is refused: there a rank holds a piece of the keys at a time, and neither the rounding of P,
which follows the listed key tiles in order, nor a window over the whole grid survives being cut at ranks' borders.

Gradients: the collectives are differentiated exactly, and each rank's loss is the whole loss. So the *mean* over all
ranks of the parameters' gradients is the gradient, which is what FSDP2 and DDP compute.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup


class ParallelError(ValueError):
    """A way of sharing out the work that this model or this number of ranks cannot follow."""


def check(kind: str, degree: int, world: int, heads: int) -> None:
    """Whether ``degree`` of ``world`` ranks can share the sequences of a model with so many heads.

    Raises:
        ParallelError: it cannot; the message names the value.
    """
    if kind == "ring":
        raise ParallelError(
            "--context-parallel ring: ring attention is declined. A rank sees a piece of the keys at a time, but "
            "windows span the whole grid, and FP8 rounds P along each query tile's list of key tiles. Use ulysses"
        )
    if kind != "ulysses":
        raise ParallelError(f"--context-parallel {kind!r} is unknown: use ulysses")
    if degree < 1 or world % degree:
        raise ParallelError(f"--context-degree {degree} does not divide the {world} ranks")
    if heads % degree:
        raise ParallelError(f"--context-degree {degree} does not divide the {heads} heads of the model")


def apply(model: Any, group: ProcessGroup) -> None:
    """Makes diffusers' ``WanTransformer3DModel`` share each sequence between the ranks of ``group``.

    Inputs and outputs stay whole on every rank and must be equal there. Parameters and their names do not change.
    """
    rank, size = group.rank(), group.size()

    def share(x: Tensor) -> Tensor:
        length = x.shape[1]
        if length % size:
            raise ParallelError(
                f"{length} tokens cannot be shared out between {size} ranks evenly: choose another clip size"
            )
        return x.narrow(1, rank * (length // size), length // size)

    def before_blocks(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if args[2].ndim != 3:
            raise ParallelError("timesteps per token (Wan 2.2 TI2V) are not shared out by this example")
        return (share(args[0]), *args[1:])

    def rotary(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(share(x) for x in output)

    def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (collectives.all_gather_tensor_autograd(args[0], gather_dim=1, group=group), *args[1:])

    model.rope.register_forward_hook(rotary)
    model.blocks[0].register_forward_pre_hook(before_blocks)
    model.norm_out.register_forward_pre_hook(gather)
    for block in model.blocks:
        block.attn1.processor = SelfAttention(group)


class SelfAttention:
    """Wan's self-attention with tokens exchanged for heads around it. Takes and gives [B, own tokens, channels]."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.size = group, group.size()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is None
        assert attention_mask is None
        assert rotary_emb is not None
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states)))
        query, key = _rotated(query, *rotary_emb), _rotated(key, *rotary_emb)
        # One exchange for the three: fewer messages, and the graph shows that keys and values are of the same tokens.
        whole = self._to_heads(torch.cat([query, key, value.type_as(query)], -1))
        query, key, value = (x.transpose(1, 2) for x in whole.chunk(3, -1))
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        result: Tensor = attn.to_out[0](self._to_tokens(out).flatten(2).type_as(hidden_states))
        return result

    def _exchange(self, x: Tensor) -> Tensor:
        """[ranks, ...]: piece ``r`` goes to rank ``r``; piece ``r`` of the result comes from it."""
        return collectives.all_to_all_single_autograd(x.contiguous(), None, None, self.group)

    def _to_heads(self, x: Tensor) -> Tensor:
        """[B, own tokens, heads, D] -> [B, tokens, own heads, D]."""
        return self._exchange(x.unflatten(2, (self.size, -1)).movedim(2, 0)).movedim(0, 1).flatten(1, 2)

    def _to_tokens(self, x: Tensor) -> Tensor:
        """[B, tokens, own heads, D] -> [B, own tokens, heads, D]."""
        return self._exchange(x.unflatten(1, (self.size, -1)).movedim(1, 0)).movedim(0, 2).flatten(2, 3)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring features of f[B, L, H, D] turned by the angles of [1, L, 1, D], each of which stands there twice."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)
