"""Genealogies, against one worked out by hand and one by plain loops."""

import pytest
import torch

from smcdiff.smc import ParticleFilter, Records
from smcdiff.smc.genealogy import coalescence_step, follow, paths, roots, surviving_roots
from tests.smc.models import Bootstrap, LinearGaussian

# Two chains of three particles, three moves. Chain 0: 0 1 2 <- 0 0 2 <- 1 2 2 <- 0 0 0.
BY_HAND = torch.tensor([[[0, 0, 2], [2, 0, 1]], [[1, 2, 2], [0, 1, 2]], [[0, 0, 0], [1, 2, 0]]])


def test_by_hand() -> None:
    assert roots(BY_HAND)[:, 0].tolist() == [[0, 1, 2], [0, 0, 2], [0, 2, 2], [0, 0, 0]]
    assert roots(BY_HAND)[:, 1].tolist() == [[0, 1, 2], [2, 0, 1], [2, 0, 1], [0, 1, 2]]
    assert surviving_roots(BY_HAND).tolist() == [[3, 3], [2, 3], [2, 3], [1, 3]]
    assert paths(BY_HAND)[:, 0].tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 2]]
    assert paths(BY_HAND)[:, 1].tolist() == [[0, 1, 2], [1, 2, 0], [1, 2, 0], [0, 1, 2]]
    assert coalescence_step(BY_HAND).tolist() == [2, -1]


def test_one_particle_has_always_coalesced() -> None:
    assert coalescence_step(torch.zeros((4, 2, 1), dtype=torch.int64)).tolist() == [4, 4]


def test_against_loops() -> None:
    K, b, n = 6, 3, 5
    g = torch.Generator().manual_seed(1)
    ancestors = torch.randint(n, (K, b, n), generator=g)
    values = torch.randn((K + 1, b, n, 2), generator=g)
    lines = paths(ancestors)
    followed = follow(values, lines)
    for c in range(b):
        for j in range(n):
            at, line = j, [j]
            for i in range(K, 0, -1):
                at = int(ancestors[i - 1, c, at])
                line.append(at)
            assert lines[:, c, j].tolist() == line[::-1]
            assert roots(ancestors)[K, c, j] == line[-1]
            for i in range(K + 1):
                assert torch.equal(followed[i, c, j], values[i, c, line[K - i]])
        meets = [i for i in range(K + 1) if len(set(lines[i, c].tolist())) == 1]
        assert coalescence_step(ancestors)[c] == max(meets, default=-1)
        assert surviving_roots(ancestors)[:, c].tolist() == [
            len(set(roots(ancestors)[i, c].tolist())) for i in range(K + 1)
        ]


@pytest.mark.parametrize("ancestors", [False, True])
@pytest.mark.parametrize("log_weights", [False, True])
def test_a_history_takes_the_bytes_that_its_module_states(ancestors: bool, log_weights: bool) -> None:
    b, n, K = 3, 50, 7
    model = Bootstrap(LinearGaussian.example(2, num_steps=K))
    kept = Records(ancestors=ancestors, log_weights=log_weights)
    history = ParticleFilter().run(model, num_particles=n, num_chains=b, seed=0, records=kept).records
    found = (history.ess, history.log_z, history.resampled, history.ancestors, history.log_w)
    stated = 16 * b * (K + 1) + b * K + 8 * b * n * K * ancestors + 8 * b * n * (K + 1) * log_weights
    assert sum(part.nbytes for part in found if part is not None) == stated
    assert not history.summaries
