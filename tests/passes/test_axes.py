"""The algebra of axes: splitting, merging, cutting and joining."""

from __future__ import annotations

import itertools

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from fpscompile.ir import Size
from fpscompile.passes.axes import INPUT, Axis, Label, atom, axis_size, concat, cut, merge, reshape, root, same, strided


def size(value: int) -> Size:
    return Size(sympy.Integer(value), value)


def axis(name: str, value: int, source: int = INPUT) -> Axis:
    return atom(name, size(value), source=source, origin="latent", dim=ord(name[0]))


def view(label: Label, *sizes: int) -> Label:
    return reshape(label, [size(s) for s in sizes], "view")


T, H, W, C = axis("t", 3), axis("h", 6), axis("w", 10), axis("c", 4)


def test_flatten_and_back() -> None:
    (tokens,) = view((T, H, W), 180)
    assert tokens == T + H + W
    assert view((tokens,), 3, 6, 10) == (T, H, W)


def test_split_parts_rejoin_in_order_only() -> None:
    high, low = view((H,), 3, 2)
    assert (axis_size(high).hint, axis_size(low).hint) == (3, 2)
    assert view((high, low), 6) == (H,)
    assert view((low, high), 6) != (H,)


def test_patchify_keeps_the_roots() -> None:
    t, h, ph, w, pw = view((T, H, W), 3, 3, 2, 5, 2)
    (tokens,) = view((t, h, w), 45)
    assert [root((factor,)).name for factor in tokens] == ["t", "h", "w"]
    assert root(ph).role == "low"
    assert view((t, h, ph, w, pw), 3, 6, 10) == (T, H, W)


def test_three_way_splits_nest() -> None:
    label = view((axis("n", 24),), 2, 3, 4)
    assert [axis_size(part).hint for part in label] == [2, 3, 4]
    assert view(label, 24) == (axis("n", 24),)
    assert view(view(label, 6, 4), 24) == (axis("n", 24),)


def test_sizes_of_one_are_transparent() -> None:
    assert view((T, (), H), 3, 1, 1, 6) == (T, (), (), H)


def test_what_does_not_divide_becomes_unknown() -> None:
    result = view((T, H), 9, 2)
    assert [axis_size(part).hint for part in result] == [9, 2]
    result = view((axis("p", 5), axis("q", 7)), 7, 5)
    assert all(not set(part) & set(axis("p", 5) + axis("q", 7)) for part in result)


def test_concat_cut_and_rejoin() -> None:
    text, video = axis("x", 7), T + H + W
    joint = concat([text, video])
    assert axis_size(joint).hint == 187
    assert cut(joint, size(7), size(180)) == video
    assert cut(joint, size(0), size(7)) == text
    first, rest = cut(video, size(0), size(60)), cut(video, size(60), size(120))
    assert concat([first, rest]) == video
    assert concat([rest, first]) != video
    assert cut(cut(video, size(10), size(100)), size(5), size(20)) == cut(video, size(15), size(20))


def test_cut_of_everything_is_the_axis() -> None:
    assert cut(T, size(0), size(3)) == T


def test_merge_prefers_data_then_detail_then_the_first() -> None:
    weight, data = axis("p", 180, source=0), T + H + W
    assert merge(weight, data) == merge(data, weight) == data
    assert merge((), data) == merge(data, ()) == data
    other = axis("o", 180)
    assert merge(other, data) == data
    assert merge(axis("a", 6), axis("b", 6)) == axis("a", 6)


def test_strided_axes_keep_their_root() -> None:
    coarse = strided(H, size(3))
    assert axis_size(coarse).hint == 3
    assert root(coarse) == H[0]
    assert strided(H, size(6)) == H


def test_symbolic_sizes_compare_without_guards() -> None:
    s, t = sympy.symbols("s t", integer=True, positive=True)
    assert same(Size(s * (t // 2), 12), Size((t // 2) * s, 12))
    assert same(Size(2 * ((s * 2) // 2), 12), Size(2 * s, 12))
    assert not same(Size(s, 12), Size(t, 12))
    assert not same(Size(s, 12), Size(sympy.Integer(12), 12))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_any_view_and_its_inverse(sizes: list[int], data: st.DataObject) -> None:
    """Merging any runs of dimensions and splitting them back gives the same labels."""
    label = tuple(axis(f"{chr(97 + i)}", s) for i, s in enumerate(sizes))
    cuts = sorted({0, len(sizes), *data.draw(st.lists(st.integers(0, len(sizes)), max_size=3))})
    merged = [axis_size(sum(label[a:b], ())).hint for a, b in itertools.pairwise(cuts)]
    assert view(view(label, *merged), *sizes) == label


@pytest.mark.parametrize("parts", [(2, 3), (3, 2), (6, 1)])
def test_equal_splits_are_equal(parts: tuple[int, int]) -> None:
    assert view((H,), *parts) == view((H,), *parts)
