"""``fps::attention``: the op that a rewritten site calls. Schema, fake, autograd; picks the lowering by its plan.

The schema is a frozen contract::

    fps::attention(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor phase,
                   SymInt[] grid, Tensor? published_grid, SymInt[] query_span, SymInt[] key_span,
                   float? scale, str plan) -> (Tensor output, Tensor lse)

Shapes and meaning
    query           [B, H, Lq, D], any strides; float32, float64, bfloat16, float16
    key             [B, Hk, Lk, D], H a multiple of Hk (query head h reads key head h // (H // Hk))
    value           [B, Hk, Lk, Dv]
    key_mask        None; or [B | 1, H | 1, 1, Lk]: bool (True keeps), or the query's dtype or float32 (added to the
                    scaled scores). It receives no gradient.
    phase           int32 [n], B a multiple of n: batch element b is in phase[b // (B // n)]
    grid            video tokens (t, h, w); empty when ``published_grid`` gives them
    published_grid  int64 [3] on the CPU, read at run time; None when ``grid`` gives them
    query_span      (first video token, number of video tokens) in the query sequence
    key_span        the same for the key sequence
    scale           None means 1/sqrt(D)
    plan            :meth:`fpscompile.plan.Plan.to_json`
    output          [B, H, Lq, Dv] in the query's dtype, strided as the transpose of a contiguous [B, Lq, H, Dv]
    lse             [B, H, Lq] contiguous, float32 (float64 for float64 inputs): natural log of the sum of exp of
                    the scaled, masked scores over the visible keys; -inf where no key is visible. Not differentiable.
"""
