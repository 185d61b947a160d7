"""How many blocks of an FPGA's memory hold words of some width and depth."""

from math import ceil

MEMORIES = (
    ("uram", 72, 4096), ("uram", 36, 8192), ("uram", 18, 16384), ("uram", 9, 32768),
    ("bram_18k", 36, 512), ("bram_18k", 18, 1024), ("bram_18k", 9, 2048), ("lut", 1, 64),
)  # fmt: skip
"""What FINN's estimate of threshold memories chooses from: resource, width, depth."""


def bram_18k(width: int, depth: int, *, streamed: bool = True) -> int:
    """Return the 18-kilobit blocks that hold ``depth`` words of ``width`` bits.

    Args:
        width: in bits.
        depth: in words.
        streamed: whether the memory is FINN's own streamer, which uses the parity bits of a block
            (9, 18 and 36 wide), or one that HLS makes (8, 16 and 32 wide).

    Source: Blott et al., "FINN-R", TRETS 2018, section 5; AMD UG573, simple dual-port RAMB18.
    """
    nine, eighteen, thirty_six = (9, 18, 36) if streamed else (8, 16, 32)
    if width <= 2:
        return ceil(depth / (16384 // width))
    if width <= 4:
        return ceil(depth / 4096)
    if width <= 9:
        return ceil(depth / 2048) * ceil(width / nine)
    if width <= 18 or depth > 512:
        return ceil(depth / 1024) * ceil(width / eighteen)
    return ceil(depth / 512) * ceil(width / thirty_six)


def least_waste(width: int, depth: int, *, uram: bool = True) -> tuple[str, int]:
    """Return the kind of memory that leaves fewest bits unused, and how many pieces of it.

    Args:
        width: in bits.
        depth: in words.
        uram: whether the chip has such blocks.

    >>> least_waste(14, 16), least_waste(9, 2048)
    (('lut', 14), ('bram_18k', 1))
    """

    def pieces(memory: tuple[str, int, int]) -> int:
        return ceil(width / memory[1]) * ceil(depth / memory[2])

    known = [memory for memory in MEMORIES if uram or memory[0] != "uram"]
    # of equal waste, the first
    best = min(known, key=lambda memory: pieces(memory) * memory[1] * memory[2])
    return best[0], pieces(best)
