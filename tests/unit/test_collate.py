"""Micro-batches: padded rows and packed rows."""

import pytest
import torch

from deadpan.processing.collate import collate
from deadpan.processing.encoding import IGNORE_INDEX
from deadpan.processing.processor import Sample

PAD = 99
NO = IGNORE_INDEX
SHORT = Sample([1, 2, 3], [NO, 2, 3], None, "short")
LONG = Sample([4, 5, 6, 7, 8], [NO, NO, NO, 7, 8], torch.ones(2, 3, 4, 4), "long")
BOLD = Sample([10, 11], [10, 11], torch.full((1, 3, 4, 4), 2.0), "bold")
"""Labelled from its first token on, which nothing precedes."""


def test_rows_are_padded_on_the_right() -> None:
    batch = collate([SHORT, LONG, BOLD], PAD)
    assert batch.input_ids.tolist() == [
        [1, 2, 3, PAD, PAD],
        [4, 5, 6, 7, 8],
        [10, 11, PAD, PAD, PAD],
    ]
    assert batch.labels.tolist() == [
        [NO, 2, 3, NO, NO],
        [NO, NO, NO, 7, 8],
        [NO, 11, NO, NO, NO],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_packed_samples_lie_end_to_end_and_each_starts_at_position_0() -> None:
    batch = collate([SHORT, LONG, BOLD], PAD, packing=True)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 10, 11]]
    assert batch.labels.tolist() == [[NO, 2, 3, NO, NO, NO, 7, 8, NO, 11]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1]]
    assert PAD not in batch.input_ids


@pytest.mark.parametrize("packing", [False, True])
def test_no_sample_is_taught_by_its_neighbour(packing: bool) -> None:
    # In a packed row the label of a sample's first token would be predicted from the sample before it.
    batch = collate([BOLD, BOLD, SHORT], PAD, packing)
    first = batch.position_ids == 0
    assert first.sum() == 3
    assert batch.labels[first].tolist() == [NO] * 3


@pytest.mark.parametrize("packing", [False, True])
def test_what_is_counted(packing: bool) -> None:
    batch = collate([SHORT, LONG, BOLD], PAD, packing)
    assert batch.tokens == 3 + 5 + 2
    assert batch.supervised == int((batch.labels != NO).sum()) == 2 + 2 + 1
    assert batch.names == ["short", "long", "bold"]


@pytest.mark.parametrize("packing", [False, True])
def test_tiles_follow_one_another_in_the_order_of_the_samples(packing: bool) -> None:
    batch = collate([LONG, SHORT, BOLD], PAD, packing)
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (3, 3, 4, 4)
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [1, 1, 2]
    assert collate([SHORT], PAD, packing).pixel_values is None


@pytest.mark.parametrize("packing", [False, True])
def test_one_sample_alone_is_the_same_either_way(packing: bool) -> None:
    batch = collate([LONG], PAD, packing)
    assert batch.input_ids.tolist() == [LONG.input_ids]
    assert batch.labels.tolist() == [LONG.labels]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]]
    for tensor in (batch.input_ids, batch.labels, batch.position_ids):
        assert tensor.dtype is torch.int64


@pytest.mark.parametrize("sample", [SHORT, LONG])
def test_a_batch_moves_whole(sample: Sample) -> None:
    batch = collate([sample], PAD)
    moved = batch.to(torch.device("meta"))
    assert {moved.input_ids.device.type, moved.labels.device.type} == {"meta"}
    assert moved.position_ids.device.type == "meta"
    assert (moved.pixel_values is None) == (sample.pixel_values is None)
    if moved.pixel_values is not None:
        assert moved.pixel_values.device.type == "meta"
    assert (moved.names, moved.tokens, moved.supervised) == (
        batch.names,
        batch.tokens,
        batch.supervised,
    )


def test_padding_behind_answers_that_share_a_prefix_goes_on_where_the_last_one_ends() -> None:
    shared = Sample([5, 6, 7, 8, 9], [-100, -100, 7, 8, 9], None, "two", [0, 1, 2, 3, 2])
    longer = Sample([5] * 7, [-100] + [5] * 6, None, "one")
    positions = collate([shared, longer], 0).position_ids
    assert positions.tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]
