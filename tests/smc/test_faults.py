"""What a filter says when something goes wrong: at the step it happened, which chains, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from smcdiff.smc import FilterError, FilterState, Move, ParticleFilter, Particles, Records, check
from smcdiff.smc.faults import all_zero
from tests.smc.models import CPU

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Scripted:
    """Random weights, changed by a function of the step's log_g, and faults by step."""

    change: dict[int, Change] = field(default_factory=dict)
    faults: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    num_steps: int = 6
    device: torch.device = CPU

    def initial(self, num_chains: int, num_particles: int, generator: torch.Generator) -> Move:
        return self._move(0, torch.zeros((num_chains, num_particles)), generator)

    def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
        return self._move(i, particles["x"], generator)

    def _move(self, i: int, x: Tensor, generator: torch.Generator) -> Move:
        log_g = torch.randn(x.shape, generator=generator)
        return Move({"x": x}, self.change.get(i, lambda v: v)(log_g), self.faults.get(i, {}))


class InItsOwnWords(Scripted):
    def describe(self, i: int) -> str:
        return f"k = {self.num_steps - i}"


def put(value: float, chains: list[int], particles: int | slice = slice(None)) -> Change:
    def change(log_g: Tensor) -> Tensor:
        log_g = log_g.clone()
        for c in chains:
            log_g[c, particles] = value
        return log_g

    return change


def message(model: Scripted, **kwargs: object) -> str:
    with pytest.raises(FilterError) as caught:
        ParticleFilter().run(model, num_particles=4, num_chains=5, **kwargs)
    assert isinstance(caught.value, ArithmeticError)
    return str(caught.value)


def test_all_weights_zero() -> None:
    said = message(Scripted({3: put(-torch.inf, [1, 4])}))
    assert "step 3 of 6 in chains 1, 4 of 5: all weights are zero" in said
    assert "use more particles" in said


def test_one_dead_particle_is_no_fault_nor_a_nan_that_follows_it() -> None:
    # A particle of weight zero stays so until it is resampled away; what its log_g says then does not count.
    dead = {2: put(-torch.inf, [0], 1), 3: put(torch.nan, [0], 1)}
    states = list(ParticleFilter(ess_threshold=0).iterate(Scripted(dead), num_particles=4, num_chains=2))
    check(states[-1], Scripted())
    clean = list(ParticleFilter(ess_threshold=0).iterate(Scripted(), num_particles=4, num_chains=2))
    log_w = clean[-1].log_w.clone()
    log_w[0, 1] = -torch.inf
    torch.testing.assert_close(states[-1].log_w, log_w, rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_a_number(value: float) -> None:
    said = message(InItsOwnWords({5: put(value, [2], 3)}))
    assert "step 5 of 6 (k = 1) in chain 2 of 5: the incremental log-weight log_g of a particle is NaN or +inf" in said


def test_a_fault_of_the_model_comes_first_and_others_are_named() -> None:
    flag = torch.tensor([False, True, False, False, False])
    model = Scripted(
        change={2: put(torch.nan, [1]), 4: put(-torch.inf, [0]), 5: put(-torch.inf, [1, 3])},
        faults={2: {"the network returned NaN": flag}, 6: {"the network returned NaN": ~flag}},
    )
    said = message(model)
    assert "step 2 of 6 in chain 1 of 5: the network returned NaN" in said
    assert said.endswith("(later also chains 0, 2, 3, 4)")


def test_progress_sees_no_state_with_a_fault() -> None:
    seen: list[int] = []
    said = message(Scripted({3: put(torch.nan, [0])}), progress=lambda state: seen.append(state.step))
    assert "step 3" in said and seen == [0, 1, 2]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_particles": 0}, "got num_particles = 0; expected an integer of at least 1"),
        ({"num_particles": 2.0}, "got num_particles = 2.0"),
        ({"num_chains": 0}, "got num_chains = 0"),
        ({"seed": -1}, "got seed = -1; expected an integer of at least 0"),
        ({"seed": True}, "got seed = True"),
    ],
)
def test_numbers_are_checked_before_work(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        ParticleFilter().iterate(Scripted(), **{"num_particles": 2, **wrong})


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_threshold_is_a_share(threshold: float) -> None:
    with pytest.raises(ValueError, match="share of the particles"):
        ParticleFilter(ess_threshold=threshold)


@pytest.mark.parametrize(
    ("move", "says"),
    [
        (Move({"x": torch.zeros(2, 3)}, torch.zeros(2, 1)), "got log_g of shape (2, 1) from step 1"),
        (Move({"x": torch.zeros(3, 2)}, torch.zeros(2, 3)), "got the particles' 'x' of shape (3, 2) from step 1"),
        (Move({}, torch.zeros(2, 3), {"bad": torch.zeros(2, 3).bool()}), "got the fault 'bad' of shape (2, 3)"),
    ],
)
def test_a_move_of_wrong_shape(move: Move, says: str) -> None:
    class Wrong(Scripted):
        def step(self, i: int, particles: Particles, generator: torch.Generator) -> Move:
            return move

    with pytest.raises(ValueError, match=re.escape(says)):
        ParticleFilter().run(Wrong(), num_particles=3, num_chains=2)


def start_of(**kwargs: object) -> FilterState:
    states = list(ParticleFilter().iterate(Scripted(), num_particles=4, num_chains=5, **kwargs))
    return states[2]


def test_a_start_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=re.escape("(steps, chains, particles) = (6, 5, 4); this run has (6, 5, 3)")):
        ParticleFilter().run(Scripted(), num_particles=3, num_chains=5, start=start_of())
    with pytest.raises(ValueError, match="kept other records"):
        ParticleFilter().run(
            Scripted(), num_particles=4, num_chains=5, start=start_of(), records=Records(ancestors=False)
        )


def test_weights_all_zero_may_be_an_estimate_of_zero() -> None:
    # Chain 0 dies and then gets NaN in its train, chain 1 has a NaN first, chain 2 dies late, chain 3 not at all.
    change = {2: put(-torch.inf, [0]), 3: put(torch.nan, [0]), 5: put(-torch.inf, [2])}
    state = list(ParticleFilter(ess_threshold=0).iterate(Scripted(change), num_particles=4, num_chains=5))[-1]
    assert all_zero(state).tolist() == [True, False, True, False, False]
    check(state, Scripted(), zero_allowed=True)
    with pytest.raises(FilterError, match="in chain 0 of 5: all weights are zero"):
        check(state, Scripted())
    wrong = Scripted({**change, 4: put(torch.nan, [1]), 6: put(-torch.inf, [1])})
    state = list(ParticleFilter(ess_threshold=0).iterate(wrong, num_particles=4, num_chains=5))[-1]
    assert all_zero(state).tolist() == [True, False, True, False, False]
    with pytest.raises(FilterError, match=r"step 4 of 6 in chain 1 of 5: the incremental log-weight"):
        check(state, wrong, zero_allowed=True)
