"""How far LayerNorm's variance is off for adversarial rows, in the kernels' order of sums, in one step and in two: a laboratory tool, without a GPU.

    python3 lab/one_step_variance.py > lab/results/one_step_variance.txt

A thread adds its elements and their squares in turn, a fused multiply-add each; a warp's sums are added in a butterfly, then the warps in order.
Half of every thread's elements are a, the others b, a little below 0: the mean is as large as the deviation, or nearly, which is the most that takes one step,
and a thread's sum grows without any of its roundings at random. Prints the largest |variance - float64's| over float64's, of one step and of centred sums.
"""

from __future__ import annotations

import numpy as np

ROWS = 4000
SHAPES = ((256, 4), (256, 8), (224, 12), (256, 16), (256, 20), (160, 8))  # threads, elements of each


def folded(of_thread: np.ndarray) -> np.ndarray:
    """The sum over threads of [rows, threads] in float32: lanes by a butterfly, then warps in order."""
    lanes = of_thread.reshape(len(of_thread), -1, 32)
    for mask in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[:, :, np.arange(32) ^ mask]
    total = lanes[:, 0, 0]
    for warp in range(1, lanes.shape[1]):
        total = total + lanes[:, warp, 0]
    return total


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """In float32, as far as float64 holds the product, which it does, and the sum, which it nearly does."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def mean_and_variance(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of [rows, threads, elements] float32, from sums and sums of squares."""
    sums = np.zeros(rows.shape[:2], np.float32)
    squares = np.zeros_like(sums)
    for k in range(rows.shape[2]):
        sums = sums + rows[:, :, k]
        squares = fma(rows[:, :, k], rows[:, :, k], squares)
    inverse = np.float32(1) / np.float32(rows.shape[1] * rows.shape[2])
    mean = folded(sums) * inverse
    return mean, fma(-mean, mean, folded(squares) * inverse)


def main() -> None:
    random = np.random.default_rng(0)
    print("threads  elements  rows in one step  one step  centred")
    for threads, elements in SHAPES:
        a = random.uniform(1, 2, (ROWS, 1, 1)).astype(np.float32)
        b = random.uniform(-0.2, 0, (ROWS, 1, 1)).astype(np.float32)
        rows = np.where(np.arange(threads * elements).reshape(threads, -1) % elements < elements // 2, a, b)
        true = rows.astype(np.float64).var(axis=(1, 2))
        mean, once = mean_and_variance(rows)
        _, centred = mean_and_variance(rows - mean[:, None, None])
        taken = mean * mean <= once
        off = [(np.abs(variance - true) / true)[taken].max() for variance in (once, centred)]
        print(f"{threads:7}  {elements:8}  {taken.sum():16}  {off[0]:8.1e}  {off[1]:7.1e}")


if __name__ == "__main__":
    main()
