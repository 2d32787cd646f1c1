r"""Training of a diffusion prior: the v-prediction loss on random crops, with an averaged copy of the weights.

With x_t = alpha_t x_0 + sigma_t eps the network learns v = alpha_t eps - sigma_t x_0, which is well scaled at every
noise level, by the mean of ``|v - v_theta(x_t, t)|^2`` over t uniform on the training grid, or in part uniform in
log(sigma_t / alpha_t); what is kept is the exponential moving average of theta.

Posterior sampling asks for accuracy at low noise: a step of the chain is charged d(alpha^2 / sigma^2) times the squared
error of x0_hat, which is what a v-loss with log(sigma_t / alpha_t) uniform charges once sigma_t < alpha_t. Times
uniform on the linear schedule spend half of the training above sigma_t = 3 alpha_t.

References:
    T. Salimans, J. Ho, "Progressive Distillation for Fast Sampling of Diffusion Models" (2022), arXiv 2202.00512,
    Appendix D: the v-prediction.
    J. Ho, A. Jain, P. Abbeel, "Denoising Diffusion Probabilistic Models" (2020), arXiv 2006.11239: the schedule.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

__all__ = ["Training", "random_crops"]


@dataclass(frozen=True)
class Training:
    """How a network is trained; :meth:`run` does it.

    Args:
        steps: gradient steps in all.
        batch: crops in a step.
        size: rows and columns of a crop, in pixels.
        learning_rate: of AdamW, after 200 steps of warm-up, falling along a cosine to 1 % of it.
        ema: decay of the moving average of the weights, per step.
        seed: of the crops and the noise; the initial weights are the network's own.
        bfloat16: run the network's arithmetic in bfloat16; weights and loss stay in float32.
        save_every: steps between two checkpoints.
        log_share: share of the crops, in [0, 1], whose noise level is uniform in log(sigma_t / alpha_t).
        upright: whether pictures have a top and a left, as digits do; others are turned and mirrored at random.
        measure: y of clean crops, ``measure(x_0, generator) -> y`` of the same rows and columns, for a conditional
            network: it is given x_t and y, joined along the channels. x_0 is on ``device``, the generator on the CPU,
            and y may be on either. None trains an unconditional one.
        device: where network and pictures are moved to. Crops are drawn on the CPU and so are the same everywhere; the
            noise is drawn on the device and is that device's own.
    """

    steps: int
    batch: int = 32
    size: int = 64
    learning_rate: float = 1e-3
    ema: float = 0.999
    seed: int = 0
    bfloat16: bool = True
    save_every: int = 250
    log_share: float = 0.0
    upright: bool = False
    measure: Callable[[Tensor, torch.Generator], Tensor] | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 0 <= self.log_share <= 1:
            raise ValueError(f"got log_share {self.log_share}; expected a share of the crops in [0, 1]")

    def run(self, network: nn.Module, frames: Tensor, alphas_cumprod: Tensor, checkpoint: Path) -> nn.Module:
        """Train ``network(x_t, index) -> v`` on crops of ``frames`` and return its averaged copy.

        A checkpoint that is already there is continued, step by step as if it had never stopped.

        The network is moved to the device and trained in place; what is returned is there too.

        Args:
            network: takes (batch, channels, size, size), the channels of y among them, and integer training indices
                (batch,).
            frames: (number, channels, rows, columns) pictures on the scale [-1, 1].
            alphas_cumprod: alpha_bar on the training grid, shape (train_steps,).
            checkpoint: file to write to, atomically, and to resume from.

        Raises:
            ValueError: for frames that are not four-dimensional or smaller than a crop, and for a checkpoint of a run
                with another seed.
        """
        if frames.ndim != 4 or min(frames.shape[-2:]) < self.size:
            raise ValueError(
                f"got frames of shape {tuple(frames.shape)}; expected (number, channels, rows, columns) with at least"
                f" {self.size} rows and columns, the size of a crop"
            )
        network, frames = network.to(self.device), frames.to(self.device)
        alphas_cumprod = alphas_cumprod.to(self.device)
        average = copy.deepcopy(network).eval().requires_grad_(False)
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.learning_rate, weight_decay=1e-4)
        done, loss_mean, seconds = 0, float("nan"), 0.0
        if checkpoint.exists():
            state = torch.load(checkpoint, map_location=self.device, weights_only=True)
            if state.get("seed", self.seed) != self.seed:
                raise ValueError(
                    f"{checkpoint} holds a run with seed {state['seed']}, this one has seed {self.seed}; give the seed"
                    " of the checkpoint to go on with it, or another file to start anew"
                )
            network.load_state_dict(state["network"])
            average.load_state_dict(state["average"])
            optimizer.load_state_dict(state["optimizer"])
            done, loss_mean, seconds = state["done"], state["loss_mean"], state["seconds"]
        started = time.monotonic() - seconds
        with tqdm(total=self.steps, initial=done, unit="step", mininterval=5) as bar:
            while done < self.steps:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + done)  # a step's noise is its own
                for group in optimizer.param_groups:
                    group["lr"] = self._rate(done)
                loss = self._loss(network, frames, alphas_cumprod, generator)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                decay = min(self.ema, (done + 1) / (done + 10))
                with torch.no_grad():
                    for kept, new in zip(average.parameters(), network.parameters(), strict=True):
                        kept.lerp_(new, 1 - decay)
                done += 1
                bar.update()
                if done % 25 == 0 or done == self.steps:
                    value = float(loss.detach())
                    loss_mean = value if loss_mean != loss_mean else 0.9 * loss_mean + 0.1 * value
                    bar.set_postfix(loss=f"{loss_mean:.4f}")
                if done % self.save_every == 0 or done == self.steps:
                    state = {
                        "network": network.state_dict(),
                        "average": average.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "done": done,
                        "seed": self.seed,
                        "loss_mean": loss_mean,
                        "seconds": time.monotonic() - started,
                    }
                    torch.save(state, checkpoint.with_suffix(".part"))
                    os.replace(checkpoint.with_suffix(".part"), checkpoint)
        return average

    def _rate(self, done: int) -> float:
        cosine = 0.5 * (1 + torch.cos(torch.tensor(done / self.steps * torch.pi)).item())
        return self.learning_rate * min(1.0, (done + 1) / 200) * (0.01 + 0.99 * cosine)

    def _loss(self, network: nn.Module, frames: Tensor, alphas_cumprod: Tensor, generator: torch.Generator) -> Tensor:
        x_0 = random_crops(frames, self.batch, self.size, generator, self.upright)
        index = self._indices(alphas_cumprod, generator)
        alpha_bar = alphas_cumprod[index].reshape(-1, 1, 1, 1)
        alpha_t, sigma_t = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        eps = torch.randn(x_0.shape, generator=self._noise_generator(generator), device=self.device)
        given = alpha_t * x_0 + sigma_t * eps
        if self.measure is not None:
            given = torch.cat([given, self.measure(x_0, generator).to(given)], 1)
        with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.bfloat16):
            v = network(given, index)
        return (v.float() - (alpha_t * eps - sigma_t * x_0)).square().mean()

    def _indices(self, alphas_cumprod: Tensor, generator: torch.Generator) -> Tensor:
        """(batch,): indices of the training grid, the first ones uniform in log(sigma_t / alpha_t)."""
        index = torch.randint(len(alphas_cumprod), (self.batch,), generator=generator)
        logarithmic = round(self.log_share * self.batch)
        if logarithmic:
            table = (1 / alphas_cumprod.cpu().double() - 1).log()  # twice the log of sigma / alpha, rising
            wanted = table[0] + (table[-1] - table[0]) * torch.rand(logarithmic, generator=generator)
            middles = (table[1:] + table[:-1]) / 2
            index[:logarithmic] = torch.searchsorted(middles, wanted)
        return index.to(self.device)

    def _noise_generator(self, generator: torch.Generator) -> torch.Generator:
        """The step's own generator on the CPU; elsewhere one of the device, seeded from it."""
        if torch.device(self.device).type == "cpu":
            return generator
        seed = int(torch.randint(2**62, (), generator=generator))
        return torch.Generator(self.device).manual_seed(seed)


def random_crops(frames: Tensor, number: int, size: int, generator: torch.Generator, upright: bool = False) -> Tensor:
    """(number, channels, size, size): crops of ``frames`` at random places, turned and mirrored unless ``upright``.

    The places come from ``generator``, a generator on the CPU, the crops lie where the frames do.
    """
    rows, columns = frames.shape[-2:]

    def draw(high: int) -> Tensor:
        return torch.randint(high, (number,), generator=generator)

    frame, top, left = draw(len(frames)), draw(rows - size + 1), draw(columns - size + 1)
    turns, mirror = draw(1 if upright else 4)[:, None, None], draw(1 if upright else 2)[:, None, None]
    along = torch.arange(size)
    down, across = along[None, :, None], along[None, None, :]
    across = torch.where(mirror == 1, size - 1 - across, across)
    for quarter in range(3):  # a turn by 90 degrees takes out[i, j] from in[j, size - 1 - i]
        turned = turns > quarter
        down, across = torch.where(turned, across, down), torch.where(turned, size - 1 - down, across)
    row, column = (top[:, None, None] + down).to(frames.device), (left[:, None, None] + across).to(frames.device)
    return frames.movedim(1, -1)[frame.to(frames.device)[:, None, None], row, column].movedim(-1, 1)
