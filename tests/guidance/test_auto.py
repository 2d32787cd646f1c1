"""The choice of a method: each kind of program gets the method that suits it, with a reason, and it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import smcdiff as sd
from smcdiff.guidance.auto import auto

EXACT = sd.GaussianDenoiser(torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))


class Trained:
    """A denoiser that knows no covariance, as a network does."""

    event_shape, dtype, device = torch.Size([4]), torch.float64, torch.device("cpu")

    def __call__(self, x_t: Tensor, level: sd.NoiseLevel) -> sd.Estimate:
        return sd.Estimate(EXACT(x_t, level).mean)


def program(denoiser: sd.Denoiser, law: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps=5)

    def model(y: Tensor) -> None:
        pyro.sample("y", law(pyro.sample("x", prior)), obs=y)

    return model


def gaussian(x: Tensor) -> Any:
    return sd.GaussianMeasurement(sd.Identity(), x, 0.5)


CASES = {
    "covariance known": (EXACT, gaussian, 4, "Adapted", None),
    "few values": (Trained(), gaussian, 4, "TDS", sd.TweedieTwist()),
    "many values": (Trained(), lambda x: dist.Normal(x.repeat(30), 0.5).to_event(1), 120, "TDS", sd.WidenedTwist()),
    "other noise": (Trained(), lambda x: dist.StudentT(3.0, x, 0.5).to_event(1), 4, "TDS", sd.PointTwist()),
    "no gradient": (Trained(), lambda x: dist.Normal(x.detach().round(), 0.5).to_event(1), 4, "Bootstrap", None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_program_gets_its_method_and_runs(case: str) -> None:
    denoiser, law, size, name, twist = CASES[case]
    model, y = program(denoiser, law), torch.full((size,), 0.3, dtype=torch.float64)
    choice = auto(model, y)
    assert type(choice.method).__name__ == name
    assert twist is None or choice.twist == twist
    assert str(choice).startswith(f"{name}: ")
    smc = sd.SMC(choice, num_particles=8, seed=0, progress=False).run(y)
    assert torch.isfinite(smc.log_evidence)


def test_it_says_why_the_others_were_passed_over() -> None:
    choice = auto(program(Trained(), gaussian), torch.zeros(4, dtype=torch.float64))
    assert "prior.calibrate(images)" in str(choice)
    assert "Trace Shapes" not in str(choice)


def test_a_covariance_makes_a_trained_prior_adapted_with_the_exact_evidence() -> None:
    prior = sd.DiffusionPrior(Trained(), sd.VPSchedule(), num_steps=5)
    spectrum = sd.SpectralCovariance(torch.ones(4, dtype=torch.float64), basis="pixels")

    def model(y: Tensor) -> None:
        pyro.sample("y", gaussian(pyro.sample("x", prior.replace(covariance=spectrum))), obs=y)

    y = torch.tensor([0.3, -0.2, 1.0, 0.0], dtype=torch.float64)
    choice = auto(model, y)
    assert type(choice.method).__name__ == "Adapted"
    smc = sd.SMC(choice, num_particles=4, seed=0, progress=False).run(y)
    exact = torch.distributions.Normal(0.0, 1.25**0.5).log_prob(y).sum()
    # the chain begins at N(0, I), which x_T has up to alpha_T^2, here 4e-5
    torch.testing.assert_close(smc.log_evidence, exact, atol=1e-2, rtol=0)
