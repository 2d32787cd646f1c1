"""The report says what the run says, needs nothing but itself, and can be read in a browser."""

import base64
import io
import re
from html.parser import HTMLParser

import matplotlib

matplotlib.use("agg")

import numpy as np
import pytest
import torch
from PIL import Image

import smcdiff as sd
from smcdiff.cli import main
from smcdiff.diagnostics import Run, diagnose, page
from smcdiff.diagnostics.arviz import read, write
from smcdiff.diagnostics.export import from_groups, run_groups
from smcdiff.diagnostics.report import find_run, report
from tests.diagnostics import gallery
from tests.diagnostics.browser import Browser, chromium
from tests.diagnostics.models import real_run


class Reader(HTMLParser):
    """Collects the text, the pictures, and every address in a page; complains of tags left open."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.text, self.images, self.addresses, self.open, self.tags = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes)
        self.addresses += [v for k, v in attributes.items() if k in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def picture_run():
    """A run of pictures with a known truth, a noise level, and records of all kinds."""
    run = gallery.run()
    truth = torch.from_numpy(gallery.scene())[None]
    x = truth + 0.2 * torch.from_numpy(gallery.noise(4, 24, 1, 24, 32))
    return Run(
        values={"x": x, "sigma": run.values["sigma"]},
        **{n: getattr(run, n) for n in ("log_w", "log_z", "ess", "log_z_path", "roots", "entropy", "ancestors")},
        observed={"y": truth + 0.1},
        constants={"x.truth": truth},
        about={"seed": 5, "method": "TDS(twist=PointTwist())", "command": "smcdiff restore 'a b.png' --sigma <0.1>"},
    )  # fmt: skip


def test_the_page_says_what_the_run_says():
    run = picture_run()
    found = Reader(report(run, "A <title> & more", "summary & words"))
    text = " ".join(" ".join(found.text).split())
    diagnostics = diagnose(run)
    assert text.count("A <title> & more") == 2 and "summary & words" in text
    assert f"Verdict: {diagnostics.verdict}." in text and diagnostics.findings
    for finding in diagnostics.findings:
        assert finding.reason in text and finding.remedy in text
    assert f"{diagnostics.log_evidence:.2f}" in text and f"{diagnostics.k_hat:.2f}" in text
    assert "smcdiff restore 'a b.png' --sigma <0.1>" in text
    row = text[text.index("Site mean") :]
    numbers = [float(v) for v in re.search(r"sigma ([\d. ]+)", row)[1].split()]
    expected = [run.mean("sigma"), run.sd("sigma"), run.quantile("sigma", 0.05), run.quantile("sigma", 0.95)]
    np.testing.assert_allclose(numbers, [float(v) for v in expected], rtol=1e-3)
    inside = (run.constants["x.truth"] >= run.quantile("x", 0.05)) & (
        run.constants["x.truth"] <= run.quantile("x", 0.95)
    )
    assert f"{100 * float(inside.double().mean()):.1f} % of all pixels" in text
    assert "1507.02646" in text  # of k-hat, from the docstring
    assert len(found.images) == 6  # panel, z-scores, sigma, steps, weights, genealogy
    for image in found.images:
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64" and image["alt"]
        assert Image.open(io.BytesIO(base64.b64decode(data))).size[0] > 300


def test_the_page_needs_nothing_but_itself():
    text = report(picture_run())
    found = Reader(text)
    assert all(address.startswith("data:") for address in found.addresses)
    assert not {"script", "link", "iframe", "object", "form", "video", "audio"} & set(found.tags)
    outside = re.sub(r'src="data:[^"]*"', "", text)
    assert "url(" not in outside and "@import" not in outside and "default-src 'none'" in text


def test_the_verdict_is_that_of_the_exact_weights():
    run = picture_run()
    tempered, exponent = run.tempered(40.0)
    text = report(tempered)
    assert f"{diagnose(run).pooled_ess:.1f} of 96" in text and f"{exponent:.3g}: pictures" in text


def test_a_good_run_is_called_good():
    run = Run(
        {"s": torch.arange(400.0).reshape(4, 100)},
        torch.zeros(4, 100),
        torch.zeros(4),
        torch.full((3, 4), 100.0),
        torch.zeros(3, 4),
    )
    found = Reader(report(run))
    assert "Verdict: good. Nothing here speaks against the result." in found.text and "li" in found.tags
    assert 'class="verdict good"' in report(run)


def test_report_from_a_file_and_from_a_folder(tmp_path, capsys):
    run = picture_run()
    write(run_groups(run), tmp_path / "posterior.nc")
    (tmp_path / "summary.txt").write_text("what was done")
    assert main(["report", str(tmp_path)]) == 0
    assert main(["report", str(tmp_path / "posterior.nc"), "--title", "Posterior report"]) == 0
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    folder, file = (tmp_path / "report.html").read_text(), (tmp_path / "posterior.html").read_text()
    assert "what was done" in folder and "what was done" not in file
    assert file == report(from_groups(read(tmp_path / "posterior.nc")), "Posterior report")
    body = [line for line in report(run, "Posterior report").splitlines() if "<img" not in line]
    assert [line for line in file.splitlines() if "<img" not in line] == body  # the file holds all that is said
    assert find_run(tmp_path) == tmp_path / "posterior.nc"
    for wrong in ("nowhere", str(tmp_path / "summary.txt")):
        assert main(["report", wrong]) == 2
    errors = capsys.readouterr().err
    assert "there is no file nowhere" in errors and "not a netCDF file" in errors


def test_report_of_a_saved_run(tmp_path):
    real_run().save(tmp_path / "run.nc")
    assert main(["report", str(tmp_path / "run.nc"), "--out", str(tmp_path / "page.html")]) == 0
    text = " ".join(Reader((tmp_path / "page.html").read_text()).text)
    assert "sd.SMC(sd.TDS(twist=TweedieTwist(" in text and "num_particles=16, num_chains=4, seed=1" in text
    assert sd.__version__ in text and torch.__version__ in text and "2306.17775" in text


def test_tables_lists_and_code_are_escaped():
    for part in (
        page.table([["<a>", "<b>"]], ["<c>", "<d>"]),
        page.listing(["<a>"]),
        page.code("<a>"),
        page.paragraph("<a>", "lead"),
        page.section("<a>", []),
        page.verdict("bad", "<a>", [("<b>", "<c>", "<d>")]),
    ):
        assert re.search(r"<[abcd]>", part.replace("<b>&lt;", "&lt;")) is None and "&lt;a&gt;" in part


@pytest.mark.skipif(chromium() is None, reason="no Chromium here; apt-get install chromium")
@pytest.mark.parametrize("width", [1366, 800])
def test_a_browser_shows_the_page(tmp_path, width):
    path = tmp_path / "report.html"
    path.write_text(report(picture_run(), "Report", "x" * 400), encoding="utf-8")
    browser = Browser(tmp_path / "profile", width, 768)
    try:
        browser.open(path.as_uri())
        addresses = [address for address in browser.requests() if not address.startswith("data:")]
        assert addresses == [path.as_uri()]  # itself, and nothing from anywhere
        assert browser.complaints() == []
        assert browser.evaluate("document.title") == "Report"
        loaded = "[...document.images].filter(i => i.complete && i.naturalWidth > 0).length"
        assert browser.evaluate(loaded) == 6
        assert browser.evaluate("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
        assert browser.evaluate("document.querySelector('.verdict').getBoundingClientRect().bottom") < 768
        assert browser.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 16
        widths = browser.evaluate("[...document.images].map(i => i.getBoundingClientRect().width / i.naturalWidth)")
        assert max(widths) <= 1  # no picture is blown up
        browser.screenshot(tmp_path / "page.png")
        shown = np.asarray(Image.open(tmp_path / "page.png").convert("L"))
        assert 0 <= width - shown.shape[1] <= 20 and shown.shape[0] > 2000 and shown.std() > 20  # less the scroll bar
        # the policy of the page holds: a picture from elsewhere is refused by the browser itself
        browser.evaluate("document.body.append(Object.assign(new Image(), {src: 'https://localhost:9/a.png'})), 1")
        browser.evaluate("1")
        assert any("Content Security Policy" in words for words in browser.complaints())
    finally:
        browser.close()
