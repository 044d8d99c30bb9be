"""What glibc's malloc holds for the tensors of a CPU run: more than they are, since it gives few freed pieces back.

Pieces above a threshold are mapped on their own and given back when freed. The threshold starts at 128 kB and rises to
the size of every mapped piece that is freed, up to 32 MB; so most tensors soon lie in one heap. There a piece takes the
smallest gap that fits or extends the end, neighbouring gaps become one, and the end is given back when twice the
threshold is free there (malloc(3), mallopt(3): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD).
"""

from __future__ import annotations

from bisect import bisect_left, insort

SMALLEST, LARGEST = 128 * 1024, 32 * 2**20  # of the threshold


class Malloc:
    """The heap of one process, pieces of which are known by their numbers.

    Attributes:
        held: bytes that the process has at the moment: mapped pieces, and the heap from end to end.
    """

    def __init__(self) -> None:
        self.threshold = SMALLEST
        self.held = self.end = 0
        self._pieces: dict[int, tuple[int, int]] = {}  # number -> (start or -1 for mapped, size)
        self._starts: dict[int, int] = {}  # gap's start -> size
        self._ends: dict[int, int] = {}  # gap's end -> start
        self._sizes: list[tuple[int, int]] = []  # (size, start) of gaps, sorted

    def allocate(self, number: int, size: int) -> None:
        """A piece."""
        if size >= self.threshold:
            self._pieces[number] = -1, size
            self.held += size
            return
        place = bisect_left(self._sizes, (size, 0))
        if place < len(self._sizes):
            room, start = self._sizes[place]
            self._remove(start, room)
            if room > size:
                self._insert(start + size, room - size)
        else:  # at the end, of whose gap it takes what there is
            start = self._ends.get(self.end, self.end)
            if start < self.end:
                self._remove(start, self.end - start)
            self.held += start + size - self.end
            self.end = start + size
        self._pieces[number] = start, size

    def free(self, number: int) -> None:
        """A piece goes."""
        start, size = self._pieces.pop(number)
        if start < 0:
            self.held -= size
            if SMALLEST < size <= LARGEST:
                self.threshold = max(self.threshold, size)
            return
        if start in self._ends:  # the gap before it
            before = self._ends[start]
            self._remove(before, start - before)
            start, size = before, size + start - before
        if start + size in self._starts:  # the gap behind it
            behind = self._starts[start + size]
            self._remove(start + size, behind)
            size += behind
        if start + size == self.end and size > 2 * self.threshold:
            self.end = start
            self.held -= size
        else:
            self._insert(start, size)

    def _insert(self, start: int, size: int) -> None:
        self._starts[start], self._ends[start + size] = size, start
        insort(self._sizes, (size, start))

    def _remove(self, start: int, size: int) -> None:
        del self._starts[start], self._ends[start + size]
        del self._sizes[bisect_left(self._sizes, (size, start))]
