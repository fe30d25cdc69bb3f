"""What both halves of a layer compute: the norm of a row, and a product with a bias, in pieces for several threads."""

import math

import numpy as np
from numba import njit

from workbench.kernels.cpu.loops import dense_chunk
from workbench.kernels.cpu.row_loops import add_bias, normalize, set_float, sum_of_squares
from workbench.kernels.cpu.vectors import LANES

DENSE_CHUNK = 32  # outputs of a piece

inline = njit(nogil=True)


@inline
def ceil_divide(a, b):
    """Return a / b, rounded up."""
    return (a + b - 1) // b


@inline
def normalize_row(x, weight, width, eps, scale, result):
    """RMSNorm of a row, and its scale."""
    square = sum_of_squares(x, width // LANES) / np.float32(width)
    root = np.float32(math.sqrt(square + eps))
    set_float(scale, root)
    if result:
        normalize((x, weight), root, width // LANES, result)


@inline
def dense_piece(piece, matrix, bias, outputs, width, inputs, rows, results):
    """`DENSE_CHUNK` outputs of a product with a bias, rounded."""
    start = piece * DENSE_CHUNK
    stop = min(start + DENSE_CHUNK, outputs)
    dense_chunk(start, stop, matrix, outputs, width // 32, inputs, rows, results)
    for row in range(rows):
        at = results + 4 * (row * outputs + start)
        add_bias((at, bias + 2 * start), np.float32(0), (stop - start) // LANES, at)
