"""Reading flatbuffer tables within bounds and within a budget, so that hostile offsets end in an error, not in a crash."""

from __future__ import annotations

import struct
from collections.abc import Iterator

# Vectors may point at one table many times: a small file can describe a huge program. A whole one takes a tenth of this.
_MOST_READS_A_BYTE = 1


class CorruptError(ValueError):
    """The bytes are no well-formed flatbuffer."""


class Reader:
    """Numbers out of ``buffer``, little-endian."""

    def __init__(self, buffer: bytes) -> None:
        self.buffer = buffer
        self.reads = 0

    def number(self, kind: str, position: int) -> int:
        """The number of the ``struct`` kind at ``position``."""
        self.spend(1)
        if position < 0:
            raise CorruptError("an offset points before the file")
        try:
            return struct.unpack_from("<" + kind, self.buffer, position)[0]
        except struct.error:
            raise CorruptError("an offset points behind the end") from None

    def spend(self, reads: int) -> None:
        """Count ``reads`` towards the most that a program takes."""
        self.reads += reads
        if self.reads > _MOST_READS_A_BYTE * len(self.buffer):
            raise CorruptError("more tables than a program has")

    def root(self) -> Table:
        """The root table."""
        return Table(self, self.number("I", 0))


class Table:
    """One flatbuffer table; fields by their place in the schema."""

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
        """A number."""
        place = self._place(field)
        return default if place is None else self._reader.number(kind, place)

    def table(self, field: int) -> Table | None:
        """A table, None where it is left out."""
        place = self._place(field)
        return None if place is None else Table(self._reader, place + self._reader.number("I", place))

    def text(self, field: int) -> str:
        """A string."""
        start, length = self._vector(field)
        if start + length > len(self._reader.buffer):
            raise CorruptError("a string runs over the end")
        self._reader.spend(length)  # many fields may point at one long string
        try:
            return self._reader.buffer[start : start + length].decode()
        except UnicodeDecodeError:
            raise CorruptError("a name is no text") from None

    def name(self, field: int) -> str:
        """A string to show to people: it writes nothing else on their terminal."""
        text = self.text(field)
        if text and not text.isprintable():
            raise CorruptError("a name holds control characters")
        return text

    def numbers(self, field: int, kind: str) -> list[int]:
        """A vector of numbers."""
        start, length = self._vector(field)
        width = struct.calcsize(kind)
        if start + length * width > len(self._reader.buffer):
            raise CorruptError("a vector runs over the end")
        return [self._reader.number(kind, start + width * i) for i in range(length)]

    def tables(self, field: int) -> Iterator[Table]:
        """A vector of tables."""
        start, length = self._vector(field)
        for place in range(start, start + 4 * length, 4):
            yield Table(self._reader, place + self._reader.number("I", place))

    def _vector(self, field: int) -> tuple[int, int]:
        place = self._place(field)
        if place is None:
            return 0, 0
        start = place + self._reader.number("I", place)
        return start + 4, self._reader.number("I", start)
