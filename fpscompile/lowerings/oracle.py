"""The reference as a lowering: slow, exact to its definition, for checking the others inside a compiled model."""

from __future__ import annotations

import torch

from fpscompile.lowerings.dense import Triple
from fpscompile.masks import BlockMask
from fpscompile.plan import ResolvedPlan
from fpscompile.reference import attention

SERVES_REMAINDER = True


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    key_mask: torch.Tensor | None,
    phases: tuple[int, ...],
    resolved: ResolvedPlan,
    scale: float,
    block_mask: BlockMask | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :mod:`fpscompile.lowerings` documents it; ``block_mask`` takes the place of the plan's."""
    out, lse = attention(
        q, k, v, resolved=resolved, phase=phases, key_mask=key_mask, scale=scale, block_mask=block_mask
    )
    return _transposed(out), lse.contiguous()


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    key_mask: torch.Tensor | None,
    phases: tuple[int, ...],
    resolved: ResolvedPlan,
    scale: float,
    block_mask: BlockMask | None = None,
) -> Triple:
    """Gradients by autograd through the reference, run again."""
    # The dispatcher switches autograd off inside an op; the forward is replayed with it on.
    with _autograd_on(), torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        again, _ = attention(
            *leaves, resolved=resolved, phase=phases, key_mask=key_mask, scale=scale, block_mask=block_mask
        )
        dq, dk, dv = torch.autograd.grad(again, leaves, grad_out)
    return _transposed(dq), _transposed(dk), _transposed(dv)


def _autograd_on() -> torch._C._ForceDispatchKeyGuard:
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "AutogradFunctionality", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, name))
    return torch._C._ForceDispatchKeyGuard(include, exclude)


def _transposed(x: torch.Tensor) -> torch.Tensor:
    """``x`` laid out as the transpose of a contiguous [B, L, H, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
