"""Where a measured number comes from, and how it is written down.

Every result file holds :func:`provenance`: commit, versions and device. No host name and no path goes into it.
Standard library only, so that a measurement of start-up time can use it.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DISTRIBUTIONS = (
    "anomalib-vtfusion",
    "anomalib",
    "open_clip_torch",
    "torch",
    "torchvision",
    "timm",
    "kornia",
    "lightning",
    "numpy",
)


def provenance() -> dict[str, Any]:
    """Return what a reader needs to repeat a measurement.

    Returns:
        ``commit`` (40 hex digits, or None outside a git checkout), ``dirty`` (whether tracked files other than results
        differ from that commit; None outside a checkout), ``date`` (UTC, ISO 8601, seconds), ``versions`` (of Python
        and of each installed distribution named in :data:`DISTRIBUTIONS`), and ``device``: ``cpu`` (model name),
        ``cores`` (usable by this process), ``load`` (mean number of busy processes over the last minute, or None),
        ``platform``, and ``gpu`` (name, or None; looked up only if this process has imported torch already).
    """
    status = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "device": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
            "platform": f"{platform.system()} {platform.machine()}",
            "gpu": _gpu_name(),
        },
    }


def write_json(path: str | Path, payload: Mapping[str, Any]) -> Path:
    """Write a result file in one step: a reader sees the old file or the whole new one, also after a crash.

    Args:
        path: File to write; its folder is made if needed.
        payload: Plain values. NaN and infinities are refused, for they are not JSON.

    Returns:
        The path written.

    Raises:
        ValueError: If a number is NaN or infinite.
        TypeError: If a value is no plain JSON value.
    """
    path = Path(path)
    text = json.dumps(payload, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, for a rename across file systems is not atomic.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)  # mkstemp makes the file unreadable for others
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _git(*arguments: str) -> str | None:
    """Return what git says about this project's own checkout, or None without git or without a checkout."""
    if not (ROOT / ".git").exists():
        return None
    try:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _gpu_name() -> str | None:
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
