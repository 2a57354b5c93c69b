"""The header of a ``.pte``, which identifies the file type and gives the length of the file."""

from __future__ import annotations

import struct
from typing import NamedTuple

from quantflow.errors import QuantflowError

# A flatbuffer begins with the offset of its root and an identifier. executorch's extended header follows.
_IDENTIFIER = b"ET"
_EXTENDED = b"eh00"
_SHORTEST, _WITH_SEGMENT_SIZE = 24, 32
_REMEDY = "the file may be cut short, or made by another version of executorch: lower it again"


class Header(NamedTuple):
    """The size of the flatbuffer, and the offset and size of the data segments, in bytes (0 without data segments)."""

    program_size: int
    segment_base: int
    segment_size: int


def check_header(buffer: bytes) -> Header:
    """Return the header of ``buffer``, the bytes of a ``.pte``.

    Raises:
        QuantflowError: at stage ``"runtime"``, for bytes that are not a complete ExecuTorch program.
    """
    size = len(buffer)
    if size < 8 or buffer[4:6] != _IDENTIFIER:
        what = _what_else(buffer)
        reason = "not an ExecuTorch program" + (f" but {what}" if what else "")
        raise QuantflowError("runtime", reason, remedy="pass the bytes or path of a .pte file")
    header = Header(size, 0, 0)
    if buffer[8:12] == _EXTENDED:
        if size < 8 + _SHORTEST:
            raise _cut_short(8 + _SHORTEST, size)
        length, program_size, base = struct.unpack_from("<IQQ", buffer, 12)
        segments = 0
        if length >= _WITH_SEGMENT_SIZE:
            if size < 8 + _WITH_SEGMENT_SIZE:
                raise _cut_short(8 + _WITH_SEGMENT_SIZE, size)
            (segments,) = struct.unpack_from("<Q", buffer, 8 + _SHORTEST)
        header = Header(program_size, base, segments)
        if base and base < program_size:
            raise QuantflowError("runtime", "the program and its data segments overlap", remedy=_REMEDY)
    needed = max(header.program_size, header.segment_base + header.segment_size)
    if needed > size:
        raise _cut_short(needed, size)
    (root,) = struct.unpack_from("<I", buffer)
    if not 8 <= root <= header.program_size - 4:
        raise QuantflowError("runtime", "the root table is outside the program", remedy=_REMEDY)
    return header


def _cut_short(needed: int, size: int) -> QuantflowError:
    return QuantflowError(
        "runtime", f"the program does not load: {size:,} bytes, but it needs {needed:,}", remedy=_REMEDY
    )


def _what_else(buffer: bytes) -> str:
    """The type of a file that is no ``.pte``; ``""`` if the type is unknown."""
    starts = {
        b"": "empty" if not buffer else "",
        b"PK\x03\x04": "a zip archive, as torch.save and torch.export.save write",
        b"\x80\x02": "a Python pickle, which is not opened",
        b"\x80\x03": "a Python pickle, which is not opened",
        b"\x80\x04": "a Python pickle, which is not opened",
        b"\x80\x05": "a Python pickle, which is not opened",
        b"version https://git-lfs": "a git-lfs pointer: fetch the file itself",
    }
    return next((what for start, what in starts.items() if what and buffer.startswith(start)), "")
