r"""The choice of a method for a program, with its reason.

the priors know Cov[x_0 given x_t] and the noise has a variance                    sd.Adapted
at most 64 measured values, noise of known variance                                sd.TDS with sd.TweedieTwist
more, noise of known variance                                                      sd.TDS with sd.WidenedTwist
any other likelihood with a gradient                                               sd.TDS with sd.PointTwist
a likelihood without a gradient                                                    sd.Bootstrap
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from smcdiff.guidance.adapted import Adapted
from smcdiff.guidance.base import ForwardOnly, JointProposal, Method, Prediction, Proposal, Twist
from smcdiff.guidance.bootstrap import Bootstrap
from smcdiff.guidance.deferred import WeighsAtTheEnd
from smcdiff.guidance.program import Program
from smcdiff.guidance.tds import TDS
from smcdiff.guidance.twists import TweedieTwist, WidenedTwist

__all__ = ["Choice", "auto"]


@dataclass(frozen=True)
class Choice:
    """A method and why it was taken; it is a method itself, so that :class:`smcdiff.SMC` takes it.

    Args:
        method: what was chosen.
        reason: in words.
        passed_over: what was looked at before and why it was not taken, one line each.
    """

    method: Method
    reason: str
    passed_over: tuple[str, ...] = ()

    @property
    def model(self) -> Callable[..., Any]:
        return self.method.model

    @property
    def twist(self) -> Twist:
        return self.method.twist

    @property
    def proposal(self) -> Proposal | JointProposal:
        return self.method.proposal

    @property
    def weighs_at_the_end(self) -> bool:
        return isinstance(self.method, WeighsAtTheEnd) and self.method.weighs_at_the_end

    @property
    def forward_only(self) -> bool:
        return isinstance(self.method, ForwardOnly) and self.method.forward_only

    def __str__(self) -> str:
        return "\n".join([f"{type(self.method).__name__}: {self.reason}", *self.passed_over])


def auto(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """The method that suits a program run with these arguments, measurements among them.

    It looks at the program's sites and runs each denoiser once or twice. Use ``sd.SMC(sd.auto(model, y), ...).run(y)``;
    printed, it says which method and why.

    Raises:
        ValueError, TypeError: for a program that no method takes.
    """
    passed = []
    program = Program(model, args, kwargs)
    count = sum(value.numel() for value in program.observed.values())
    method: Method
    candidates: list[tuple[Method, str]] = [
        (
            Adapted(model),
            "the priors know the covariance of x_0 given x_t and the measurement can be conditioned on; one forward "
            "pass per particle and step. For pictures of a trained prior compare sd.Tilted, two passes, whose draws "
            "are closer to independent ones",
        ),
        (TDS(model, TweedieTwist()), f"{count} measured values under noise of known variance"),
        (TDS(model, WidenedTwist()), f"{count} measured values, too many for the Tweedie covariance"),
        (TDS(model), "a likelihood with a gradient, of which nothing else is known"),
    ]
    for method, reason in candidates:
        try:
            _try(method, args, kwargs)
        except (ValueError, TypeError, RuntimeError) as error:
            twist = f" with {type(method.twist).__name__}" if isinstance(method, TDS) else ""
            passed.append(f"not sd.{type(method).__name__}{twist}: {_first_line(error)}")
        else:
            return Choice(method, reason, tuple(passed))
    return Choice(Bootstrap(model), "a likelihood without a gradient: particles are weighed alone", tuple(passed))


def _first_line(error: Exception) -> str:
    """An error's own sentence, without the trace of shapes that Pyro adds below it."""
    return str(error).partition("\n")[0]


def _try(method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Evaluate a method once, on one particle at the highest noise."""
    program = Program(method.model, args, kwargs)
    k = program.num_steps
    with torch.enable_grad():
        x = {}
        for name, latent in program.latents.items():
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn((1, *latent.chain.shape), generator=generator, dtype=torch.float64)
            drawn = (latent.chain.initial_scale * noise).to(program.device, program.dtype)
            x[name] = (latent.chain.initial_mean + drawn).requires_grad_()
        estimates = {name: latent.chain.estimate(k, x[name]) for name, latent in program.latents.items()}
        prediction = Prediction(program, k, x, estimates)
        if isinstance(method.proposal, JointProposal):
            with torch.no_grad():
                method.proposal.carry(prediction)
        objective = method.proposal.objective(prediction, method.twist.log_psi(prediction))
        if objective is not None:
            torch.autograd.grad(objective.sum(), list(x.values()), allow_unused=True)
