"""PyTorch's CUDA caching allocator as rules over integers: reserved bytes, and out of memory.

The rules are those of ``c10/cuda/CUDACachingAllocator.cpp`` for one device and one stream, with
every option but ``expandable_segments`` at its default. The source was read at commits eb42ad6 and
001074d of pytorch/pytorch and in a later version, which agree. The constants and the defaults are
those of ``c10/core/AllocatorConfig.h`` in torch 2.13.0. Each rule names the function that it
follows.

The model assumes that these are not used: ``max_split_size_mb``, ``roundup_power2_divisions``,
``garbage_collection_threshold``, ``large_segment_size_mb``, CUDA graphs, memory pools and
``record_stream``. It assumes that the driver returns rising addresses, which decide only between
free blocks of equal size, and that the driver fails exactly when its bytes are used up. In this
model an expandable segment has endless addresses; in torch it has 9/8 of the GPU's memory.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

AllocatorEvent = tuple[int, int]
"""``(name, bytes)``: a positive number of bytes is allocated under the name; 0 frees the name."""

_MIB: Final = 2**20
_UNIT: Final = 512  # kMinBlockSize: every block is a multiple of it.
_SMALL: Final = _MIB  # kSmallSize: the largest block of the small pool.
_SMALL_SEGMENT: Final = 2 * _MIB  # kSmallBuffer: a segment, or a page, of the small pool.
_LARGE_SEGMENT: Final = 20 * _MIB  # kLargeBuffer, large_segment_size(): the same of the large pool.
_OWN_SEGMENT: Final = 10 * _MIB  # kMinLargeAlloc: a request of this size gets its own segment.
_STEP: Final = 2 * _MIB  # kRoundLarge: such a segment is a multiple of it.
_ENDLESS: Final = 2**40  # The number of pages in an expandable segment.


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def block_bytes(requested: int) -> int:
    """Return the bytes of a block for ``requested`` bytes (``round_size``): a multiple of 512."""
    return _rounded(requested, _UNIT)


def segment_bytes(block: int) -> int:
    """Return the bytes of the segment that a block of this size needs (``get_allocation_size``)."""
    if block <= _SMALL:
        return _SMALL_SEGMENT
    if block < _OWN_SEGMENT:
        return _LARGE_SEGMENT
    return _rounded(block, _STEP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The result of a replay of events. All sizes are bytes.

    Attributes:
        peak_allocated: The peak of the bytes in used blocks, as
            ``torch.cuda.max_memory_allocated``.
        peak_reserved: The peak of the bytes that the allocator has from the driver, as
            ``torch.cuda.max_memory_reserved``. The events may need less: under a limit the
            allocator releases its cache before an allocation fails.
        failed_at: The index of the event that ran out of memory and ended the replay, or None.
        peak_at: The index of the event that first reached ``peak_allocated``; None if no event
            allocates.
    """

    peak_allocated: int
    peak_reserved: int
    failed_at: int | None
    peak_at: int | None

    @property
    def fits(self) -> bool:
        """Whether no event ran out of memory."""
        return self.failed_at is None


def replay(
    events: Iterable[AllocatorEvent], *, limit_bytes: int | None = None, expandable: bool = False
) -> Replay:
    """Replay events through the allocator, up to the first that runs out of memory.

    Args:
        events: The events in order. A tensor without bytes takes no block and has no events.
        limit_bytes: The most bytes that the driver gives the allocator, not counting the CUDA
            context and the memory of libraries; None for no limit. A larger limit is not always
            better: events that fit may fragment memory and fail under a slightly larger limit.
        expandable: Whether the allocator has ``expandable_segments:True``.

    Raises:
        ValueError: If an event allocates a name that is in use, frees a name that is not, or has a
            negative number of bytes.

    Example:
        >>> replay([(1, 2**20), (2, 2**20), (1, 0)]).peak_allocated
        2097152
    """
    allocator = CachingAllocator(limit_bytes, expandable=expandable)
    peak, peak_at, failed_at = 0, None, None
    for index, (name, size) in enumerate(events):
        if size == 0:
            allocator.free(name)
        elif not allocator.allocate(name, size):
            failed_at = index
            break
        elif allocator.allocated_bytes > peak:
            peak, peak_at = allocator.allocated_bytes, index
    return Replay(
        peak_allocated=peak,
        peak_reserved=allocator.peak_reserved_bytes,
        failed_at=failed_at,
        peak_at=peak_at,
    )


class CachingAllocator:
    """The state of one GPU's allocator, event by event.

    Args:
        limit_bytes: The most bytes that the driver gives; None for no limit. With plain segments
            ``torch.cuda.set_per_process_memory_fraction`` sets the same limit. With expandable
            segments its limit differs a little: before torch maps missing pages it compares a whole
            new segment with the fraction. Torch therefore fails up to one request earlier than the
            driver, or maps up to one page more than the fraction.
        expandable: Whether segments are expandable.

    Attributes:
        allocated_bytes: The bytes in used blocks now.
    """

    def __init__(self, limit_bytes: int | None = None, *, expandable: bool = False) -> None:
        self.allocated_bytes = 0
        self._driver = _DriverMemory(limit_bytes)
        pool = _ExpandableSegmentPool if expandable else _SegmentPool
        self._small = pool(self._driver, small=True)
        self._large = pool(self._driver, small=False)
        self._live: dict[int, _Block] = {}

    @property
    def reserved_bytes(self) -> int:
        """The bytes that the allocator has from the driver now."""
        return self._driver.reserved_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        """The most bytes that the allocator has had from the driver."""
        return self._driver.peak_bytes

    def allocate(self, name: int, requested: int) -> bool:
        """Allocate a block for ``name``, and return whether memory sufficed (``malloc``).

        The allocator looks for a cached block, and then asks the driver for a segment. If the
        driver fails, the allocator returns all free segments to the driver and asks again.

        Args:
            name: A number that is not in use.
            requested: The bytes of the tensor, at least 1.

        Raises:
            ValueError: If the name is in use, or ``requested`` is below 1.
        """
        if requested < 1 or name in self._live:
            raise ValueError(f"cannot allocate {requested} bytes as {name}: below 1, or in use")
        size = -(-requested // _UNIT) * _UNIT  # block_bytes, inlined for speed.
        pool = self._small if size <= _SMALL else self._large
        block = pool.best_fit(size) or pool.grow(size)
        if block is None:
            self.release_cached()
            block = pool.grow(size)
            if block is None:
                return False
        pool.trim(block, size)
        self._live[name] = block
        self.allocated_bytes += block.size
        return True

    def free(self, name: int) -> None:
        """Put the block of ``name`` back into the cache (``free_block``).

        Raises:
            ValueError: If the name is not in use.
        """
        block = self._live.pop(name, None)
        if block is None:
            raise ValueError(f"cannot free {name}: it is not allocated")
        self.allocated_bytes -= block.size
        (self._small if block.size <= _SMALL else self._large).put_back(block)

    def release_cached(self) -> None:
        """Return all segments without a used block to the driver (``release_cached_blocks``)."""
        self._large.release()
        self._small.release()

    def segments(self) -> list[list[tuple[int, bool]]]:
        """Return each segment's blocks by address, as ``(bytes, in use)``; small segments first.

        Each run of mapped pages of an expandable segment counts as a segment, as in
        ``torch.cuda.memory_snapshot``.
        """
        return [*self._small.segments(), *self._large.segments()]


class _DriverMemory:
    """The GPU's memory: a number of bytes, in pieces of any size."""

    def __init__(self, limit_bytes: int | None) -> None:
        self.reserved_bytes = self.peak_bytes = 0
        self._limit_bytes = limit_bytes

    def take(self, size: int) -> bool:
        reserved = self.reserved_bytes + size
        if self._limit_bytes is not None and reserved > self._limit_bytes:
            return False
        self.reserved_bytes = reserved
        self.peak_bytes = max(self.peak_bytes, reserved)
        return True

    def give_back(self, size: int) -> None:
        self.reserved_bytes -= size


@dataclass(slots=True, eq=False)
class _Block:
    """A part of a segment, between two neighbours. Only a free block can be unmapped."""

    address: int
    size: int
    before: "_Block | None" = None
    after: "_Block | None" = None
    free: bool = True
    mapped: bool = True

    def cut(self, size: int) -> "_Block":
        """Reduce this block to its first ``size`` bytes, and return the rest as a block."""
        rest = _Block(self.address + size, self.size - size, self, self.after)
        if self.after is not None:
            self.after.before = rest
        self.after = rest
        self.size = size
        return rest

    def absorb(self, after: "_Block") -> None:
        """Add the bytes of the next block, which ends to exist."""
        self.size += after.size
        self.after = after.after
        if after.after is not None:
            after.after.before = self


class _SegmentPool:
    """A pool with plain segments: one ``cudaMalloc`` returned each, and a segment never grows."""

    def __init__(self, driver: _DriverMemory, *, small: bool) -> None:
        self._driver = driver
        # should_split: a smaller rest is not cut off.
        self._least_rest = _UNIT if small else _SMALL + 1
        self._cached: list[tuple[int, int, _Block]] = []  # Sorted by size, then address.
        self._heads: dict[int, _Block] = {}  # The first block of each segment, by address.
        self._next_address = 0

    def best_fit(self, size: int) -> _Block | None:
        """Remove the smallest cached block of at least ``size`` bytes (``get_free_block``)."""
        cached = self._cached
        position = bisect_left(cached, (size,))
        return cached.pop(position)[2] if position < len(cached) else None

    def grow(self, size: int) -> _Block | None:
        """Return a new segment, or None if the driver has too few bytes (``alloc_block``)."""
        total = segment_bytes(size)
        if not self._driver.take(total):
            return None
        block = self._heads[self._next_address] = _Block(self._next_address, total)
        self._next_address += total
        return block

    def trim(self, block: _Block, size: int) -> None:
        """Mark the block as used, and cache its rest if it is large enough (``should_split``)."""
        block.free = False
        if block.size - size >= self._least_rest:
            self._cache(block.cut(size))

    def put_back(self, block: _Block) -> None:
        """Merge a block with its free neighbours, and cache it (``free_block``)."""
        block.free = True
        self._cache(self._merged(block))

    def release(self) -> None:
        """Return each segment without a used block to the driver (``release_blocks``)."""
        for _, address, block in tuple(self._cached):
            if block.before is None and block.after is None:
                self._forget(block)
                del self._heads[address]
                self._driver.give_back(block.size)

    def segments(self) -> list[list[tuple[int, bool]]]:
        """Return each run of mapped blocks, by address."""
        runs: list[list[tuple[int, bool]]] = []
        for head in self._heads.values():
            runs.append([])
            block: _Block | None = head
            while block is not None:
                if block.mapped:
                    runs[-1].append((block.size, not block.free))
                elif runs[-1]:
                    runs.append([])
                block = block.after
        return [run for run in runs if run]

    def _merged(self, block: _Block) -> _Block:
        """Merge a block, which is in no list, with its free neighbours (``try_merge_blocks``)."""
        after, before = block.after, block.before
        if after is not None and after.free and after.mapped == block.mapped:
            self._forget(after)
            block.absorb(after)
        if before is not None and before.free and before.mapped == block.mapped:
            self._forget(before)
            before.absorb(block)
            return before
        return block

    def _cache(self, block: _Block) -> None:
        insort(self._cached, (block.size, block.address, block))

    def _forget(self, block: _Block) -> None:
        del self._cached[bisect_left(self._cached, (block.size, block.address))]


class _ExpandableSegmentPool(_SegmentPool):
    """A pool with ``expandable_segments:True``: one segment, which grows page by page.

    A page has 2 MiB in the small pool and 20 MiB in the large one. An unmapped block without end
    follows the last mapped page. Other unmapped blocks are the holes of pages that were returned.
    """

    def __init__(self, driver: _DriverMemory, *, small: bool) -> None:
        super().__init__(driver, small=small)
        self._least_rest = _UNIT
        self._page = _SMALL_SEGMENT if small else _LARGE_SEGMENT
        end = self._heads[0] = _Block(0, self._page * _ENDLESS, mapped=False)
        self._unmapped: list[tuple[int, _Block]] = [(0, end)]  # Sorted by address.

    def best_fit(self, size: int) -> _Block | None:
        """Remove the cached block of at least ``size`` bytes that can grow the least.

        The unmapped pages after a block count as part of it, so that the end of the segment is used
        last (``get_free_block``).
        """
        cached = self._cached
        position = bisect_left(cached, (size,))
        if position == len(cached):
            return None
        reach = _reach(cached[position][2])
        while position + 1 < len(cached) and (further := _reach(cached[position + 1][2])) < reach:
            position, reach = position + 1, further
        return cached.pop(position)[2]

    def grow(self, size: int) -> _Block | None:
        """Map pages at the lowest address where free and new pages make ``size`` bytes.

        If the driver runs out, the pages that were mapped until then stay mapped
        (``try_allocate_expandable_block``).
        """
        block = self._lowest_room(size)
        if not block.mapped and not self._map(block, min(size, block.size)):
            return None
        while block.size < size:
            hole = block.after
            assert hole is not None, "the end of the segment is unmapped"
            if not self._map(hole, min(size - block.size, hole.size)):
                return None
        self._forget(block)
        return block

    def release(self) -> None:
        """Unmap each page without a used block (``unmap_block``)."""
        for _, _, block in tuple(self._cached):
            self._unmap(block)

    def _lowest_room(self, size: int) -> _Block:
        """Return the first of neighbouring free blocks that suffice (``find_expandable_block``)."""
        for _, hole in self._unmapped:
            start = hole.before if hole.before is not None and hole.before.free else hole
            block: _Block | None = start
            room = 0
            while room < size and block is not None and block.free:
                room += block.size
                block = block.after
            if room >= size:
                return start
        raise AssertionError("the end of the segment has room for anything")

    def _map(self, block: _Block, size: int) -> bool:
        """Map the first ``size`` bytes, and return whether memory sufficed (``map_block``)."""
        size = _rounded(size, self._page)
        if not self._driver.take(size):
            return False
        self._forget(block)
        if size < block.size:
            rest = block.cut(size)
            rest.mapped = False
            self._cache(rest)
        block.mapped = True
        self._cache(self._merged(block))
        return True

    def _unmap(self, block: _Block) -> None:
        start = _rounded(block.address, self._page)
        end = (block.address + block.size) // self._page * self._page
        if start >= end:
            return
        self._forget(block)
        if start > block.address:
            front, block = block, block.cut(start - block.address)
            self._cache(front)
        if end < block.address + block.size:
            self._cache(block.cut(end - block.address))
        block.mapped = False
        self._cache(self._merged(block))
        self._driver.give_back(end - start)

    def _cache(self, block: _Block) -> None:
        if block.mapped:
            super()._cache(block)
        else:
            insort(self._unmapped, (block.address, block))

    def _forget(self, block: _Block) -> None:
        if block.mapped:
            super()._forget(block)
        else:
            del self._unmapped[bisect_left(self._unmapped, (block.address,))]


def _reach(block: _Block) -> int:
    """Return the bytes of a block and of the unmapped pages right after it."""
    after = block.after
    return block.size + (after.size if after is not None and not after.mapped else 0)
