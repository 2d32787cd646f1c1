"""What every test starts from: one thread, and random states of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_random_state() -> Iterator[None]:
    """Seed torch's global generator for the test and give it back as it was; Pyro's parameters start empty.

    The library draws from generators of its own, so a test must not depend on this one; where Pyro's ``sample`` draws
    from it, the test is the same whatever ran before.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        pyro.clear_param_store()
        yield
