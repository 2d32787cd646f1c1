"""The ``particles`` library's side of filter_step.py: runs in an environment of its own, with numpy below 2.

Reads lines ``n d steps`` and answers each with the seconds, on the clock and of the processor, that a bootstrap filter
took, or ``memory n d steps`` with the bytes that its peak lay above the start. The model is written as a Feynman-Kac
model in plain numpy, which spares the library its own distributions.
"""

from __future__ import annotations

import os
import resource
import sys
import time

import numpy as np
import particles


class LinearGaussian(particles.FeynmanKac):
    """x_0 ~ N(0, I), x_i = 0.9 x_{i-1} + N(0, 0.25 I), y_i = x_i + N(0, I) = 0.1 in every entry."""

    def __init__(self, d: int, steps: int) -> None:
        super().__init__(steps + 1)
        self.d = d

    def M0(self, N: int) -> np.ndarray:
        return np.random.standard_normal((N, self.d))

    def M(self, t: int, xp: np.ndarray) -> np.ndarray:
        return 0.9 * xp + 0.5 * np.random.standard_normal(xp.shape)

    def logG(self, t: int, xp: np.ndarray | None, x: np.ndarray) -> np.ndarray:
        return -0.5 * ((x - 0.1) ** 2).sum(-1) - 0.5 * self.d * np.log(2 * np.pi)


def run(n: int, d: int, steps: int) -> str:
    filter = particles.SMC(fk=LinearGaussian(d, steps), N=n, resampling="systematic", ESSrmin=1.0, store_history=False)
    start, busy = time.perf_counter(), time.process_time()
    filter.run()
    return f"{time.perf_counter() - start} {time.process_time() - busy}"


def memory(n: int, d: int, steps: int) -> int:
    """Peak of a forked child above its start, in bytes."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run(n, d, steps)
        os.write(writing, str(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as file:
        return int(file.read())


if __name__ == "__main__":
    for line in sys.stdin:
        *word, n, d, steps = line.split()
        print((memory if word else run)(int(n), int(d), int(steps)), flush=True)
