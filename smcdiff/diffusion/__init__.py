"""Diffusion models as probability laws: schedules, denoisers, reverse chains, priors."""
