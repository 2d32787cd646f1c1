"""A run in words: the sites, and how far to trust them."""

from __future__ import annotations

from smcdiff.diagnostics.run import Run
from smcdiff.diagnostics.verdict import diagnose

__all__ = ["summarise"]


def summarise(run: Run, most_entries: int = 8) -> str:
    """A table of every latent site's entries, and the diagnostics below it.

    Mean, standard deviation and the 5 % and 95 % quantiles are those of all particles weighed together. A site with
    more entries than ``most_entries`` is given by the ranges of its entries' means and standard deviations.
    """
    lines = [f"{'site':<20} {'mean':>10} {'sd':>10} {'5 %':>10} {'95 %':>10}"]
    for site in run.values:
        mean, sd = run.mean(site), run.sd(site)
        if mean.numel() > most_entries:
            lines.append(
                f"{site:<20} {mean.numel()} entries: means {float(mean.min()):.4g} to {float(mean.max()):.4g}, "
                f"sds {float(sd.min()):.4g} to {float(sd.max()):.4g}"
            )
            continue
        columns = (mean, sd, run.quantile(site, 0.05), run.quantile(site, 0.95))
        for i, row in enumerate(zip(*(column.flatten().tolist() for column in columns), strict=True)):
            name = f"{site}[{i}]" if mean.numel() > 1 else site
            lines.append(f"{name:<20} " + " ".join(f"{value:>10.4g}" for value in row))
    return "\n".join([*lines, "", str(diagnose(run))])
