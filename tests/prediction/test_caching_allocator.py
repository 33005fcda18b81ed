"""The caching allocator: each rule by itself, and all of them against a slow and plain version."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.prediction.caching_allocator import (
    AllocatorEvent,
    CachingAllocator,
    Replay,
    block_bytes,
    replay,
    segment_bytes,
)

KIB, MIB = 2**10, 2**20
ENDLESS = 2**60
drawn = settings(deadline=None, max_examples=200, derandomize=True)


def in_mib(*events: tuple[int, float]) -> list[AllocatorEvent]:
    return [(name, int(size * MIB)) for name, size in events]


def after(
    *events: tuple[int, float], limit_mib: int | None = None, expandable: bool = False
) -> CachingAllocator:
    """The allocator after events in MiB, which all go through."""
    limit = None if limit_mib is None else limit_mib * MIB
    allocator = CachingAllocator(limit, expandable=expandable)
    for name, size in in_mib(*events):
        if size:
            assert allocator.allocate(name, size)
        else:
            allocator.free(name)
    return allocator


def layout(allocator: CachingAllocator) -> list[list[tuple[float, bool]]]:
    return [[(size / MIB, used) for size, used in run] for run in allocator.segments()]


# Rules that both kinds of segment follow.


@pytest.mark.parametrize(
    ("requested", "block"),
    [(1, 512), (511, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)],
)
def test_a_block_is_a_multiple_of_512_bytes(requested: int, block: int) -> None:
    assert block_bytes(requested) == block
    for expandable in (False, True):
        allocator = CachingAllocator(expandable=expandable)
        allocator.allocate(0, requested)
        assert (block, True) in [piece for run in allocator.segments() for piece in run]


@pytest.mark.parametrize(
    ("block", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_a_segment_is_2_or_20_mib_or_a_multiple_of_2_mib(block: int, segment: int) -> None:
    assert segment_bytes(block) == segment
    allocator = CachingAllocator()
    allocator.allocate(0, block)
    assert allocator.reserved_bytes == segment


@pytest.mark.parametrize("expandable", [False, True])
def test_a_small_request_never_takes_from_the_large_pool(expandable: bool) -> None:
    allocator = after((1, 15), (1, 0), expandable=expandable)
    reserved = allocator.reserved_bytes
    allocator.allocate(2, MIB)
    assert allocator.reserved_bytes == reserved + 2 * MIB
    allocator.allocate(3, MIB + 512)
    assert allocator.reserved_bytes == reserved + 2 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_freed_memory_stays_reserved_and_is_used_again(expandable: bool) -> None:
    allocator = after((1, 20), (1, 0), (2, 20), expandable=expandable)
    assert allocator.allocated_bytes == allocator.reserved_bytes == 20 * MIB


def test_a_freed_block_becomes_one_with_free_neighbours_on_both_sides() -> None:
    allocator = after((1, 5), (2, 5), (3, 5), (4, 5), (1, 0), (3, 0))
    assert layout(allocator) == [[(5, False), (5, True), (5, False), (5, True)]]
    allocator.free(2)
    assert layout(allocator) == [[(15, False), (5, True)]]


def test_blocks_of_two_segments_never_become_one() -> None:
    allocator = after((1, 10), (2, 10), (1, 0), (2, 0), (3, 20))
    assert layout(allocator) == [[(10, False)], [(10, False)], [(20, True)]]


# Plain segments.


def test_the_smallest_block_that_holds_a_request_is_taken() -> None:
    allocator = after((1, 30), (2, 12), (3, 20), (1, 0), (2, 0), (3, 0), (4, 12))
    assert layout(allocator) == [[(30, False)], [(12, True)], [(20, False)]]


def test_of_equal_blocks_the_first_is_taken() -> None:
    allocator = after((1, 12), (2, 12), (2, 0), (1, 0), (3, 12))
    assert layout(allocator) == [[(12, True)], [(12, False)]]


def test_a_small_block_is_cut_whenever_512_bytes_remain() -> None:
    allocator = CachingAllocator()
    allocator.allocate(0, MIB)
    allocator.allocate(1, MIB - 512)
    assert allocator.segments() == [[(MIB, True), (MIB - 512, True), (512, False)]]


def test_a_large_block_is_cut_only_if_more_than_1_mib_remains() -> None:
    whole = CachingAllocator()
    whole.allocate(0, 11 * MIB)  # Of a segment of 12 MiB: exactly 1 MiB would remain.
    assert whole.segments() == [[(12 * MIB, True)]]
    assert whole.allocated_bytes == 12 * MIB
    cut = CachingAllocator()
    cut.allocate(0, 11 * MIB - 512)
    assert cut.segments() == [[(11 * MIB - 512, True), (MIB + 512, False)]]


def test_what_fits_to_the_byte_fits() -> None:
    events = in_mib((1, 20), (2, 0.5))
    assert replay(events, limit_bytes=22 * MIB).fits
    assert replay(events, limit_bytes=22 * MIB - 1).failed_at == 1


def test_at_the_limit_wholly_free_segments_of_both_pools_go_back() -> None:
    allocator = after((1, 20), (2, 0.5), (1, 0), (2, 0), limit_mib=24)
    assert allocator.reserved_bytes == 22 * MIB
    assert allocator.allocate(3, 24 * MIB)
    assert layout(allocator) == [[(24, True)]]


def test_at_the_limit_a_segment_with_a_living_block_stays() -> None:
    allocator = after((1, 5), (2, 15), (2, 0), limit_mib=30)
    assert layout(allocator) == [[(5, True), (15, False)]]
    assert not allocator.allocate(3, 16 * MIB)
    assert allocator.allocate(4, 15 * MIB)


def test_nothing_goes_back_before_the_limit() -> None:
    allocator = after((1, 12), (1, 0), (2, 16), (2, 0), (3, 20), limit_mib=48)
    assert allocator.reserved_bytes == 48 * MIB


def test_a_larger_limit_can_fail_where_a_smaller_one_does_not() -> None:
    # With 32 MiB the first segment has gone back when 8 and 9 MiB are asked for, so that they
    # share one; with 34 each lies in its own, and neither segment can go.
    events = in_mib((1, 16), (1, 0), (2, 18), (2, 0), (3, 8), (4, 9), (5, 10))
    assert replay(events, limit_bytes=32 * MIB).fits
    assert replay(events, limit_bytes=34 * MIB).failed_at == 6


# Expandable segments.


def test_an_expandable_segment_grows_by_pages_of_2_and_20_mib() -> None:
    allocator = after((1, 15), expandable=True)
    assert layout(allocator) == [[(15, True), (5, False)]]
    allocator = after((1, 15), (2, 15), expandable=True)
    assert layout(allocator) == [[(15, True), (15, True), (10, False)]]
    allocator = after((1, 1), (2, 1), (3, 1), expandable=True)
    assert layout(allocator) == [[(1, True), (1, True), (1, True), (1, False)]]


def test_an_expandable_block_is_cut_whenever_512_bytes_remain() -> None:
    allocator = CachingAllocator(expandable=True)
    allocator.allocate(0, 20 * MIB - 512)
    assert allocator.segments() == [[(20 * MIB - 512, True), (512, False)]]


def test_a_gap_is_taken_before_the_end_of_the_segment_even_if_the_end_fits_better() -> None:
    allocator = after((1, 12), (2, 20), (1, 0), expandable=True)
    assert layout(allocator) == [[(12, False), (20, True), (8, False)]]
    allocator.allocate(3, 7 * MIB)
    assert layout(allocator) == [[(7, True), (5, False), (20, True), (8, False)]]


def test_at_the_limit_free_pages_are_unmapped_and_the_rest_of_their_block_stays() -> None:
    events = ((1, 5), (2, 70), (3, 5), (2, 0))
    allocator = after(*events, limit_mib=80, expandable=True)
    assert layout(allocator) == [[(5, True), (70, False), (5, True)]]
    allocator.release_cached()  # Pages 20 to 40 and 40 to 60 are wholly free.
    assert layout(allocator) == [[(5, True), (15, False)], [(15, False), (5, True)]]
    assert allocator.reserved_bytes == 40 * MIB


def test_new_pages_fill_the_lowest_hole_that_has_room() -> None:
    allocator = after((1, 5), (2, 70), (3, 5), (2, 0), expandable=True)
    allocator.release_cached()
    allocator.allocate(4, 30 * MIB)  # 15 are free before the hole: one page of it is enough.
    assert layout(allocator) == [[(5, True), (30, True), (5, False)], [(15, False), (5, True)]]
    allocator.allocate(5, 50 * MIB)  # Only behind the end is there room.
    assert allocator.reserved_bytes == 120 * MIB


def test_a_hole_and_the_free_block_behind_it_make_one() -> None:
    allocator = after((1, 20), (2, 20), (3, 20), (4, 20), (2, 0), expandable=True)
    allocator.release_cached()
    allocator.free(3)
    assert layout(allocator) == [[(20, True)], [(20, False), (20, True)]]
    allocator.allocate(5, 30 * MIB)
    assert layout(allocator) == [[(20, True), (30, True), (10, False), (20, True)]]
    assert allocator.reserved_bytes == 80 * MIB


def test_of_two_blocks_that_can_grow_as_far_the_smaller_is_taken() -> None:
    allocator = after((1, 15), (2, 25), (3, 20), (4, 25), (5, 15), (2, 0), expandable=True)
    allocator.release_cached()
    allocator.free(4)  # 5 with a hole of 20 behind them, and 25.
    allocator.allocate(6, 5 * MIB)
    assert layout(allocator) == [[(15, True), (5, True)], [(20, True), (25, False), (15, True)]]


def test_an_expandable_segment_gives_where_plain_ones_cannot() -> None:
    events = in_mib((1, 20), (2, 20), (1, 0), (3, 10), (2, 0), (4, 30))
    assert replay(events, limit_bytes=40 * MIB).failed_at == 5
    assert replay(events, limit_bytes=40 * MIB, expandable=True).fits


# The replay.


def test_a_replay_says_where_the_peak_was_first_reached() -> None:
    events = in_mib((1, 10), (2, 10), (2, 0), (3, 10), (3, 0), (1, 0))
    assert replay(events) == Replay(
        peak_allocated=20 * MIB, peak_reserved=20 * MIB, failed_at=None, peak_at=1
    )


def test_a_replay_ends_at_the_event_that_fails() -> None:
    def events() -> Iterator[AllocatorEvent]:
        yield from in_mib((1, 10), (2, 10), (3, 10))
        raise AssertionError("read on after the failure")

    result = replay(events(), limit_bytes=20 * MIB)
    assert not result.fits
    assert result == Replay(peak_allocated=20 * MIB, peak_reserved=20 * MIB, failed_at=2, peak_at=1)


def test_the_peak_of_what_was_reserved_outlasts_the_cache() -> None:
    result = replay(in_mib((1, 24), (1, 0), (2, 0.5)), limit_bytes=24 * MIB)
    assert result.fits
    assert result.peak_reserved == 24 * MIB


def test_no_events_need_nothing() -> None:
    assert replay([], limit_bytes=0) == Replay(
        peak_allocated=0, peak_reserved=0, failed_at=None, peak_at=None
    )


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([(1, 5), (1, 5)], "cannot allocate 5 bytes as 1"),
        ([(1, -5)], "cannot allocate -5 bytes as 1"),
        ([(1, 0)], "cannot free 1"),
        ([(1, 5), (1, 0), (1, 0)], "cannot free 1"),
    ],
)
def test_events_that_contradict_each_other_are_refused(
    events: list[AllocatorEvent], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replay(events)


# All rules together, against a slow and plain version.

FREE, UNMAPPED = -1, -2  # What a piece is when no name has it.


@dataclass
class Piece:
    size: int
    state: int


class Plain:
    """The rules once more: a segment is a list of pieces, and everything is looked for anew."""

    def __init__(self, limit: int, *, expandable: bool) -> None:
        self.limit, self.expandable, self.reserved = limit, expandable, 0
        self.pools: dict[bool, list[list[Piece]]] = {True: [], False: []}
        if expandable:
            self.pools = {small: [[Piece(ENDLESS, UNMAPPED)]] for small in (True, False)}

    def allocate(self, name: int, requested: int) -> bool:
        size = -(-requested // 512) * 512
        small = size <= MIB
        extend = self.map_pages if self.expandable else self.add_segment
        spot = self.fit(self.pools[small], size) or extend(small, size)
        if spot is None:
            self.release()
            spot = extend(small, size)
        if spot is None:
            return False
        segment, index = spot
        rest = segment[index].size - size
        if rest > (MIB if not small and not self.expandable else 0):
            segment[index : index + 1] = [Piece(size, name), Piece(rest, FREE)]
        segment[index].state = name
        return True

    def fit(self, pool: list[list[Piece]], size: int) -> tuple[list[Piece], int] | None:
        holding = [
            (piece.size, number, index)
            for number, segment in enumerate(pool)
            for index, piece in enumerate(segment)
            if piece.state == FREE and piece.size >= size
        ]
        spots = [(pool[number], index) for _, number, index in sorted(holding)]
        while len(spots) > 1 and reach(*spots[1]) < reach(*spots[0]):
            spots.pop(0)
        return spots[0] if spots else None

    def take(self, size: int) -> bool:
        fits = self.reserved + size <= self.limit
        self.reserved += size * fits
        return fits

    def add_segment(self, small: bool, size: int) -> tuple[list[Piece], int] | None:
        total = 2 * MIB if small else 20 * MIB
        if size >= 10 * MIB:
            total = -(-size // (2 * MIB)) * 2 * MIB
        if not self.take(total):
            return None
        self.pools[small].append([Piece(total, FREE)])
        return self.pools[small][-1], 0

    def map_pages(self, small: bool, size: int) -> tuple[list[Piece], int] | None:
        [segment], page = self.pools[small], 2 * MIB if small else 20 * MIB
        holes = [index for index, piece in enumerate(segment) if piece.state == UNMAPPED]
        starts = [hole - (hole > 0 and segment[hole - 1].state == FREE) for hole in holes]
        start = next(start for start in starts if room(segment[start:]) >= size)
        while (free := segment[start].size * (segment[start].state == FREE)) < size:
            hole = start + (free > 0)
            missing = min(size - free, segment[hole].size)
            mapped = -(-missing // page) * page
            if not self.take(mapped):
                return None
            rest = segment[hole].size - mapped
            segment[hole : hole + 1] = [Piece(mapped, FREE), Piece(rest, UNMAPPED)]
            tidy(segment)
        return segment, start

    def free(self, name: int) -> None:
        for segment in self.pools[True] + self.pools[False]:
            for piece in segment:
                if piece.state == name:
                    piece.state = FREE
            tidy(segment)

    def release(self) -> None:
        if self.expandable:
            for small, page in ((True, 2 * MIB), (False, 20 * MIB)):
                self.unmap_pages(self.pools[small][0], page)
            return
        for small, pool in self.pools.items():
            self.pools[small] = [one for one in pool if [piece.state for piece in one] != [FREE]]
        self.reserved = sum(size for run in self.segments() for size, _ in run)

    def unmap_pages(self, segment: list[Piece], page: int) -> None:
        ends = list(accumulate(piece.size for piece in segment))
        for index in reversed(range(len(segment))):
            piece, end = segment[index], ends[index]
            start = end - piece.size
            first, last = -(-start // page) * page, end // page * page
            if piece.state == FREE and first < last:
                self.reserved -= last - first
                segment[index : index + 1] = [
                    Piece(first - start, FREE),
                    Piece(last - first, UNMAPPED),
                    Piece(end - last, FREE),
                ]
        tidy(segment)

    def segments(self) -> list[list[tuple[int, bool]]]:
        runs: list[list[tuple[int, bool]]] = []
        for segment in self.pools[True] + self.pools[False]:
            runs.append([])
            for piece in segment:
                if piece.state == UNMAPPED:
                    runs.append([])
                else:
                    runs[-1].append((piece.size, piece.state != FREE))
        return [run for run in runs if run]


def reach(segment: list[Piece], index: int) -> int:
    """The bytes of a piece and of the unmapped ones behind it."""
    behind = segment[index + 1 : index + 2]
    return segment[index].size + sum(piece.size for piece in behind if piece.state == UNMAPPED)


def room(pieces: list[Piece]) -> int:
    return sum(piece.size for piece in takewhile(lambda piece: piece.state < 0, pieces))


def tidy(segment: list[Piece]) -> None:
    """Drop empty pieces, and join those next to each other that are alike."""
    joined: list[Piece] = []
    for piece in segment:
        if joined and piece.state < 0 and joined[-1].state == piece.state:
            joined[-1].size += piece.size
        elif piece.size:
            joined.append(piece)
    segment[:] = joined


class FirstFit(Plain):
    """A mistake, for the control: takes the first piece that holds a request."""

    def fit(self, pool: list[list[Piece]], size: int) -> tuple[list[Piece], int] | None:
        for segment in pool:
            for index, piece in enumerate(segment):
                if piece.state == FREE and piece.size >= size:
                    return segment, index
        return None


sizes = st.one_of(
    st.sampled_from([1, 512, MIB - 512, MIB, MIB + 1, 10 * MIB - 511, 10 * MIB, 19 * MIB]),
    st.integers(1, 2 * MIB),
    st.integers(1, 30).map(lambda count: count * MIB),
    st.integers(1, 45 * MIB),
)
limits = st.integers(10 * MIB, 160 * MIB)
expandables = st.booleans()


@st.composite
def streams(draw: st.DrawFn) -> list[AllocatorEvent]:
    """Events that could be a program's: what is freed is in use."""
    events: list[AllocatorEvent] = []
    live: list[int] = []
    for name, size in enumerate(draw(st.lists(sizes, max_size=40))):
        events.append((name, size))
        live.append(name)
        freed = min(draw(st.sampled_from([0, 0, 0, 1, 1, 2, 4])), len(live))
        events.extend((live.pop(draw(st.integers(0, len(live) - 1))), 0) for _ in range(freed))
    return events


def same_at_each_event(
    events: list[AllocatorEvent], plain: Plain, allocator: CachingAllocator
) -> None:
    """Fail at the first difference; what one of them could not allocate is never freed."""
    refused = set()
    for name, size in events:
        if size:
            given = plain.allocate(name, size)
            assert allocator.allocate(name, size) == given
            refused |= set() if given else {name}
        elif name not in refused:
            plain.free(name)
            allocator.free(name)
        assert allocator.segments() == plain.segments()
        assert allocator.reserved_bytes == plain.reserved


@drawn
@given(events=streams(), limit=limits, expandable=expandables)
def test_every_event_leaves_what_the_plain_version_leaves(
    events: list[AllocatorEvent], limit: int, expandable: bool
) -> None:
    plain = Plain(limit, expandable=expandable)
    same_at_each_event(events, plain, CachingAllocator(limit, expandable=expandable))


def test_the_comparison_can_fail() -> None:
    events = in_mib((1, 30), (2, 12), (1, 0), (2, 0), (3, 12))
    with pytest.raises(AssertionError):
        same_at_each_event(events, FirstFit(ENDLESS, expandable=False), CachingAllocator())


@drawn
@given(events=streams(), limit=limits, expandable=expandables)
def test_the_counts_are_those_of_the_living_blocks(
    events: list[AllocatorEvent], limit: int, expandable: bool
) -> None:
    allocator = CachingAllocator(limit, expandable=expandable)
    live: dict[int, int] = {}
    for name, size in events:
        if size == 0:
            allocator.free(name)
            del live[name]
        elif not allocator.allocate(name, size):
            break
        else:
            live[name] = -(-size // 512) * 512
        uncut = 0 if expandable else sum(block > MIB for block in live.values())
        asked = sum(live.values())
        assert asked <= allocator.allocated_bytes <= asked + uncut * MIB
        assert allocator.allocated_bytes <= allocator.reserved_bytes <= limit
        assert allocator.reserved_bytes % (2 * MIB) == 0
        assert allocator.reserved_bytes <= allocator.peak_reserved_bytes <= limit


@drawn
@given(events=streams(), expandable=expandables)
def test_when_all_is_freed_all_can_go_back(events: list[AllocatorEvent], expandable: bool) -> None:
    allocator = after(expandable=expandable)
    live = set()
    for name, size in events:
        if size:
            allocator.allocate(name, size)
            live.add(name)
        else:
            allocator.free(name)
            live.remove(name)
    for name in live:
        allocator.free(name)
    assert allocator.allocated_bytes == 0
    allocator.release_cached()
    assert allocator.reserved_bytes == 0
    assert allocator.segments() == []


@drawn
@given(events=streams(), expandable=expandables)
def test_what_was_reserved_without_a_limit_is_a_limit_that_changes_nothing(
    events: list[AllocatorEvent], expandable: bool
) -> None:
    free = replay(events, expandable=expandable)
    assert replay(events, limit_bytes=free.peak_reserved, expandable=expandable) == free


@drawn
@given(events=streams(), expandable=expandables)
def test_less_than_the_living_bytes_is_never_enough(
    events: list[AllocatorEvent], expandable: bool
) -> None:
    live: dict[int, int] = {}
    most = 0
    for name, size in events:
        live[name] = size
        most = max(most, sum(live.values()))
    result = replay(events, limit_bytes=max(most - 1, 0), expandable=expandable)
    assert result.fits == (most == 0)
    assert result.peak_allocated < max(most, 1)
