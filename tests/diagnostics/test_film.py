"""The film holds the particles that the filter had."""

import torch

import smcdiff as sd
from smcdiff.diagnostics.film import Film
from tests.diagnostics.models import GAIN, SHAPE, Y, model


def test_the_film_ends_in_the_posterior():
    def everything(part):
        return lambda state: state.particles.get(part, state.particles["x"])

    records = sd.Records(
        summaries={"film": Film("x"), "x": everything("x"), "x0": everything("x/x0_hat"), "w": lambda state: state.w}
    )
    kernel = sd.TDS(model, sd.TweedieTwist())
    smc = sd.SMC(kernel, 8, 2, seed=0, records=records, progress=False).run(Y, gain=GAIN)
    kept = smc.records.summaries
    assert kept["film"].shape == (13, 2, *SHAPE)
    torch.testing.assert_close(kept["film"][:, 0], kept["x"][:, 0, 0])
    expected = torch.einsum("kn,kn...->k...", kept["w"][:, 0], kept["x0"][:, 0])
    torch.testing.assert_close(kept["film"][:, 1], expected)
    run = smc.posterior
    mean = torch.einsum("n,n...->...", run.within_chain_log_w[0].exp(), run.values["x"][0])
    torch.testing.assert_close(kept["film"][-1, 1], mean)
    torch.testing.assert_close(kept["entropy"], run.entropy)  # the front door's own summary is still there
