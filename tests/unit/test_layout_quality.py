from __future__ import annotations

import numpy as np
import pytest

from rechub_dist.data.order.epoch import RowOrder
from rechub_dist.data.order.quality import layout_quality, layout_warning


def test_what_a_rank_decodes_is_what_its_shares_take() -> None:
    for counts, batch_size, world in (([70] * 11, 24, 3), ([50, 20, 90, 10], 16, 2), ([40] * 20, 32, 6)):
        order = RowOrder(counts, batch_size, shuffle_rows=300)
        epoch = order.epoch(0)
        decoded, peak = 0, 0
        for rank in range(world):
            steps: dict[int, list[int]] = {}
            for step in range(order.steps):
                for piece in epoch.share(step, rank, world).slices:
                    steps.setdefault(piece.window, []).append(step)
            decoded += sum(counts[epoch.window(index).group] for index in steps)
            spans = {index: (min(used), max(used)) for index, used in steps.items()}
            peak = max(
                peak,
                *(
                    sum(epoch.window(i).stop - epoch.window(i).start for i, (a, b) in spans.items() if a <= step <= b)
                    for step in range(order.steps)
                ),
            )
        found = layout_quality(counts, batch_size, world, shuffle_rows=300)
        # a stream between two ranks may skip one of them in a window: that is taken as read
        assert decoded / sum(counts) <= found.amplification <= 1.3 * decoded / sum(counts)
        assert peak <= found.peak_rows <= 1.5 * peak


def test_the_stored_order_correlates_and_a_shuffle_does_not() -> None:
    counts = [1000] * 200
    assert layout_quality(counts, 512, shuffle=False).rank_correlation == pytest.approx(1)
    shuffled = layout_quality(counts, 512)
    assert abs(shuffled.rank_correlation) < 0.05
    assert shuffled.groups_per_batch == pytest.approx(64, abs=4)
    assert layout_quality(counts, 512, shuffle=False).groups_per_batch == pytest.approx(1.5, abs=0.5)


def test_a_true_shuffle_is_told_from_a_poor_one_by_the_mean_of_a_batch() -> None:
    # what `streams` stands for: the spread of the mean stored place of a batch, over that of a true shuffle
    spread = {}
    for streams in (1, 8, 64):
        order = RowOrder([1000] * 100, 256, streams=streams)
        epoch = order.epoch(0)
        means = []
        for step in range(order.steps - 1):
            places = []
            for window, start, stop in epoch.share(step).slices:
                permutation = epoch.permutation(window)
                assert permutation is not None
                place = epoch.window(window)
                places.append(place.group * 1000 + place.start + permutation[start:stop])
            means.append(np.concatenate(places).mean())
        spread[streams] = np.std(means) / (100_000 / np.sqrt(12) / np.sqrt(256))
    assert spread[1] > 2 * spread[8] > 4 * spread[64]


@pytest.mark.parametrize(
    ("counts", "world", "faults"),
    [
        ([65_536] * 2000, 16, ()),
        ([100_000] * 1000, 2, ()),
        ([65_536] * 16, 2, ()),  # few row groups, but all of the data is open
        ([1_000_000] * 64, 2, ("only 8 row groups",)),
        ([1_000_000] * 64, 16, ("only 8 row groups", "16 rank(s) decode each row 2.2 times")),
        ([1_000_000] * 10, 2, ("2 rank(s) decode each row 1.6 times",)),
        ([20_000] * 4, 64, ()),  # so little that it is of no matter
        (
            [65_536] * 15 + [16_960] + [65_536] * 48,
            2,
            ("2 rank(s) decode each row 2.0 times", "--row-group-rows 16384"),
        ),
        ([16_384] * 244 + [100], 2, ()),  # what was advised
        ([2_000_000], 4, ("4 rank(s) decode each row 4.0 times",)),
    ],
)
def test_warnings(counts: list[int], world: int, faults: tuple[str, ...]) -> None:
    told = layout_warning("data/train", counts, 8192, world)
    assert (told is None) == (not faults)
    for fault in (*faults, *(["rechub-dist data rechunk data/train --out"] if faults else [])):
        assert fault in str(told)


def test_more_ranks_than_streams() -> None:
    told = layout_warning("data/train", [65_536] * 4000, 8192, 256)
    assert told is not None
    assert "256 ranks decode each row 4.3 times, as they share 64 streams" in told
    assert "data.max_streams: 256 and data.shuffle_rows: 16777216" in told
    mended = layout_quality([65_536] * 4000, 8192, 256, shuffle_rows=1 << 24, max_streams=256)
    assert mended.amplification < 1.4
    assert layout_warning("data/train", [65_536] * 4000, 8192, 256, shuffle_rows=1 << 24, max_streams=256) is None


def test_refuses_what_has_no_rows() -> None:
    with pytest.raises(ValueError, match="0 rows over 1 ranks"):
        layout_quality([0, 0], 10)
