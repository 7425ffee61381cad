"""Strides that readers rely on: ``view`` works on some layouts of a tensor and fails on others."""

from __future__ import annotations

from torch import fx

from fpscompile.passes.base import GraphState, emit, fake_tensor, target_name, words

KEEP = words(
    "transpose permute getitem select narrow squeeze unsqueeze unflatten split chunk unbind movedim swapaxes detach "
    "expand mT t"
)
"""Ops that pass a tensor's strides on."""

READ = frozenset(["view", "view_as", "as_strided", "stride", "is_contiguous", "data_ptr", "view_as_complex"])
"""Ops whose outcome depends on the strides of what they are given."""


def strides_are_read(node: fx.Node) -> bool:
    """Whether someone reads ``node`` in a way that depends on its strides."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            name = target_name(user) if user.op in ("call_function", "call_method") else ""
            if user.op == "output" or name in READ:  # what reads the graph's results does not show
                return True
            if name in KEEP and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def laid_out_as(state: GraphState, result: fx.Node, original: fx.Node) -> fx.Node:
    """``result`` with the strides that ``original`` has, where a reader depends on them; else ``result``."""
    before, after = fake_tensor(original), fake_tensor(result)
    assert before is not None
    assert after is not None
    wanted, given = _order(before.stride(), before.shape), _order(after.stride(), after.shape)
    if wanted == given or not strides_are_read(original):
        return result
    copied = emit(state, "contiguous", (emit(state, "permute", (result, tuple(wanted))),))
    back = tuple(wanted.index(dim) for dim in range(len(wanted)))
    return copied if back == tuple(range(len(back))) else emit(state, "permute", (copied, back))


def _order(strides: tuple[object, ...], sizes: tuple[object, ...]) -> list[int]:
    """Dims from the outermost in memory to the innermost. Dims of size 1 lie anywhere; they keep their place."""
    hints = [_hint(stride) for stride in strides]
    return sorted(range(len(hints)), key=lambda dim: (-hints[dim], dim))


def _hint(stride: object) -> int:
    node = getattr(stride, "node", None)
    hint = node.hint if node is not None else stride
    return hint if isinstance(hint, int) else 0
