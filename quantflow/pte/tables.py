"""A flatbuffer reader that checks bounds and limits the number of reads, so that malicious offsets raise an error."""

from __future__ import annotations

import struct
from collections.abc import Iterator

# Vectors may point at one table many times, so a small file can describe a huge program. A valid program needs a tenth.
_MOST_READS_A_BYTE = 1


class CorruptError(ValueError):
    """An error for bytes that are not a well-formed flatbuffer."""


class Reader:
    """A reader of little-endian numbers from ``buffer``."""

    def __init__(self, buffer: bytes) -> None:
        self.buffer = buffer
        self.reads = 0

    def number(self, kind: str, position: int) -> int:
        """Return the number of the ``struct`` format ``kind`` at ``position``."""
        self.spend(1)
        if position < 0:
            raise CorruptError("an offset points before the file")
        try:
            return struct.unpack_from("<" + kind, self.buffer, position)[0]
        except struct.error:
            raise CorruptError("an offset points beyond the file") from None

    def spend(self, reads: int) -> None:
        """Add ``reads`` to the count, and raise if it exceeds the limit for a program of this size."""
        self.reads += reads
        if self.reads > _MOST_READS_A_BYTE * len(self.buffer):
            raise CorruptError("more tables than a program has")

    def root(self) -> Table:
        """Return the root table."""
        return Table(self, self.number("I", 0))


class Table:
    """One flatbuffer table, with fields given by their position in the schema."""

    def __init__(self, reader: Reader, position: int) -> None:
        self._reader, self._position = reader, position
        self._fields = position - reader.number("i", position)
        self._size = reader.number("H", self._fields)

    def _place(self, field: int) -> int | None:
        entry = 4 + 2 * field
        if entry + 2 > self._size:
            return None
        offset = self._reader.number("H", self._fields + entry)
        return self._position + offset if offset else None

    def number(self, field: int, kind: str, default: int = 0) -> int:
        """Return a number."""
        place = self._place(field)
        return default if place is None else self._reader.number(kind, place)

    def table(self, field: int) -> Table | None:
        """Return a table, or None if it is left out."""
        place = self._place(field)
        return None if place is None else Table(self._reader, place + self._reader.number("I", place))

    def text(self, field: int) -> str:
        """Return a string."""
        start, length = self._vector(field)
        if start + length > len(self._reader.buffer):
            raise CorruptError("a string extends beyond the file")
        self._reader.spend(length)  # many fields may point at one long string
        try:
            return self._reader.buffer[start : start + length].decode()
        except UnicodeDecodeError:
            raise CorruptError("a name is not valid UTF-8") from None

    def name(self, field: int) -> str:
        """Return a string without control characters, which is safe to print on a terminal."""
        text = self.text(field)
        if text and not text.isprintable():
            raise CorruptError("a name holds control characters")
        return text

    def numbers(self, field: int, kind: str) -> list[int]:
        """Return a vector of numbers."""
        start, length = self._vector(field)
        width = struct.calcsize(kind)
        if start + length * width > len(self._reader.buffer):
            raise CorruptError("a vector extends beyond the file")
        return [self._reader.number(kind, start + width * i) for i in range(length)]

    def tables(self, field: int) -> Iterator[Table]:
        """Yield the tables of a vector."""
        start, length = self._vector(field)
        for place in range(start, start + 4 * length, 4):
            yield Table(self._reader, place + self._reader.number("I", place))

    def _vector(self, field: int) -> tuple[int, int]:
        place = self._place(field)
        if place is None:
            return 0, 0
        start = place + self._reader.number("I", place)
        return start + 4, self._reader.number("I", start)
