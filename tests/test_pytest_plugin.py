"""The pytest plugin as another repository uses it: each run is a pytest of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from mscompile import bundle
from mscompile.golden import Golden

ROOT = Path(__file__).parent.parent
PLUGIN = "mscompile.pytest_plugin"
pytest_plugins = ["pytester"]

STEPS_A_BUNDLE = """
import sys

def test_it_steps(mscompile_bundle):
    assert mscompile_bundle.session(batch=2).step([[1, 2, 3], [4, 5, 6]]).shape == (2, 3, 28)

def test_torch_is_not_needed(mscompile_bundle):
    assert "torch" not in sys.modules
"""


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_ADDOPTS", f"-p {PLUGIN} -p no:cacheprovider -W error")
    return pytester


def test_the_entry_point_names_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {PLUGIN: PLUGIN}
    assert hasattr(import_module(PLUGIN), "pytest_addoption")


def test_nothing_heavy_is_imported_before_a_bundle_is_named() -> None:
    heavy = ("torch", "numpy", "onnxruntime", "onnx", "mscompile.runtime")
    code = f"import sys, {PLUGIN}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_item_for_each_engine_and_rollout_and_a_fixture(inner: pytest.Pytester, compiled: Path) -> None:
    inner.makepyfile(test_own=STEPS_A_BUNDLE)
    found = inner.runpytest_subprocess("--mscompile-bundle", compiled, "-v", "--junitxml=own.xml")
    found.assert_outcomes(passed=4)
    found.stdout.fnmatch_lines(
        [
            "collect*4 items",
            "test_own.py::test_it_steps[[]transformer-xl.msc] PASSED*",
            "*transformer-xl.msc::ort[[]golden, batch 1] PASSED*",
            "*transformer-xl.msc::ort[[]golden, batch 2] PASSED*",
        ]
    )
    assert 'name="largest logit error"' in (inner.path / "own.xml").read_text(encoding="utf-8")


def test_items_can_be_selected_without_tests_of_ones_own(inner: pytest.Pytester, compiled: Path) -> None:
    found = inner.runpytest_subprocess("--mscompile-bundle", compiled, "-k", "golden and 2", "-m", "mscompile")
    found.assert_outcomes(passed=1, deselected=1)


def test_the_original_adds_its_rollouts_and_what_is_about_none(
    inner: pytest.Pytester, compiled: Path, trained: Path
) -> None:
    found = inner.runpytest_subprocess(
        "--mscompile-bundle", compiled, "--mscompile-reference", trained, "--mscompile-steps", "48", "-v"
    )
    found.assert_outcomes(passed=6)
    found.stdout.fnmatch_lines(["*::ort[[]rows reset in mid-stream] PASSED*", "*::ort[[]whole streams] PASSED*"])


def test_a_wrong_engine_fails_with_one_sentence(inner: pytest.Pytester, compiled: Path) -> None:
    """Golden logits that are wrong at one token, resealed, and a pin on another checkpoint."""
    path = inner.path / "wrong.msc"
    shutil.copytree(compiled, path)
    manifest, golden = bundle.read(path), Golden.load(path / bundle.GOLDEN)
    golden.rollouts[1].logits[0, 5, 3] += 0.5
    golden.save(path / bundle.GOLDEN)
    bundle.seal(path, manifest)
    (inner.path / "parity.toml").write_text(f'checkpoint_sha256 = "{"ab" * 32}"\n', encoding="utf-8")
    found = inner.runpytest_subprocess("--mscompile-bundle", path, "--mscompile-thresholds", "parity.toml")
    found.assert_outcomes(passed=1, failed=2)
    found.stdout.fnmatch_lines(
        [
            "*was made from the checkpoint *, and parity.toml pins abababababab...; restore that checkpoint*",
            "*ort is not the original model: golden, batch 2: logits: max abs error 0.5 exceeds 0.001; *step 5 *",
        ]
    )
    assert "Traceback" not in found.stdout.str()


def test_the_projects_limits_hold_here_too(inner: pytest.Pytester, compiled: Path) -> None:
    (inner.path / "parity.toml").write_text("[fp32]\nlogit_max_abs = 1e-12\n", encoding="utf-8")
    found = inner.runpytest_subprocess("--mscompile-bundle", compiled, "--mscompile-thresholds", "parity.toml")
    found.assert_outcomes(failed=2)
    (inner.path / "parity.toml").write_text("[fp32]\nspeed = 1\n", encoding="utf-8")
    found = inner.runpytest_subprocess("--mscompile-bundle", compiled, "--mscompile-thresholds", "parity.toml")
    found.assert_outcomes(errors=1)
    found.stdout.fnmatch_lines(["*[[]fp32] has an unknown key 'speed'*"])


def test_a_damaged_bundle_is_one_error_of_one_sentence(inner: pytest.Pytester, compiled: Path) -> None:
    path = inner.path / "damaged.msc"
    shutil.copytree(compiled, path)
    (path / "more").write_text("x")
    found = inner.runpytest_subprocess("--mscompile-bundle", path)
    found.assert_outcomes(errors=1)
    found.stdout.fnmatch_lines(["*file 'more' is not listed in manifest.json*"])
    assert found.ret == pytest.ExitCode.INTERRUPTED


def test_a_bundle_that_is_not_named_is_said_not_skipped(inner: pytest.Pytester) -> None:
    inner.makepyfile(test_own=STEPS_A_BUNDLE)
    found = inner.runpytest_subprocess()
    found.assert_outcomes(errors=2)
    found.stdout.fnmatch_lines(["*this test steps a bundle; name it: pytest --mscompile-bundle DIR"])
    found = inner.runpytest_subprocess("--mscompile-thresholds", "parity.toml")
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines(["*--mscompile-thresholds says how a bundle is checked; name it*"])


def test_the_plugin_is_silent_where_no_bundle_is_named(inner: pytest.Pytester) -> None:
    inner.makepyfile(test_own="def test_it(): pass")
    found = inner.runpytest_subprocess()
    found.assert_outcomes(passed=1)
