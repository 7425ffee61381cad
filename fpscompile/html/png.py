"""A grey-level picture as a PNG data URI in one colour: level 0 is transparent, 255 is opaque."""

from __future__ import annotations

import base64
import struct
import zlib

import torch


def data_uri(levels: torch.Tensor, colour: str) -> str:
    """``levels`` as a palette PNG whose colour is constant and whose opacity is the level.

    Transparency instead of white lets the same picture sit on a light and on a dark page.

    Args:
        levels: uint8 [rows, columns].
        colour: "#rrggbb".
    """
    present, index = torch.unique(levels, return_inverse=True)
    rows, columns = levels.shape
    rgb = bytes.fromhex(colour[1:])
    filtered = torch.zeros(rows, columns + 1, dtype=torch.uint8)  # each row opens with filter type 0: none
    filtered[:, 1:] = index.to(torch.uint8)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),  # 8-bit palette, no interlace
        (b"PLTE", rgb * len(present)),
        (b"tRNS", bytes(present.tolist())),
        (b"IDAT", zlib.compress(bytes(filtered.flatten().tolist()), 9)),
        (b"IEND", b""),
    ]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
