"""`sdq export` where something is missing or not as it was written."""

import json
import shutil
from pathlib import Path

import pytest

from export import finn_folder
from export.finn_flow import environment

needs_onnx = pytest.mark.usefixtures("onnx_installed")


@pytest.fixture
def onnx_installed() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("qonnx")


def tampered(run: Path, copy: Path, **changes: int) -> Path:
    """Return a copy of a run with another bitwidth of a layer."""
    shutil.copytree(run, copy)
    policy = json.loads((copy / "policy.json").read_text())
    policy["layers"][1].update(changes)
    (copy / "policy.json").write_text(json.dumps(policy))
    return copy


@needs_onnx
@pytest.mark.parametrize("verb", ["export", "evaluate"])
@pytest.mark.parametrize("changes", [{"weight_bits": 1}, {"act_bits": 2}])
def test_a_policy_that_is_not_the_runs_is_refused(sdq, files, tmp_path, changes, verb):
    run = tampered(files / "quantized", tmp_path / "run", **changes)
    done = sdq(f"{verb} {run}")
    assert done.code == 2, done.out
    assert f"{run / 'policy.json'}: must be the policy that the run was trained with" in done.err
    assert "`sdq quantize --policy`" in done.err
    assert not (run / "export").exists()


@needs_onnx
def test_without_finn_the_rest_still_works(sdq, files, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "missing", lambda: ["finn", "mip"])
    out = tmp_path / "out"
    command = f"export {files / 'quantized'} --samples 10 --verify --out {out} --format finn,onnx"
    done = sdq(f"{command} --quiet --json")
    assert done.code == 0, done.err
    finn, onnx = (entry["verification"] for entry in done.json["exports"])
    assert finn["verified"]
    assert onnx["verified"]
    assert (finn["runtimes"], len(onnx["runtimes"])) == ([], 3)
    assert (
        "FINN after conversion: not run: FINN+ needs packages that are not installed"
        in (finn["warnings"][1])
    )
    done = sdq(f"{command} --overwrite --build --json")
    assert done.code == 1
    assert "FINN+ needs packages that are not installed (finn, mip); run make finn" in done.err
    assert [entry["export"]["format"] for entry in done.json["exports"]] == ["finn", "onnx"]
    assert (out / "finn" / finn_folder.SCRIPT).is_file()


@needs_onnx
def test_without_a_compiler_the_rest_still_works(sdq, files, tmp_path, monkeypatch):
    pytest.importorskip("hls4ml")
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *rest: None if name == "g++" else found(name))
    command = f"export {files / 'quantized'} --samples 10 --verify --format hls4ml,qonnx"
    done = sdq(f"{command} --out {tmp_path} --quiet --json")
    assert done.code == 0, done.err
    hls4ml, qonnx = (entry["verification"] for entry in done.json["exports"])
    assert (hls4ml["runtimes"], len(qonnx["runtimes"])) == ([], 1)
    assert "g++ compiles the C simulation and is not installed; install it" in hls4ml["warnings"][0]


@needs_onnx
def test_the_rate_is_looked_at_before_anything_is_written(sdq, files, tmp_path):
    run, out = files / "quantized", tmp_path / "out"
    done = sdq(f"export {run} --format finn --target pynq_z2 --fps 200000000 --out {out}")
    assert done.code == 2
    assert "demand: 2e+08 fps must be within reach of every candidate" in done.err
    assert "fps can be reached" in done.err
    assert not out.exists()
    done = sdq(f"export {run} --format finn --target pynq_z2 --fps 2000 --out {out} --json")
    cost = sdq(f"cost {run} --target pynq_z2 --fps 2000 --json").json["total"]
    expected = done.json["expected"]
    assert expected == {name: cost[name] for name in expected}
    assert set(expected) == {"lut", "bram_18k", "dsp", "interval_cycles", "fps"}
    assert f"expected (docs/hardware.md): {cost['lut']:,.0f} lut" in done.out


@needs_onnx
@pytest.mark.parametrize("formats", ["finn", "qonnx,finn"])
def test_the_board_is_looked_at_before_anything_is_written(sdq, files, tmp_path, formats):
    out = tmp_path / "out"
    done = sdq(f"export {files / 'quantized'} --format {formats} --target foo --out {out}")
    assert done.code == 2
    assert "finn: target must be one of pynq_z2, ultra96, zcu102, alveo_u50, got 'foo'" in done.err
    assert not out.exists()


@needs_onnx
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--samples 500", "--samples: must stand with --verify, got 500 without it"),
        ("--check --samples 5", "--samples: must stand with --verify, got 5 without it"),
        (
            "--verify --simulate-samples 10",
            "--simulate-samples: must stand with --simulate-layer, got 10 without it",
        ),
    ],
)
def test_numbers_of_images_that_nobody_looks_at_are_refused(sdq, files, options, sentence):
    run = files / "quantized"
    before = sorted(run.rglob("*"))
    done = sdq(f"export {run} --format qonnx {options}")
    assert done.code == 2
    assert sentence in done.err
    assert sorted(run.rglob("*")) == before
