"""What is written beside a measured number, and how."""

import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import provenance as module
from benchmarks.provenance import ROOT, provenance, write_json


def test_provenance_names_versions_and_device_but_no_host_and_no_path() -> None:
    found = provenance()
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"anomalib", "torch", "anomalib-vtfusion"} <= found["versions"].keys()
    assert found["device"]["cores"] >= 1
    text = json.dumps(found)
    assert str(ROOT) not in text
    assert str(Path.home()) not in text
    assert socket.gethostname() not in text


def test_commit_and_dirty_flag_follow_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert (provenance()["commit"], provenance()["dirty"]) == (None, None)

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    assert (provenance()["commit"], provenance()["dirty"]) == (git("rev-parse", "HEAD"), False)

    result = tmp_path / "benchmarks" / "results" / "a.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    git("add", ".")
    assert provenance()["dirty"] is False  # results are what a benchmark is there to change
    (tmp_path / "code.py").write_text("2")
    assert provenance()["dirty"] is True


def test_write_json_replaces_the_whole_file_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    assert write_json(path, {"a": 1}) == path
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": math.nan})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_write_json_leaves_no_temporary_file_when_it_fails(tmp_path: Path) -> None:
    (tmp_path / "result.json").mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError, match=r"result\.json"):
        write_json(tmp_path / "result.json", {"a": 1})
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
