"""Two small classifiers of digits that have nothing in common but their task: one guides, the other judges."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Guide", "Judge", "accuracy", "distorted", "train_classifier"]


class Guide(nn.Module):
    """Three strided convolutions with smooth activations; what guidance differentiates. (m, 1, 32, 32) -> (m, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(48 * 16, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Judge(nn.Module):
    """Six 3 x 3 convolutions with batch normalisation, max-pooling and a global average. (m, 1, 32, 32) -> (m, 10)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, pool in ((1, 24, 0), (24, 24, 1), (24, 48, 0), (48, 48, 1), (48, 64, 0), (64, 64, 0)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] * pool
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def distorted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture turned by up to 12 degrees, sheared, scaled by up to 12 % and shifted by up to 2 pixels."""

    def uniform(size: float) -> Tensor:
        return size * (2 * torch.rand(len(images), generator=generator) - 1)

    angle, shear, scale = uniform(0.21), uniform(0.15), 1 + uniform(0.12)
    rows = torch.stack((scale * angle.cos(), -scale * angle.sin() + shear, uniform(2 / 16)), 1)
    columns = torch.stack((scale * angle.sin(), scale * angle.cos(), uniform(2 / 16)), 1)
    grid = functional.affine_grid(torch.stack((rows, columns), 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images + 1, grid, align_corners=False) - 1


def train_classifier(
    make: Callable[[], nn.Module], images: Tensor, labels: Tensor, steps: int, seed: int, batch: int = 64
) -> nn.Module:
    """A classifier trained by cross-entropy on distorted pictures, ready for use.

    Args:
        make: makes the network, its weights from torch's global generator.
        seed: of the weights, the order of the pictures and their distortions.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make()
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(steps):
            index = torch.randint(len(images), (batch,), generator=generator)
            loss = functional.cross_entropy(network(distorted(images[index], generator)), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of pictures whose likeliest class is their label."""
    return float((network(images).argmax(1) == labels).double().mean())
