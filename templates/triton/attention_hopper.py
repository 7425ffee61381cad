# ruff: noqa: N803, E741, SIM102 (compile-time values are capitals; l is the field's name; one `if` per kind of value)
"""FP8 block-sparse attention, forward, for Hopper (sm_90a): Gluon, warp-specialized.

One program owns 64 query slots per consumer, of one tile of one head; tiles of 128 slots and more have two consumers,
or three. Its threads have roles, which meet only at mbarriers in shared memory:

    producer    one warp. Walks the list of key units and loads K and V tiles with TMA into two rings of STAGES slots.
    consumer i  four warps (a warpgroup), query rows 64 i .. 64 i + 63

A consumer handles block j of its list so (* goes on in the background; with OVERLAP)::

    S_j = Q K_j^T *                   the tensor cores take both products, in this order
    pv  = P_{j-1} V_{j-1} *
    wait for K_{j+1}, then for S_j
    upper rows of P_j                 while pv is still running
    wait for V_j, then for pv; K_{j-1} and V_{j-1} are free
    lower rows of P_j                 its exponentials are what takes the time
    acc = acc * alpha_{j-1} + pv      float32; every product starts from zero, since FP8 products keep about 14 bits
    P_j to E4M3                       registers only: the keys of V are stored in the order in which S comes out

P_j = 2^(S_j - base), and the base is a whole number, so that it makes no difference to how P is rounded. Where a row
may see no key at first (BIAS) it is the running maximum. Elsewhere (LAZY) only the first block's maxima are looked for:
the base is what they were, and goes up where P would leave E4M3 (:func:`_fit`). Should a row's weights outgrow float32
within a block, its log-sum-exp comes out infinite, and a second launch does that block of queries again, not LAZY.

Symbols
    H, Hk       query heads, key heads                    BLOCK_N  key slots per block
    DP, DVP     head dims padded to a power of two        TILE     slots of a tile, tokens first, padding last
    UNIT        slots that one list entry names           P_SHIFT  log2 of the factor on P before its cast
    PART        columns of a block that share a unit and a scale; PART == BLOCK_N: one factor for the whole block
    RUNS        scales of a tile: 1, or one for each 32 slots
    PADDED      last columns of a block that may hold no key: 0, 16 or all
    q_slots, k_slots, q_tiles, k_tiles                    of the whole sequences
    m, base, l  running maximum of the scores (base 2), what is taken from them, P_SHIFT less, and the sum of the
                weights; acc: weighted sum of values
    alpha       what all that is from before a block was multiplied by
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)
"""Query rows of a consumer: the M of a warpgroup's products."""
SUBTILE = gl.constexpr(32)
"""Slots that share a scale where a tile has several."""
ABSENT = gl.constexpr(2)
"""State of the bias of a part that has no unit."""


# --------------------------------------------------------------------------------------------------- barriers, loads


@gluon.jit
def _next_slot(slot, phase, STAGES: gl.constexpr):
    """The ring's next slot; the phase flips whenever the ring wraps around."""
    wrapped = slot == STAGES - 1
    return gl.where(wrapped, 0, slot + 1), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _load(
    desc, bar, smem, slot, unit_list, block, last, row, ENTRIES: gl.constexpr, UNIT: gl.constexpr,
    IN_ROWS: gl.constexpr,
):  # fmt: skip
    """The units of a block, rows of K or columns of V. Past the list's end the last one comes again: masked, but it
    must hold numbers, since 0 * nan = nan."""
    for e in gl.static_range(ENTRIES):
        first = gl.load(unit_list + gl.minimum(block * ENTRIES + e, last)) * UNIT
        if IN_ROWS:
            tma.async_copy_global_to_shared(desc, [row + first, 0], bar, smem.index(slot * ENTRIES + e))
        else:
            tma.async_copy_global_to_shared(desc, [row, first], bar, smem.index(slot * ENTRIES + e))


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, shared, unit_list, n_units, q_row, k_row, v_row,
    STAGES: gl.constexpr, UNIT: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    ENTRIES: gl.constexpr = BLOCK_N // UNIT
    q_smem, k_smem, v_smem, q_full, k_full, v_full, free = shared
    if ENTRIES > 1:
        # A swizzled row of V is as long as a unit: a slot holds its units one after the other, as K's slot does.
        k_smem = k_smem._reinterpret(k_desc.dtype, [STAGES * ENTRIES, UNIT, k_smem.shape[2]], k_desc.layout)
        v_smem = v_smem._reinterpret(v_desc.dtype, [STAGES * ENTRIES, v_smem.shape[1], UNIT], v_desc.layout)
    if n_units > 0:  # else the program would end with a load under way
        last = n_units - 1
        blocks = gl.cdiv(n_units, ENTRIES)
        mbarrier.expect(q_full, CONSUMERS * q_desc.block_type.nbytes)
        for w in gl.static_range(CONSUMERS):
            tma.async_copy_global_to_shared(q_desc, [q_row + w * ROWS, 0], q_full, q_smem.index(w))
        slot = 0
        phase = 1  # a fresh barrier passes for one that has completed the phase before its first
        for j in range(blocks):
            mbarrier.wait(free.index(slot), phase)
            mbarrier.expect(k_full.index(slot), ENTRIES * k_desc.block_type.nbytes)
            _load(k_desc, k_full.index(slot), k_smem, slot, unit_list, j, last, k_row, ENTRIES, UNIT, True)
            mbarrier.expect(v_full.index(slot), ENTRIES * v_desc.block_type.nbytes)
            _load(v_desc, v_full.index(slot), v_smem, slot, unit_list, j, last, v_row, ENTRIES, UNIT, False)
            slot, phase = _next_slot(slot, phase, STAGES)
        mbarrier.wait(free.index(slot), phase)
        mbarrier.arrive(k_full.index(slot), count=1)  # consumers wait for a block more than there is


# -------------------------------------------------------------------------------------------------- one block of keys


@gluon.jit
def _start_scores(q, k, S_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr):
    """Starts q @ k^T, [ROWS, BLOCK_N]."""
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    return warpgroup_mma(q, k.permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def _start_values(packed, v, O_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, DVP: gl.constexpr):
    """Starts P @ V from zero, [ROWS, DVP].

    V's key 16g + 8a + 2c + b is at position 16g + 4c + 2a + b: lane c of a quad holds its weight after the scores'
    product and must supply it to this one, so the layout conversion renames registers only.
    """
    low = gl.join(packed.to(gl.int8), (packed >> 8).to(gl.int8))
    high = gl.join((packed >> 16).to(gl.int8), (packed >> 24).to(gl.int8))
    p = gl.permute(gl.join(low, high), [0, 1, 2, 4, 3])
    p = gl.reshape(p, [ROWS, BLOCK_N]).to(gl.float8e4nv, bitcast=True)
    p = gl.convert_layout(p, gl.DotOperandLayout(0, O_LAYOUT, 4), assert_trivial=True)
    zero = gl.zeros([ROWS, DVP], gl.float32, O_LAYOUT)
    return warpgroup_mma(p, v.permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def _row_halves(x):
    """[ROWS, n] -> [4, 8, n] twice: a thread has an upper and a lower row, 8 apart, of the 16 of its warp."""
    return gl.split(gl.permute(gl.reshape(x, [4, 2, 8, x.shape[1]]), [0, 2, 3, 1]))


@gluon.jit
def _whole_rows(upper, lower):
    """The inverse of :func:`_row_halves` for [4, 8, n, 4]: [ROWS, n, 4]."""
    return gl.reshape(gl.permute(gl.join(upper, lower), [0, 4, 1, 2, 3]), [ROWS, upper.shape[2], 4])


@gluon.jit
def _pack(p):
    """E4M3 weights, four to an int32: [4, 8, n] float32 -> [4, 8, n // 16, 4].

    Key 16g + 8a + 2c + b goes to byte 2a + b of element (g, c), whose thread holds it already. Loops carry integers,
    since a carried E4M3 tensor would be taken apart into bytes.
    """
    p = gl.permute(gl.reshape(p, [4, 8, p.shape[2] // 16, 2, 4, 2]), [0, 1, 2, 4, 5, 3])
    low, high = gl.split(p)
    p00, p01 = gl.split(low)
    p10, p11 = gl.split(high)
    # Not pure, so that it stays behind the wait for the product that reads the registers it overwrites.
    return gl.inline_asm_elementwise(
        "{ .reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; "
        "mov.b32 $0, {lo, hi}; }",
        "=r,f,f,f,f",
        [p00, p01, p10, p11],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.constexpr_function
def _axis_layout(axis, layout, rank):
    """The layout of one axis of a tensor."""
    for other in reversed(range(rank)):
        if other != axis:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def _along(x, AXIS: gl.constexpr, RANK: gl.constexpr):
    """A vector as one axis of a tensor of higher rank, whose other axes have length 1."""
    for other in gl.static_range(RANK):
        if other != AXIS:
            x = gl.expand_dims(x, other)
    return x


@gluon.jit
def _axis(SIZE: gl.constexpr, AXIS: gl.constexpr, LAYOUT: gl.constexpr, RANK: gl.constexpr):
    """The index along one axis, to be broadcast against a tensor of that rank."""
    return _along(gl.arange(0, SIZE, _axis_layout(AXIS, LAYOUT, RANK)), AXIS, RANK)


@gluon.jit
def _mask(s, valid, S_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr):
    """-inf from column ``valid`` on. Column 8i + 2c + b is in lane c of a quad: 8i + b < valid - 2c takes one register
    and constants."""
    split = gl.reshape(s, [ROWS, BLOCK_N // 8, 4, 2])
    LAYOUT: gl.constexpr = split.type.layout
    limit = valid - 2 * _axis(4, 2, LAYOUT, 4)
    split = gl.where(8 * _axis(BLOCK_N // 8, 1, LAYOUT, 4) + _axis(2, 3, LAYOUT, 4) < limit, split, float("-inf"))
    return gl.convert_layout(gl.reshape(split, [ROWS, BLOCK_N]), S_LAYOUT, assert_trivial=True)


@gluon.jit
def _mask_tail(s, valid, S_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr):
    """:func:`_mask` where only the last 16 columns may be past ``valid``: an eighth of its instructions."""
    a0, a1 = _halves(s)
    b0, b1 = _halves(a1)
    c0, c1 = _halves(b1)
    split = gl.reshape(c1, [ROWS, 2, 4, 2])
    LAYOUT: gl.constexpr = split.type.layout
    limit = valid - (BLOCK_N - 16) - 2 * _axis(4, 2, LAYOUT, 4)
    split = gl.where(8 * _axis(2, 1, LAYOUT, 4) + _axis(2, 3, LAYOUT, 4) < limit, split, float("-inf"))
    tail = _whole(a0, _whole(b0, _whole(c0, gl.reshape(split, [ROWS, 16]))))
    return gl.convert_layout(tail, S_LAYOUT, assert_trivial=True)


@gluon.jit
def _halves(x):
    """The left and the right half of the columns; both lie in every thread's registers."""
    HALF: gl.constexpr = x.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(x, [ROWS, 2, HALF]), [0, 2, 1]))


@gluon.jit
def _whole(left, right):
    """The inverse of :func:`_halves`."""
    LAYOUT: gl.constexpr = left.type.layout
    joined = gl.join(left, gl.convert_layout(right, LAYOUT, assert_trivial=True))
    return gl.reshape(gl.permute(joined, [0, 2, 1]), [ROWS, 2 * left.shape[1]])


@gluon.jit
def _row_maxima(s, S_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, HALVES: gl.constexpr):
    """[ROWS]: pairs first, then a thread's run of pairs, then the quad: half as long a chain as column after column.

    With HALVES the columns of each half, even and odd, are a chain of their own: four short ones in place of a long
    one, for a program that waits for its own instructions and not for power.
    """
    if HALVES:
        lanes = gl.max(gl.max(gl.max(gl.reshape(s, [ROWS, 2, BLOCK_N // 16, 4, 2]), 2), 3), 1)
    else:
        lanes = gl.max(gl.max(gl.reshape(s, [ROWS, BLOCK_N // 8, 4, 2]), 3), 1)
    return gl.convert_layout(gl.max(lanes, 1), gl.SliceLayout(1, S_LAYOUT), assert_trivial=True)


@gluon.jit
def _lane_sums(p):
    """[4, 8, n] -> [4, 8, 4]: the part of each row's sum that a lane of its quad holds: no value leaves its thread."""
    return gl.sum(gl.sum(gl.reshape(p, [4, 8, p.shape[2] // 8, 4, 2]), 4), 2)


@gluon.jit
def _add_bias(s, key_bias, unit, inverse, S_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr):
    """Scores that are not scaled yet plus the unit's bias times ``inverse`` (log2(e) / factor)."""
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))
    return s + (gl.load(key_bias + unit * BLOCK_N + column) * inverse)[None, :]


@gluon.jit
def _in_parts(s, BLOCK_N: gl.constexpr, PART: gl.constexpr):
    """[ROWS, BLOCK_N] as [ROWS, parts, PART // 8, 4, 2]: column 8i + 2c + b of part n is (n, i, c, b), in lane c of a
    quad."""
    return gl.reshape(s, [ROWS, BLOCK_N // PART, PART // 8, 4, 2])


@gluon.jit
def _mask_parts(s, valid, PART: gl.constexpr, UNIT: gl.constexpr):
    """-inf from slot ``valid`` of each unit on; ``valid`` is a number or [1, parts, 1, 1, 1]."""
    LAYOUT: gl.constexpr = s.type.layout
    limit = valid - _axis(s.shape[1], 1, LAYOUT, 5) * PART % UNIT - 2 * _axis(4, 3, LAYOUT, 5)
    return gl.where(8 * _axis(PART // 8, 2, LAYOUT, 5) + _axis(2, 4, LAYOUT, 5) < limit, s, float("-inf"))


@gluon.jit
def _bias_parts(
    s, key_bias, unit, state, factor, BLOCK_N: gl.constexpr, PART: gl.constexpr, UNIT: gl.constexpr
):  # fmt: skip
    """As :func:`_add_bias`, in parts; -inf in parts whose ``state`` is ABSENT."""
    LAYOUT: gl.constexpr = s.type.layout
    slot = unit * UNIT + _axis(s.shape[1], 1, LAYOUT, 5) * PART % UNIT
    slot += 8 * _axis(PART // 8, 2, LAYOUT, 5) + 2 * _axis(4, 3, LAYOUT, 5) + _axis(2, 4, LAYOUT, 5)
    bias = gl.load(key_bias + slot)
    if UNIT < BLOCK_N:
        bias = gl.where(state == ABSENT, float("-inf"), bias)
    return s + bias * (LOG2E / factor)


@gluon.jit
def _max_parts(s, factor):
    """Row maxima of s * factor, [ROWS], for positive factors: a thread scales the maxima of its parts alone."""
    top = gl.expand_dims(gl.expand_dims(gl.max(gl.max(s, 4), 2), 2), 4) * factor
    return gl.max(gl.max(gl.max(gl.max(top, 4), 2), 1), 1)


@gluon.jit
def _facts(
    unit, j, n_units, notes, q_factor, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, UNIT: gl.constexpr,
    PART: gl.constexpr, UNITS_PER_TILE: gl.constexpr, PADDED: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """(factor, valid) of block ``j``, as :func:`_exponents` takes them; ``unit`` is from :func:`_unit`."""
    k_scale, unit_valid, bias_state, _key_bias = notes
    if PART == BLOCK_N:
        factor = q_factor * gl.load(k_scale + unit // UNITS_PER_TILE)
    else:
        part = _axis(BLOCK_N // PART, 1, LAYOUT, 5)
        factor = q_factor * gl.load(k_scale + unit * (UNIT // PART) + part % (UNIT // PART))
    if UNIT < BLOCK_N:
        entry = j * (BLOCK_N // UNIT) + _axis(BLOCK_N // PART, 1, LAYOUT, 5) * PART // UNIT
        if BIAS:
            valid = gl.where(entry < n_units, gl.load(bias_state + unit).to(gl.int32), ABSENT)
        else:
            valid = gl.where(entry < n_units, gl.load(unit_valid + unit), 0)
    elif BIAS:
        valid = gl.load(bias_state + unit)
    elif PADDED > 0:
        valid = gl.load(unit_valid + unit)
    else:
        valid = BLOCK_N
    return factor, valid


@gluon.jit
def _unit(unit_list, j, last, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, UNIT: gl.constexpr, PART: gl.constexpr):
    """The unit of block ``j``, or of each of its parts, [1, parts, 1, 1, 1]; past the list's end the last one."""
    if UNIT == BLOCK_N:
        entry = j
    else:
        entry = j * (BLOCK_N // UNIT) + _axis(BLOCK_N // PART, 1, LAYOUT, 5) * PART // UNIT
    return gl.load(unit_list + gl.minimum(entry, last))


@gluon.jit
def _seen(
    s, factor, valid, unit, notes, S_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, UNIT: gl.constexpr,
    PART: gl.constexpr, PADDED: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """The scores, not scaled yet, with bias and -inf for what a row must not see.

    Args:
        s: [ROWS, BLOCK_N] float32, q8 @ k8^T.
        factor: scale * q_scale * k_scale * log2(e): a number, or [ROWS | 1, parts, 1, 1, 1].
        valid: keys of the block that exist, at least one; with BIAS, 0 if its bias is all zeros. Where a block has
            several units: this for each part, [1, parts, 1, 1, 1], and 0 or ABSENT past the end of the list.
        unit: the block's unit, or those of its parts; used with BIAS.

    Returns:
        [ROWS, BLOCK_N], or in parts where PART < BLOCK_N.
    """
    key_bias = notes[3]
    if PART == BLOCK_N:
        if BIAS:
            if valid != 0:
                s = _add_bias(s, key_bias, unit, LOG2E / factor, S_LAYOUT, BLOCK_N)
        elif PADDED == 16:  # a dozen instructions, and no branch
            s = _mask_tail(s, valid, S_LAYOUT, BLOCK_N)
        elif PADDED > 0:
            if valid < BLOCK_N:
                if valid >= BLOCK_N - 16:
                    s = _mask_tail(s, valid, S_LAYOUT, BLOCK_N)
                else:
                    s = _mask(s, valid, S_LAYOUT, BLOCK_N)
    else:
        s = _in_parts(s, BLOCK_N, PART)
        if UNIT < BLOCK_N:
            units = gl.reshape(valid, [BLOCK_N // PART])
            if BIAS:
                if gl.max(units, 0) != 0:
                    s = _bias_parts(s, key_bias, unit, valid, factor, BLOCK_N, PART, UNIT)
            elif gl.min(units, 0) < UNIT:
                s = _mask_parts(s, valid, PART, UNIT)
        elif BIAS:
            if valid != 0:
                s = _bias_parts(s, key_bias, unit, valid, factor, BLOCK_N, PART, UNIT)
        elif PADDED > 0:
            if valid < BLOCK_N:
                s = _mask_parts(s, valid, PART, UNIT)
    return s


@gluon.jit
def _exponents(
    s, m, factor, valid, unit, notes, S_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, UNIT: gl.constexpr,
    PART: gl.constexpr, P_SHIFT: gl.constexpr, PADDED: gl.constexpr, BIAS: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax, up to its exponentials.

    Args:
        s, factor, valid, unit: as :func:`_seen` takes them.
        m: [ROWS] running maximum, a whole number.

    Returns:
        The logarithms (base 2) of the weights times 2^P_SHIFT, [ROWS, BLOCK_N] float32; m; and what earlier
        accumulations must be multiplied by, [ROWS].
    """
    s = _seen(s, factor, valid, unit, notes, S_LAYOUT, BLOCK_N, UNIT, PART, PADDED, BIAS)
    if PART == BLOCK_N:
        top = _row_maxima(s, S_LAYOUT, BLOCK_N, HALVES) * factor
    else:
        top = gl.convert_layout(_max_parts(s, factor), m.type.layout, assert_trivial=True)
    m_new = gl.maximum(m, gl.ceil(top))
    base = m_new
    if BIAS:  # a row may have seen no key yet
        base = gl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = gl.exp2(m - base)
    if PART == BLOCK_N:
        logs = s * factor - (base - P_SHIFT)[:, None]
    else:
        shift = gl.convert_layout(base - P_SHIFT, _axis_layout(0, s.type.layout, 5), assert_trivial=True)
        logs = gl.reshape(s * factor - _along(shift, 0, 5), [ROWS, BLOCK_N])
        logs = gl.convert_layout(logs, S_LAYOUT, assert_trivial=True)
    return logs, m_new, alpha


@gluon.jit
def _add_sums(l, alpha, p):
    """l * alpha + the lanes' sums of p."""
    LAYOUT: gl.constexpr = l.type.layout
    alpha = gl.convert_layout(alpha, gl.SliceLayout(2, LAYOUT), assert_trivial=True)
    return l * gl.expand_dims(alpha, 2) + _lane_sums(p)


# ---------------------------------------------------------------------------------------------------- lanes of a quad


@gluon.jit
def _by_lanes(x, like):
    """[ROWS] as [4, 8, 4] twice, upper and lower rows: each lane of a row's quad has its own copy."""
    upper, lower = gl.split(gl.permute(gl.reshape(x, [4, 2, 8]), [0, 2, 1]))
    LAYOUT: gl.constexpr = like.type.layout
    upper = gl.convert_layout(upper, gl.SliceLayout(2, LAYOUT), assert_trivial=True)
    lower = gl.convert_layout(lower, gl.SliceLayout(2, LAYOUT), assert_trivial=True)
    zero = gl.zeros([4, 8, 4], gl.float32, LAYOUT)
    return gl.expand_dims(upper, 2) + zero, gl.expand_dims(lower, 2) + zero


@gluon.jit
def _whole_lanes(upper, lower):
    """[4, 8, 4] twice -> [ROWS, 4]."""
    return gl.reshape(gl.permute(gl.join(upper, lower), [0, 3, 1, 2]), [ROWS, 4])


@gluon.jit
def _along_keys(lanes, like):
    """[4, 8, 4] as [4, 8, 1, 4, 1], to be broadcast against ``like``, [4, 8, n, 4, 2]."""
    return gl.convert_layout(gl.reshape(lanes, [4, 8, 1, 4, 1]), like.type.layout, assert_trivial=True)


@gluon.jit
def _lane_logs(s, factor, base):
    """s * factor - base, [4, 8, n]."""
    split = gl.reshape(s, [4, 8, s.shape[2] // 8, 4, 2])
    logs = gl.reshape(split * factor - _along_keys(base, split), s.shape)
    return gl.convert_layout(logs, s.type.layout, assert_trivial=True)


@gluon.jit
def _first(x, like):
    """x[:, :, 0] of [4, 8, n, 4], in the layout of ``like``; n a power of two. No value leaves its thread."""
    n: gl.constexpr = x.shape[2]
    if n == 1:
        out = gl.convert_layout(gl.reshape(x, [4, 8, 4]), like.type.layout, assert_trivial=True)
    else:
        x, _rest = gl.split(gl.permute(gl.reshape(x, [4, 8, 2, n // 2, 4]), [0, 1, 3, 4, 2]))
        out = _first(x, like)
    return out


@gluon.constexpr_function
def _fit_ptx(n):
    """PTX of :func:`_fit` for the ``n`` weights that a thread has of a row.

    Operands, n of each: the weights out, alpha and steps (in turn), the weights, and n times the same sum.

    A branch of the warp, not of predicates: what it jumps over would take as many issue slots as the exponentials.
    """
    values = range(n)
    lines = [f"{{ .reg .pred q; .reg .b32 t; .reg .f32 other, sum, alpha, steps, p<{n}>;"]
    lines += [f"mov.f32 p{i}, ${2 * n + i};" for i in values]
    lines += [
        f"mov.f32 sum, ${3 * n}; mov.f32 alpha, 0f3F800000; mov.f32 steps, 0f00000000;",
        "setp.gt.f32 q, sum, 0f43E00000; vote.sync.any.pred q, q, 0xffffffff; @!q bra.uni FITS;",
        "shfl.sync.bfly.b32 other, sum, 1, 0x1f, 0xffffffff; max.f32 sum, sum, other;",
        "shfl.sync.bfly.b32 other, sum, 2, 0x1f, 0xffffffff; max.f32 sum, sum, other;",
        # The sum's exponent less 7, and 0 where it is at most 448.
        "mov.b32 t, sum; shr.u32 t, t, 23; sub.s32 t, t, 134;",
        "setp.gt.f32 q, sum, 0f43E00000; selp.s32 t, t, 0, q;",
        "cvt.rn.f32.s32 steps, t; sub.s32 t, 127, t; shl.b32 t, t, 23; mov.b32 alpha, t;",
    ]
    lines += [f"mul.f32 p{i}, p{i}, alpha;" for i in values]
    lines += ["FITS:"]
    lines += [f"mov.f32 ${i}, p{i}; mov.f32 ${n + i}, {('alpha', 'steps')[i % 2]};" for i in values]
    return " ".join(lines) + " }"


@gluon.constexpr_function
def _fit_constraints(n):
    return ",".join(["=f"] * (2 * n) + ["f"] * (2 * n))


@gluon.jit
def _fit(p, sums, base):
    """Makes weights fit E4M3 where those of a lane sum up to more than 448, its largest number.

    The base need not be a maximum: scores may grow beyond it as long as the sum of a lane's weights, 32 of a row and a
    block, stays below 448. Where it does not, and only there, the four lanes of the row agree on a power of two that
    takes the largest of their sums to [128, 256).

    Returns:
        p times that power (or 1), base plus its logarithm, and the power itself, [4, 8, 4].
    """
    VALUES: gl.constexpr = p.shape[2] // 4
    split = gl.reshape(p, [4, 8, p.shape[2] // 8, 4, 2])
    split, each = gl.broadcast(split, _along_keys(sums, split))
    fitting, facts = gl.inline_asm_elementwise(
        _fit_ptx(VALUES),
        _fit_constraints(VALUES),
        [split, each],
        dtype=(gl.float32, gl.float32),
        is_pure=False,  # votes and shuffles
        pack=VALUES,
    )
    alpha, steps = gl.split(facts)  # a thread's registers go along the last axis first
    p = gl.convert_layout(gl.reshape(fitting, p.shape), p.type.layout, assert_trivial=True)
    return p, base + _first(steps, base), _first(alpha, base)


@gluon.jit
def _lazy_exponents(
    s, base, factor, valid, unit, notes, S_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, UNIT: gl.constexpr,
    PART: gl.constexpr, PADDED: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """The weights of the upper rows, times 2^P_SHIFT, and the logarithms (base 2) of the lower rows': [4, 8, BLOCK_N].

    In this order, and no exponential of the lower rows yet: so the assembler puts them where there is time.
    """
    base_upper, base_lower = base
    s = _seen(s, factor, valid, unit, notes, S_LAYOUT, BLOCK_N, UNIT, PART, PADDED, BIAS)
    if PART == BLOCK_N:
        upper, lower = _row_halves(s)
        upper = gl.exp2(_lane_logs(upper, factor, base_upper))
        lower = _lane_logs(lower, factor, base_lower)
    else:
        lanes = gl.reshape(_whole_lanes(base_upper, base_lower), [ROWS, 1, 1, 4, 1])
        logs = gl.reshape(s * factor - gl.convert_layout(lanes, s.type.layout, assert_trivial=True), [ROWS, BLOCK_N])
        upper, lower = _row_halves(gl.convert_layout(logs, S_LAYOUT, assert_trivial=True))
        upper = gl.exp2(upper)
    return upper, lower


@gluon.jit
def _settle(p, base, l):
    """(weights, base, l with their sums, alpha) of the upper or the lower rows, [4, 8, n] and three [4, 8, 4]."""
    sums = gl.convert_layout(_lane_sums(p), l.type.layout, assert_trivial=True)
    p, base, alpha = _fit(p, sums, base)
    return p, base, (l + sums) * alpha, alpha


@gluon.jit
def _add(acc, alpha, pv, O_LAYOUT: gl.constexpr, LAZY: gl.constexpr):
    """acc * alpha + pv, row by row."""
    if LAZY:
        upper, lower = _row_halves(acc)
        scaled_upper, scaled_lower = _scaled(upper, alpha[0]), _scaled(lower, alpha[1])
        acc = gl.reshape(gl.permute(gl.join(scaled_upper, scaled_lower), [0, 3, 1, 2]), acc.shape)
        acc = gl.convert_layout(acc, O_LAYOUT, assert_trivial=True)
    else:
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)[:, None]
    return acc + pv


@gluon.jit
def _scaled(x, lanes):
    """x * lanes, [4, 8, n]."""
    split = gl.reshape(x, [4, 8, x.shape[2] // 8, 4, 2])
    scaled = gl.reshape(split * _along_keys(lanes, split), x.shape)
    return gl.convert_layout(scaled, x.type.layout, assert_trivial=True)


# ---------------------------------------------------------------------------------------------------- the consumers


@gluon.jit
def _consumer(
    shared, operands, WHO: gl.constexpr, BLOCK_N: gl.constexpr, UNIT: gl.constexpr, PART: gl.constexpr,
    RUNS: gl.constexpr, DVP: gl.constexpr, DV: gl.constexpr, ALIGN: gl.constexpr, UNITS_PER_TILE: gl.constexpr,
    P_SHIFT: gl.constexpr, PADDED: gl.constexpr, BIAS: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
    LAZY: gl.constexpr,
):  # fmt: skip
    q_smem, k_smem, v_smem, q_full, k_full, v_full, free = shared
    unit_list, n_units, notes, q_scale, q_factor, outputs = operands
    v_scale, v_mean, lse_shift, q_token, rows, out, out_stride, lse = outputs
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DVP, 32])
    q = q_smem.index(WHO)
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    upper, lower = _row_halves(gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT))
    l_upper, l_lower = _lane_sums(upper), _lane_sums(lower)  # running sums of the weights times 2^P_SHIFT
    acc = gl.zeros([ROWS, DVP], gl.float32, O_LAYOUT)
    HALVES: gl.constexpr = DVP <= 64  # with 128 features a GPU at its power limit loses 2 % by it
    PARTS: gl.constexpr = _in_parts(gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT), BLOCK_N, PART).type.layout

    if n_units > 0:
        if RUNS == 1:
            row_factor = q_factor
        else:
            row_factor = q_factor * gl.load(q_scale + (WHO * ROWS + _axis(ROWS, 0, PARTS, 5)) // SUBTILE)
        # A block's unit is read a block ahead, what belongs to the unit when its products have started.
        blocks = gl.cdiv(n_units, BLOCK_N // UNIT)
        last = n_units - 1
        unit = _unit(unit_list, 0, last, PARTS, BLOCK_N, UNIT, PART)
        next_unit = _unit(unit_list, 1, last, PARTS, BLOCK_N, UNIT, PART)
        factor, valid = _facts(
            unit, 0, n_units, notes, row_factor, PARTS, BLOCK_N, UNIT, PART, UNITS_PER_TILE, PADDED, BIAS
        )  # fmt: skip

        mbarrier.wait(q_full, 0)
        mbarrier.wait(k_full.index(0), 0)
        s = _start_scores(q, k_smem.index(0), S_LAYOUT, BLOCK_N)
        next_slot, next_phase = _next_slot(0, 0, STAGES)
        mbarrier.wait(k_full.index(next_slot), next_phase)
        s = warpgroup_mma_wait(0, deps=(s,))
        logs, m, alpha = _exponents(
            s, m, factor, valid, unit, notes, S_LAYOUT, BLOCK_N, UNIT, PART, P_SHIFT, PADDED, BIAS, HALVES
        )  # fmt: skip
        upper, lower = _row_halves(gl.exp2(logs))
        if LAZY:
            base_upper, base_lower = _by_lanes(m - P_SHIFT, l_upper)
            upper, base_upper, l_upper, alpha_upper = _settle(upper, base_upper, l_upper)
            lower, base_lower, l_lower, alpha_lower = _settle(lower, base_lower, l_lower)
            alpha = alpha_upper, alpha_lower
        else:
            l_upper, l_lower = _lane_sums(upper), _lane_sums(lower)
        packed = _whole_rows(_pack(upper), _pack(lower))
        mbarrier.wait(v_full.index(0), 0)
        v_slot = 0
        k_slot, phase = next_slot, next_phase

        for j in range(1, blocks):  # V_{j-1} is in v_slot and K_j in k_slot
            if OVERLAP:
                s = _start_scores(q, k_smem.index(k_slot), S_LAYOUT, BLOCK_N)
                pv = _start_values(packed, v_smem.index(v_slot), O_LAYOUT, BLOCK_N, DVP)
            else:
                pv = _start_values(packed, v_smem.index(v_slot), O_LAYOUT, BLOCK_N, DVP)
                acc = _add(acc, alpha, warpgroup_mma_wait(0, deps=(pv,)), O_LAYOUT, LAZY)
                s = _start_scores(q, k_smem.index(k_slot), S_LAYOUT, BLOCK_N)
            unit = next_unit
            factor, valid = _facts(
                unit, j, n_units, notes, row_factor, PARTS, BLOCK_N, UNIT, PART, UNITS_PER_TILE, PADDED, BIAS
            )  # fmt: skip
            next_unit = _unit(unit_list, j + 1, last, PARTS, BLOCK_N, UNIT, PART)
            # The next block's keys are waited for here, where there is time, and not before its products.
            next_slot, next_phase = _next_slot(k_slot, phase, STAGES)
            mbarrier.wait(k_full.index(next_slot), next_phase)
            s = warpgroup_mma_wait(1 if OVERLAP else 0, deps=(s,))
            last_alpha = alpha
            if LAZY:
                upper, lower = _lazy_exponents(
                    s, (base_upper, base_lower), factor, valid, unit, notes, S_LAYOUT, BLOCK_N, UNIT, PART, PADDED, BIAS
                )  # fmt: skip
                upper, base_upper, l_upper, alpha_upper = _settle(upper, base_upper, l_upper)
            else:
                logs, m, alpha = _exponents(
                    s, m, factor, valid, unit, notes, S_LAYOUT, BLOCK_N, UNIT, PART, P_SHIFT, PADDED, BIAS, HALVES
                )  # fmt: skip
                upper, lower = _row_halves(logs)
                alpha_upper, alpha_lower = gl.split(gl.permute(gl.reshape(alpha, [4, 2, 8]), [0, 2, 1]))
                upper = gl.exp2(upper)
                l_upper = _add_sums(l_upper, alpha_upper, upper)
            # This wait, long over, is a branch: it keeps the assembler from moving the wait for pv up to the maxima.
            # Where there are maxima, what comes after it fills the slots between the lower rows' exponentials.
            mbarrier.wait(v_full.index(k_slot), phase)
            if OVERLAP:
                acc = _add(acc, last_alpha, warpgroup_mma_wait(0, deps=(pv,)), O_LAYOUT, LAZY)
            mbarrier.arrive(free.index(v_slot), count=1)
            lower = gl.exp2(lower)
            if LAZY:
                lower, base_lower, l_lower, alpha_lower = _settle(lower, base_lower, l_lower)
                alpha = alpha_upper, alpha_lower
            else:
                l_lower = _add_sums(l_lower, alpha_lower, lower)
            packed = _whole_rows(_pack(upper), _pack(lower))
            v_slot = k_slot
            k_slot, phase = next_slot, next_phase

        pv = _start_values(packed, v_smem.index(v_slot), O_LAYOUT, BLOCK_N, DVP)
        acc = _add(acc, alpha, warpgroup_mma_wait(0, deps=(pv,)), O_LAYOUT, LAZY)
        if LAZY:
            m = gl.permute(gl.max(gl.join(base_upper, base_lower), 2), [0, 2, 1])  # the same in all lanes
            m = gl.convert_layout(gl.reshape(m, [ROWS]), gl.SliceLayout(1, S_LAYOUT)) + P_SHIFT

    # Normalise. A row that has met a key has a sum above zero.
    total = gl.permute(gl.sum(gl.join(l_upper, l_lower), 2), [0, 2, 1])
    total = gl.convert_layout(gl.reshape(total, [ROWS]), gl.SliceLayout(1, S_LAYOUT))
    empty = total == 0.0
    row = WHO * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
    inside = row < rows
    token = gl.load(q_token + row, mask=inside, other=0)
    row_lse = (m + gl.log2(total) - P_SHIFT) * LN2
    if lse_shift is not None:
        row_lse += gl.load(lse_shift + row, mask=inside, other=0.0)
    gl.store(lse + token, gl.where(empty, float("-inf"), row_lse), mask=inside)

    norm = gl.convert_layout(gl.where(empty, 0.0, 1.0 / total), gl.SliceLayout(1, O_LAYOUT))
    channel = gl.arange(0, DVP, gl.SliceLayout(0, O_LAYOUT))
    result = acc * norm[:, None] * gl.load(v_scale + channel)[None, :]
    if v_mean is not None:  # all of it: the unrounded weights, which l sums, are those of a softmax
        seen = gl.convert_layout(gl.where(empty, 0.0, 1.0), gl.SliceLayout(1, O_LAYOUT))
        result += seen[:, None] * gl.load(v_mean + channel)[None, :]
    result = result.to(out.dtype.element_ty)

    # Rows go to their place in the raster, ALIGN elements a thread: 16 bytes, or what all strides and DV divide by.
    ACROSS: gl.constexpr = min(32, DVP // ALIGN)
    STORE: gl.constexpr = gl.BlockedLayout([1, ALIGN], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    result = gl.convert_layout(result, STORE)
    row = WHO * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, STORE))
    channel = gl.arange(0, DVP, gl.SliceLayout(0, STORE))
    token = gl.load(q_token + row, mask=row < rows, other=0)
    mask = (row < rows)[:, None]
    if DV < DVP:
        mask = mask & (channel < DV)[None, :]
    gl.store(out + token.to(gl.int64)[:, None] * out_stride * ALIGN + channel[None, :], result, mask=mask)


# ------------------------------------------------------------------------------------------------------- the kernel


@gluon.jit
def _program(
    block, head, batch,
    q_desc, k_desc, v_desc, out, lse, q_scale, k_scale, v_scale, v_mean, lse_shift,
    key_bias, bias_state, bias_sb, bias_sh, state_sb, state_sh,
    unit_count, unit_index, unit_valid, q_blocks, q_token, phase,
    heads, q_length, q_slots, k_slots, q_tiles, k_tiles, mask_heads, capacity, phases, phase_group, softmax_scale,
    out_stride_batch, out_stride_head, out_stride_token,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, UNIT: gl.constexpr, TILE: gl.constexpr, RUNS: gl.constexpr,
    DP: gl.constexpr, DVP: gl.constexpr, DV: gl.constexpr, ALIGN: gl.constexpr, P_SHIFT: gl.constexpr,
    PADDED: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr, LAZY: gl.constexpr,
):  # fmt: skip
    """What becomes of one block of queries. ``fpscompile/gpu/hopper.py`` says what the arguments are."""
    BIAS: gl.constexpr = key_bias is not None
    PART: gl.constexpr = min(SUBTILE if RUNS > 1 else UNIT, UNIT)
    q_head = batch * heads + head
    k_head = batch * (heads // GROUP) + head // GROUP

    q_tile = gl.load(q_blocks + block * 3)
    first = gl.load(q_blocks + block * 3 + 1)
    rows = gl.load(q_blocks + block * 3 + 2)
    which = gl.minimum(gl.maximum(gl.load(phase + batch // phase_group), 0), phases - 1)
    line = (which * mask_heads + gl.where(mask_heads > 1, head, 0)) * q_tiles + q_tile
    n_units = gl.load(unit_count + line)
    unit_list = unit_index + line.to(gl.int64) * capacity
    q_scale += (q_head.to(gl.int64) * q_tiles + q_tile) * RUNS
    if RUNS == 1:
        q_factor = gl.load(q_scale) * (softmax_scale * LOG2E)
    else:  # rows differ
        q_scale += (first - q_tile * TILE) // SUBTILE
        q_factor = softmax_scale * LOG2E

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, ROWS, DP], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, DP], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, DVP, BLOCK_N], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(free.index(i), count=CONSUMERS)
    fence_async_shared()  # TMA must see the barriers as they have just been set up

    k_scale += k_head.to(gl.int64) * k_tiles * RUNS
    v_scale += k_head * DVP
    if v_mean is not None:
        v_mean += k_head * DVP
    if lse_shift is not None:
        lse_shift += q_head.to(gl.int64) * q_slots + first
    if BIAS:
        # Strides of the bias count runs of 32 slots, so that its rows are known to be aligned.
        key_bias += (batch.to(gl.int64) * bias_sb + head.to(gl.int64) * bias_sh) * 32
        bias_state += batch.to(gl.int64) * state_sb + head.to(gl.int64) * state_sh
    q_token += first
    out += (batch.to(gl.int64) * out_stride_batch + head.to(gl.int64) * out_stride_head) * ALIGN
    lse += q_head.to(gl.int64) * q_length
    PER_TILE: gl.constexpr = TILE // UNIT
    shared = (q_smem, k_smem, v_smem, q_full, k_full, v_full, free)
    outputs = (v_scale, v_mean, lse_shift, q_token, rows, out, out_stride_token, lse)
    notes = (k_scale, unit_valid, bias_state, key_bias)
    q_row = q_head * q_slots + first
    k_row = k_head * k_slots
    v_row = k_head * DVP
    operands = (unit_list, n_units, notes, q_scale, q_factor, outputs)
    # Spelled out: compile-time values that go through a variable would become run-time values.
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consumer, (shared, operands, 0, BLOCK_N, UNIT, PART, RUNS, DVP, DV, ALIGN, PER_TILE, P_SHIFT, PADDED,
                             BIAS, STAGES, OVERLAP, LAZY)),
                (_producer, (q_desc, k_desc, v_desc, shared, unit_list, n_units, q_row, k_row, v_row, STAGES, UNIT,
                             BLOCK_N, CONSUMERS)),
            ],
            [1],
            [PRODUCER_REGS],
        )  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consumer, (shared, operands, 0, BLOCK_N, UNIT, PART, RUNS, DVP, DV, ALIGN, PER_TILE, P_SHIFT, PADDED,
                             BIAS, STAGES, OVERLAP, LAZY)),
                (_consumer, (shared, operands, 1, BLOCK_N, UNIT, PART, RUNS, DVP, DV, ALIGN, PER_TILE, P_SHIFT, PADDED,
                             BIAS, STAGES, OVERLAP, LAZY)),
                (_producer, (q_desc, k_desc, v_desc, shared, unit_list, n_units, q_row, k_row, v_row, STAGES, UNIT,
                             BLOCK_N, CONSUMERS)),
            ],
            [4, 1],
            [CONSUMER_REGS, PRODUCER_REGS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (shared, operands, 0, BLOCK_N, UNIT, PART, RUNS, DVP, DV, ALIGN, PER_TILE, P_SHIFT, PADDED,
                             BIAS, STAGES, OVERLAP, LAZY)),
                (_consumer, (shared, operands, 1, BLOCK_N, UNIT, PART, RUNS, DVP, DV, ALIGN, PER_TILE, P_SHIFT, PADDED,
                             BIAS, STAGES, OVERLAP, LAZY)),
                (_consumer, (shared, operands, 2, BLOCK_N, UNIT, PART, RUNS, DVP, DV, ALIGN, PER_TILE, P_SHIFT, PADDED,
                             BIAS, STAGES, OVERLAP, LAZY)),
                (_producer, (q_desc, k_desc, v_desc, shared, unit_list, n_units, q_row, k_row, v_row, STAGES, UNIT,
                             BLOCK_N, CONSUMERS)),
            ],
            [4, 4, 1],
            [CONSUMER_REGS, CONSUMER_REGS, PRODUCER_REGS],
        )  # fmt: skip


CHECK = gl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0]))
"""Layout of [query blocks, rows]."""


@gluon.jit
def _overflows(block, q_blocks, q_token, lse, CONSUMERS: gl.constexpr):
    """Whether a row of these blocks has an infinite log-sum-exp: whether its weights have outgrown float32."""
    WIDTH: gl.constexpr = ROWS * (4 if CONSUMERS == 3 else CONSUMERS)
    row = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, CHECK)), 0)
    first = gl.expand_dims(gl.load(q_blocks + block * 3 + 1), 1)
    inside = row < gl.expand_dims(gl.load(q_blocks + block * 3 + 2), 1)
    token = gl.load(q_token + first + row, mask=inside, other=0)
    found = gl.load(lse + token, mask=inside, other=0.0) == float("inf")
    return gl.max(gl.max(found.to(gl.int32), 1), 0) > 0


@gluon.jit(
    do_not_specialize=[
        "heads", "q_length", "q_slots", "k_slots", "q_tiles", "k_tiles", "mask_heads", "capacity", "phases",
        "phase_group", "bias_sb", "bias_sh", "state_sb", "state_sh",
        "out_stride_batch", "out_stride_head", "out_stride_token", "blocks",
    ]
)  # fmt: skip
def attention_forward(
    q_desc, k_desc, v_desc, out, lse, q_scale, k_scale, v_scale, v_mean, lse_shift,
    key_bias, bias_state, bias_sb, bias_sh, state_sb, state_sh,
    unit_count, unit_index, unit_valid, q_blocks, q_token, phase,
    heads, q_length, q_slots, k_slots, q_tiles, k_tiles, mask_heads, capacity, phases, phase_group, softmax_scale,
    out_stride_batch, out_stride_head, out_stride_token,
    blocks,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, UNIT: gl.constexpr, TILE: gl.constexpr, RUNS: gl.constexpr,
    DP: gl.constexpr, DVP: gl.constexpr, DV: gl.constexpr, ALIGN: gl.constexpr, P_SHIFT: gl.constexpr,
    PADDED: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr, LAZY: gl.constexpr,
    AGAIN: gl.constexpr,
):  # fmt: skip
    """Grid: (query blocks, H, B), so that the blocks of a head run side by side and share its K and V in the L2 cache.

    With AGAIN: (runs of AGAIN query blocks, H, B), for those blocks that :func:`_overflows` finds.
    ``fpscompile/gpu/hopper.py`` says what the arguments are. Needs ``num_warps=4``: the first consumer's.
    """
    head = gl.program_id(1)
    batch = gl.program_id(2)
    if AGAIN == 0:
        _program(
            gl.program_id(0), head, batch,
            q_desc, k_desc, v_desc, out, lse, q_scale, k_scale, v_scale, v_mean, lse_shift,
            key_bias, bias_state, bias_sb, bias_sh, state_sb, state_sh, unit_count, unit_index,
            unit_valid, q_blocks, q_token, phase, heads, q_length, q_slots, k_slots, q_tiles, k_tiles,
            mask_heads, capacity, phases, phase_group, softmax_scale, out_stride_batch, out_stride_head,
            out_stride_token, GROUP, BLOCK_N, UNIT, TILE, RUNS, DP, DVP, DV, ALIGN, P_SHIFT, PADDED,
            CONSUMERS, STAGES, OVERLAP, CONSUMER_REGS, PRODUCER_REGS, LAZY,
        )  # fmt: skip
    else:
        first = gl.program_id(0) * AGAIN
        lse_of_head = lse + (batch * heads + head).to(gl.int64) * q_length
        if _overflows(gl.minimum(first + gl.arange(0, AGAIN, _axis_layout(0, CHECK, 2)), blocks - 1), q_blocks, q_token,
                      lse_of_head, CONSUMERS):  # fmt: skip
            for block in range(first, gl.minimum(first + AGAIN, blocks)):
                if _overflows(gl.full([1], 0, gl.int32, _axis_layout(0, CHECK, 2)) + block, q_blocks, q_token,
                              lse_of_head, CONSUMERS):  # fmt: skip
                    _program(
                        block, head, batch,
                        q_desc, k_desc, v_desc, out, lse, q_scale, k_scale, v_scale, v_mean,
                        lse_shift, key_bias, bias_state, bias_sb, bias_sh, state_sb, state_sh, unit_count,
                        unit_index, unit_valid, q_blocks, q_token, phase, heads, q_length, q_slots, k_slots,
                        q_tiles, k_tiles, mask_heads, capacity, phases, phase_group, softmax_scale,
                        out_stride_batch, out_stride_head, out_stride_token, GROUP, BLOCK_N, UNIT, TILE,
                        RUNS, DP, DVP, DV, ALIGN, P_SHIFT, PADDED, CONSUMERS, STAGES, OVERLAP,
                        CONSUMER_REGS, PRODUCER_REGS, LAZY,
                    )  # fmt: skip
