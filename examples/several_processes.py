"""One posterior on several processes.

    torchrun --nproc-per-node 2 examples/several_processes.py [--particles]

Every process makes the same calls with the same measurement, and every one of them holds the whole posterior
afterwards. ``ChainsOverRanks`` gives each process some of the chains; ``ParticlesOverRanks`` (``--particles``) gives
each some of the particles of every chain. An error in one of them ends all.
"""

from __future__ import annotations

import argparse
import math

import pyro
import pyro.distributions as dist
import torch

import smcdiff as sd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", action="store_true", help="spread particles, not chains")
    spread = sd.ParticlesOverRanks() if parser.parse_args().particles else sd.ChainsOverRanks()

    torch.distributed.init_process_group("gloo")  # with GPUs "nccl", after torch.cuda.set_device(LOCAL_RANK)
    denoiser = sd.GaussianDenoiser(torch.zeros(2), torch.eye(2))
    prior = sd.DiffusionPrior(denoiser, sd.VPSchedule(), num_steps=30)

    def model(y: torch.Tensor | None = None) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=y)

    y = torch.tensor(1.5)  # the same on every process
    smc = sd.SMC(sd.Adapted(model), 64, 4, filter=spread, seed=0, progress=False).run(y)
    if torch.distributed.get_rank() == 0:  # every process holds the result; one shows it
        print(f"{smc.posterior.about['processes']} processes, {smc.network_evaluations[0]} network evaluations")
        exact = float(dist.Normal(0.0, math.sqrt(2.25)).log_prob(y))
        print(f"log evidence {float(smc.log_evidence):.4f}, exact {exact:.4f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
