"""Trained priors that ship with the library, and the loading of a user's own.

A prior is a pipeline folder of the diffusers library. Those that ship lie beside this module, each with a card that
says what it was trained on, with which command and seed, under which licence, and what it cannot do.
"""

from __future__ import annotations

from pathlib import Path

import torch

from smcdiff.diffusion.adapters.diffusers import load_pipeline
from smcdiff.diffusion.covariance_models import SpectralBasis
from smcdiff.diffusion.kernels import Variance
from smcdiff.diffusion.prior import DiffusionPrior
from smcdiff.diffusion.schedule import Grid

__all__ = ["load_prior", "shipped_priors"]

FOLDER = Path(__file__).parent


def shipped_priors() -> tuple[str, ...]:
    """The names :func:`load_prior` knows without a folder."""
    return tuple(sorted(path.parent.name for path in FOLDER.glob("*/model_index.json")))


def load_prior(
    name_or_folder: str | Path,
    *,
    event_shape: tuple[int, int, int] | None = None,
    num_steps: int = 100,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    eta: float = 1.0,
    variance: Variance = "posterior",
    grid: Grid | None = None,
    clip: tuple[float, float] | None = None,
    basis: SpectralBasis = "dct",
) -> DiffusionPrior:
    """A trained prior, by the name of one that ships or from a diffusers pipeline folder. Nothing is downloaded.

    Args:
        name_or_folder: a shipped name such as ``"sem64"``, or the path of a folder; where both exist under one name,
            a string is the name and a ``Path`` the folder.
        event_shape: (channels, rows, columns) of one picture, where it is not the size of the training pictures.
        num_steps: K, the number of steps of the chain.
        device, dtype: of the network and its events; None leaves them as loaded: the CPU, and the weights' dtype.
        eta: share of the ancestral noise, in [0, 1].
        variance: of a step: "posterior", "fixed_large", "learned" or "optimal" (see :mod:`smcdiff.diffusion.kernels`).
        grid: where the noise times lie; None takes the schedule's default.
        clip: (low, high) that x0_hat is clipped to; None takes the pipeline's own choice.
        basis: of the covariance of x_0 given x_t that is kept beside the weights: "dct", or "fft" where the measurement
            is a circular convolution.

    Raises:
        FileNotFoundError: for a name that does not ship and is no folder, or a folder that is no pipeline.
        ImportError: where diffusers is not installed.
        ValueError: for a pipeline that is not an unconditional, discrete-time one, or an event shape it cannot take.
    """
    shipped = shipped_priors()
    if isinstance(name_or_folder, str) and name_or_folder in shipped:
        folder = FOLDER / name_or_folder
    else:
        folder = Path(name_or_folder).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(
                f"got the prior {str(name_or_folder)!r}, which neither ships nor is a folder; expected one of "
                f"{', '.join(shipped) or '(none ship)'}, or the path of a diffusers pipeline folder"
            )
    return load_pipeline(
        folder,
        event_shape=event_shape,
        num_steps=num_steps,
        device=device,
        dtype=dtype,
        eta=eta,
        variance=variance,
        grid=grid,
        clip=clip,
        basis=basis,
    )
