"""The Pythons that the project promises are the same wherever it names them; the lock is for all."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).parents[1]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
PROMISED = [(3, minor) for minor in (11, 12, 13)]


def test_package_and_readme_name_them():
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python ::" in c]
    assert named == [f"{major}.{minor}" for major, minor in PROMISED]
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    assert "need Python 3.11, 3.12 or 3.13," in (CHECKOUT / "README.md").read_text()


@pytest.mark.parametrize("version", [(3, 10), *PROMISED, (3, 14)])
def test_make_takes_just_them(monkeypatch, version):
    (check,) = re.findall(r"\$\(PYTHON\) -c '(.*)'", (CHECKOUT / "Makefile").read_text())
    monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
    with pytest.raises(SystemExit) as ended:
        exec(check)
    refused = (
        f"gqa_scaling needs Python 3.11, 3.12 or 3.13, this is {version[0]}.{version[1]}; "
        "try make PYTHON=python3.12"
    )
    assert ended.value.code == (0 if version in PROMISED else refused)


def test_the_lock_has_a_version_within_every_range():
    lines = (CHECKOUT / "requirements.lock").read_text().splitlines()
    locked = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in locked}
    ranges = (CHECKOUT / "requirements.txt").read_text().splitlines()
    for line in [*ranges, *PROJECT["optional-dependencies"]["dev"]]:
        asked = Requirement(line)
        version = versions.get(canonicalize_name(asked.name), "none")
        assert version in asked.specifier, f"{line}: locked is {version}; run make lock"


def test_the_lock_is_made_with_the_oldest_python():
    assert "PYTHON_OF_LOCK ?= python3.11\n" in (CHECKOUT / "Makefile").read_text()
