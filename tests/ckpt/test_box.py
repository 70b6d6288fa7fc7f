"""Boxes against brute force on numpy arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.box import Box, around, grid


def lengths(least: int = 0) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(least, 6), min_size=0, max_size=3).map(tuple)


@st.composite
def shape_and_boxes(draw: st.DrawFn, count: int) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes inside it; some are empty."""
    shape = draw(lengths())
    boxes = []
    for _ in range(count):
        ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
        boxes.append(Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends)))
    return shape, boxes


def mask(shape: tuple[int, ...], box: Box) -> np.ndarray:
    """Return a mask of the elements of the array that lie in the box."""
    found = np.zeros(shape, bool)
    found[box.slices] = True
    return found


@given(shape_and_boxes(2))
def test_intersection_is_the_common_elements(given_boxes):
    shape, (a, b) = given_boxes
    common = a.intersect(b)
    expected = mask(shape, a) & mask(shape, b)
    assert (common is not None) == expected.any()
    if common is not None:
        assert np.array_equal(mask(shape, common), expected)
        assert common == b.intersect(a)
        assert common.within(a)
        assert common.within(b)


@given(shape_and_boxes(2))
def test_within_is_having_no_element_outside(given_boxes):
    shape, (a, b) = given_boxes
    assert a.within(b) == (not (mask(shape, a) & ~mask(shape, b)).any())


@given(shape_and_boxes(2))
def test_relative_box_selects_the_same_elements_of_the_part(given_boxes):
    shape, (a, b) = given_boxes
    common = a.intersect(b)
    if common is not None:
        elements = np.arange(mask(shape, a).size).reshape(shape)
        part = elements[a.slices][common.relative_to(a).slices]
        assert np.array_equal(part, elements[common.slices])


@given(shape_and_boxes(1))
def test_size_end_and_span_count_elements_in_c_order(given_boxes):
    shape, (box,) = given_boxes
    elements = np.arange(mask(shape, box).size).reshape(shape)[box.slices]
    assert box.size == elements.size
    assert box.end == tuple(s.stop for s in box.slices)
    if box.size:
        assert box.span(shape) == (elements.min(), elements.max() + 1)


@given(shape_and_boxes(1), st.data())
def test_grid_yields_exactly_the_chunks_that_meet_the_box(given_boxes, data):
    shape, (box,) = given_boxes
    chunk = tuple(data.draw(st.integers(1, 7)) for _ in shape)
    expected = {}
    for index in np.ndindex(*(-(-n // c) for n, c in zip(shape, chunk, strict=True))):
        elements = np.zeros(shape, bool)
        elements[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunk, strict=True))] = True
        if (elements & mask(shape, box)).any():
            expected[index] = elements
    found = list(grid(shape, chunk, box))
    assert [index for index, _ in found] == sorted(expected), "each once, last dim fastest"
    for index, chunk_box in found:
        assert np.array_equal(mask(shape, chunk_box), expected[index])
        assert chunk_box.size == expected[index].sum(), "cut off at the array's end"


def test_chunks_come_in_c_order():
    assert [index for index, _ in grid((5, 4, 7), (2, 2, 3))] == [*np.ndindex(3, 2, 3)]
    part = Box((1, 2, 3), (4, 1, 4))
    assert [index for index, _ in grid((5, 4, 7), (2, 2, 3), part)] == [
        (a, 1, b) for a in range(3) for b in (1, 2)
    ]


def test_chunks_at_the_end_are_cut_off():
    rows, last = Box((0, 0), (3, 2)), Box((0, 2), (3, 1))
    below, corner = Box((3, 0), (1, 2)), Box((3, 2), (1, 1))
    assert [box for _, box in grid((4, 3), (3, 2))] == [rows, last, below, corner]


@given(lengths(), st.data())
def test_grid_without_a_box_covers_every_element_once(shape, data):
    chunk = tuple(data.draw(st.integers(1, 7)) for _ in shape)
    times = np.zeros(shape, int)
    for _, box in grid(shape, chunk):
        times[box.slices] += 1
    assert (times == 1).all()


@given(shape_and_boxes(3))
def test_a_box_around_others_is_the_smallest(given_boxes):
    _, boxes = given_boxes
    found = around(boxes)
    low, high = np.array([b.offset for b in boxes]), np.array([b.end for b in boxes])
    assert (found.offset, found.end) == (tuple(low.min(0)), tuple(high.max(0)))
    assert around(boxes[:1]) == boxes[0]


def test_an_empty_box_has_no_span():
    with pytest.raises(AssertionError, match="an empty box has no span"):
        Box((1, 0), (0, 3)).span((4, 4))


def test_a_scalar_is_one_element_in_one_chunk():
    scalar = Box.whole(())
    assert (scalar.size, scalar.span(()), list(grid((), ()))) == (1, (0, 1), [((), scalar)])
