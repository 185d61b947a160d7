"""The plots of a run: which there are, that they are whole, and what happens without."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdq import plots, weight_figures
from sdq.errors import RequestError

SEARCHED = {"bits.png", "error.png", "histograms.png", "trajectory.png"}


def drawn(run):
    return {path.name for path in (run / "plots").iterdir()}


def are_whole(run):
    for path in (run / "plots").iterdir():
        with Image.open(path) as image:
            image.load()  # raises if the file is cut
            assert image.format == "PNG"
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert "Software" not in image.info
            assert len(image.convert("L").getcolors() or range(300)) > 20  # not an empty page


@pytest.fixture
def plotted(sdq, files, tmp_path):
    """Return a function that runs a command on the small data, with plots, and gives its folder."""

    def run(command):
        folder = tmp_path / "run"
        done = sdq(
            f"{command} --from {files / 'float'} --data {files / 'ok.npz'} --quiet --out {folder}",
            plots=True,
        )
        assert (done.code, done.err) == (0, "")
        return folder

    return run


def test_plots_of_a_quantized_run(derm):
    assert drawn(derm / "quantized") == SEARCHED
    are_whole(derm / "quantized")


def test_the_log_has_prices_where_it_has_bits(derm):
    lines = (derm / "quantized" / "log.jsonl").read_text().splitlines()
    (record,) = [x for x in map(json.loads, lines) if x["phase"] == "search"]
    bits, prices = record["trajectory"], record["price_trajectory"]
    assert [x[0] for x in bits] == [x[0] for x in prices]
    assert all(len(x) == 3 and min(x) > 0 for x in prices)  # progress, use and price of one budget
    assert bits[-1][0] == 1.0
    assert prices[-1][1:] == pytest.approx(
        [record["budget_use"]["average weight bits"], record["lambda_q"]["average weight bits"]],
        rel=1e-3,  # the log has four digits
    )


def test_drawn_again_they_are_the_same(derm, tmp_path):
    """Whatever the user of matplotlib has configured."""
    import matplotlib

    run = tmp_path / "run"
    shutil.copytree(derm / "quantized", run)
    before = {path.name: path.read_bytes() for path in (run / "plots").iterdir()}
    shutil.rmtree(run / "plots")
    with matplotlib.rc_context({"font.size": 30, "savefig.dpi": 10, "figure.facecolor": "red"}):
        written = plots.draw(run)
        assert matplotlib.rcParams["font.size"] == 30
    assert {path.name: path.read_bytes() for path in written} == before


def test_plots_of_a_search(plotted):
    run = plotted("search --bits 2.5 --search-epochs 2 --granularity channel --first-last-bits 32")
    assert drawn(run) == SEARCHED
    are_whole(run)


def test_learned_activation_bits(plotted):
    run = plotted(
        "search --bits 2.5 --search-epochs 1 --learn-act-bits --first-last-bits 0 --bops-g 1 "
        "--act-bits 8"  # the input, most of what the network reads, keeps its 8
    )
    assert drawn(run) == SEARCHED


def test_a_uniform_policy_has_no_trajectory(plotted):
    run = plotted("quantize --bits 2 --epochs 0 --search-method uniform")
    assert drawn(run) == SEARCHED - {"trajectory.png"}


def test_before_fine_tuning_folded_weights_are_folded(plotted, monkeypatch):
    shown = []
    draw = weight_figures.error_figure
    monkeypatch.setattr(
        weight_figures, "error_figure", lambda *errors: shown.extend(errors) or draw(*errors)
    )
    options = "--batch-norm fold --weight-scale per_tensor --search-method uniform"
    run = plotted(f"quantize --bits 2 --epochs 0 {options}")
    before, after = shown
    assert before.keys() == after.keys()
    assert before == pytest.approx(after)  # nothing was trained
    names = ("folded", "model", "float")
    folded, model, given = (load_file(run / f"{name}.safetensors") for name in names)
    for name, weight in folded.items():
        assert torch.equal(weight, model[f"net.{name}"])
    # the first layer has a normalisation behind it, and the last has none
    assert not torch.equal(folded["layers.1.weight"], given["layers.1.weight"])
    assert torch.equal(folded["layers.10.weight"], given["layers.10.weight"])


@pytest.mark.parametrize("verb", ["search", "quantize --epochs 0"])
def test_no_plots(plotted, verb):
    run = plotted(f"{verb} --bits 2 --search-method uniform --no-plots")
    assert not (run / "plots").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("font")])
def test_a_run_that_cannot_be_drawn_is_done(sdq, files, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(plots, "write_bytes_atomically", fail)
    run = tmp_path / "run"
    done = sdq(
        f"search --from {files / 'float'} --data {files / 'ok.npz'} --bits 2 "
        f"--search-method uniform --json --quiet --out {run}",
        plots=True,
    )
    assert done.code == 0
    assert done.json["avg_weight_bits"] == 2.0
    assert done.err == f"warning: {run}: the run is done, but without plots: {error}\n"


def test_what_cannot_be_drawn_is_refused(files, derm, tmp_path):
    with pytest.raises(RequestError, match="must be a run folder"):
        plots.draw(tmp_path)
    with pytest.raises(RequestError, match="no file"):
        plots.draw(files / "float")  # of `sdq train`: there is no policy
    run = tmp_path / "run"
    shutil.copytree(derm / "quantized", run)
    (run / "log.jsonl").write_text("{\n")
    with pytest.raises(RequestError, match="must have JSON in every line"):
        plots.draw(run)


def test_only_who_draws_waits_for_matplotlib():
    program = (
        "import sys, sdq, sdq.plots, sdq.cli.quantize, sdq.cli.search; "
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
