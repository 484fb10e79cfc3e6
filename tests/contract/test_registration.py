"""Anomalib knows this package's classes by name, in the environment where both are installed.

Nothing here imports the package: that is the point. Importing torch and what comes with it takes most of the time, so
one interpreter imports all of that, but nothing of Anomalib, and a copy of it (fork) then plays each scenario. Before
that its start-up files have been read as in any interpreter. A few interpreters are started for the real commands.
"""

import json
import os
import subprocess
import sys
import sysconfig
import textwrap
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

REINSTALL = "install the package again: pip install -e ."

# Reads {name: {"code", "environment", "path"}} and writes {name: {"returncode", "stdout", "stderr"}}.
PLAYER = """
import json, os, sys, traceback
from pathlib import Path

scenarios, folder = json.load(sys.stdin), Path(sys.argv[1])
import jsonargparse, kornia, lightning.pytorch, omegaconf, open_clip, pandas, timm, torchmetrics, torchvision

assert not any(name.startswith("anomalib.") for name in sys.modules)
results = {}
for name, scenario in scenarios.items():
    child = os.fork()
    if child == 0:
        for number, stream in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / f"{name}.{stream}", os.O_WRONLY | os.O_CREAT), number)
        returncode = 1
        try:
            os.environ.update(scenario["environment"])
            sys.path[:0] = scenario["path"]
            exec(compile(scenario["code"], name, "exec"), {"__name__": "__main__"})
            returncode = 0
        except SystemExit as error:
            returncode = error.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(returncode)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = {stream: (folder / f"{name}.{stream}").read_text() for stream in ("stdout", "stderr")}
    results[name] = {"returncode": status, **texts}
(folder / "results.json").write_text(json.dumps(results))
"""

API = """
import json, os
from anomalib.models import VTFusion, get_model, list_models
from anomalib.data import DemoParts, FewShot, get_datamodule
import anomalib.data, anomalib.models
options = {"encoder": os.environ["ENCODER"]}
print(json.dumps({
    "homes": [VTFusion.__module__, FewShot.__module__, DemoParts.__module__],
    "public": ["VTFusion" in anomalib.models.__all__, {"FewShot", "DemoParts"} <= set(anomalib.data.__all__)],
    "listed": ["VTFusion" in list_models("pascal"), "v_t_fusion" in list_models()],
    "models": [
        type(model) is VTFusion
        for model in (
            get_model("vtfusion", **options),
            get_model({"class_path": "VTFusion", "init_args": options}),
        )
    ],
}))
"""
BENCHMARK = """
import os
from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator
few_shot = {"data": {"class_path": "Folder", "init_args": {"name": "x", "normal_dir": "."}}, "k_shot": 2}
entry = {
    "seed": 0,
    "model": {"class_path": "VTFusion", "init_args": {"encoder": os.environ["ENCODER"]}},
    "data": {"class_path": "FewShot", "init_args": few_shot},
}
job, = BenchmarkJobGenerator(accelerator="cpu").generate_jobs(entry, None)
print(type(job.model).__module__, type(job.datamodule).__module__)
"""
ORDER = """
import sys
import {first}
registry = sys.modules["anomalib.models"]
at_once = [model.__module__ for model in vars(registry)["AnomalibModule"].__subclasses__()]
from anomalib.models import VTFusion, list_models
from anomalib.data import DemoParts, FewShot
print(at_once.count("anomalib_vtfusion.lightning_model"), "VTFusion" in list_models("pascal"), type(registry).__name__)
"""
# Each of these imports anomalib.models on the way, while it is half imported itself.
FIRST_IMPORTS = (
    "anomalib.callbacks",
    "anomalib.cli.cli",
    "anomalib.engine",
    "anomalib.pipelines",
    "anomalib_vtfusion.lightning_model",
)
OTHER_MODELS = """
from anomalib.models import Padim, list_models
import anomalib.data
print("VTFusion" in list_models("pascal"), hasattr(anomalib.data, "FewShot"), Padim.__name__)
"""


def command_line(*arguments: str) -> str:
    return f"import sys\nsys.argv = {['anomalib', *arguments]!r}\nfrom anomalib.cli.cli import main\nmain()\n"


def scenarios(broken_plugin: Path) -> dict[str, dict[str, Any]]:
    """Return what to play: the code, environment variables, and folders to put on the module search path."""
    train = ("train", "--data", "DemoParts", "--print_config")
    predict = ("predict", "--model", "VTFusion", "--data", "DemoParts", "--print_config")
    plain = {
        "api": API,
        "benchmark": BENCHMARK,
        "predict": command_line(*predict),
        "train_dotted": command_line(*train, "--model", "anomalib_vtfusion.VTFusion"),
        **{f"order_{first}": ORDER.format(first=first) for first in FIRST_IMPORTS},
    }
    few_shot = ("--data", "FewShot", "--data.data", "Folder", "--data.data.name", "x", "--data.k_shot", "2")
    plain["few_shot"] = command_line("train", "--model", "VTFusion", *few_shot, "--print_config")
    played = {name: {"code": code, "environment": {}, "path": []} for name, code in plain.items()}
    played["off"] = {"code": OTHER_MODELS, "environment": {"ANOMALIB_PLUGINS": "0"}, "path": []}
    for first in ("anomalib.models", "anomalib.engine"):
        code = f"import {first}\n{OTHER_MODELS}"
        played[f"broken_{first}"] = {"code": code, "environment": {}, "path": [str(broken_plugin)]}
    return played


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in an empty folder, so that only what is installed is found."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ANOMALIB_PLUGINS"))}
    variables = {**clean, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, cnn_encoder: str) -> dict[str, dict[str, Any]]:
    """Play all scenarios, once."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    plugin = tmp_path_factory.mktemp("plugin")
    metadata = plugin / "broken_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    groups = "[anomalib.models]\nBroken = broken_plugin:Broken\n[anomalib.data]\nBrokenData = broken_plugin:Data\n"
    (metadata / "entry_points.txt").write_text(groups)
    (plugin / "broken_plugin.py").write_text("import not_installed_anywhere\n")

    folder = tmp_path_factory.mktemp("played")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ANOMALIB_PLUGINS"))}
    result = subprocess.run(
        [sys.executable, "-c", PLAYER, str(folder)],
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1", "ENCODER": cnn_encoder},
        input=json.dumps(scenarios(plugin)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    results: dict[str, dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return results


def stdout_of(played: dict[str, dict[str, Any]], name: str) -> str:
    assert played[name]["returncode"] == 0, played[name]["stderr"]
    assert "PluginWarning" not in played[name]["stderr"]
    return str(played[name]["stdout"])


def test_startup_files_are_installed_and_so_removed_by_uninstall() -> None:
    files = {str(file): file for file in distribution("anomalib-vtfusion").files or []}
    for name in ("anomalib_vtfusion.pth", "anomalib_vtfusion.start"):
        assert name in files, REINSTALL
        assert Path(files[name].locate()).is_file(), REINSTALL


def test_any_interpreter_starts_with_the_hook_and_nothing_heavy(tmp_path: Path) -> None:
    code = "import json, sys; print(json.dumps([[type(f).__name__ for f in sys.meta_path], sorted(sys.modules)]))"
    finders, modules = json.loads(run([sys.executable, "-c", code], tmp_path).stdout)
    assert finders.count("RegistryFinder") == 1, REINSTALL
    assert [name for name in modules if "vtfusion" in name] == ["anomalib_vtfusion", "anomalib_vtfusion.plugin"]
    assert {"anomalib", "importlib.metadata", "lightning", "numpy", "torch"}.isdisjoint(modules)


def test_names_in_python(played: dict[str, dict[str, Any]]) -> None:
    found = json.loads(stdout_of(played, "api").splitlines()[-1])
    assert found["homes"] == [
        "anomalib_vtfusion.lightning_model",
        "anomalib_vtfusion.data.few_shot",
        "anomalib_vtfusion.data.demo",
    ]
    assert found["public"] == [True, True]
    assert found["listed"] == [True, True]
    assert found["models"] == [True, True]


def test_names_in_a_benchmark_entry(played: dict[str, dict[str, Any]]) -> None:
    last = stdout_of(played, "benchmark").splitlines()[-1]
    assert last == "anomalib_vtfusion.lightning_model anomalib_vtfusion.data.few_shot"


@pytest.mark.parametrize("name", ["predict", "train_dotted"])
def test_names_on_the_command_line(played: dict[str, dict[str, Any]], name: str) -> None:
    config = stdout_of(played, name)
    assert "class_path: anomalib_vtfusion.VTFusion" in config
    assert "class_path: anomalib_vtfusion.DemoParts" in config


def test_few_shot_of_another_datamodule_on_the_command_line(played: dict[str, dict[str, Any]]) -> None:
    config = stdout_of(played, "few_shot")
    assert "class_path: anomalib_vtfusion.FewShot" in config
    assert "class_path: anomalib.data.Folder" in config
    assert "k_shot: 2" in config


@pytest.mark.parametrize("first", FIRST_IMPORTS)
def test_any_import_order(played: dict[str, dict[str, Any]], first: str) -> None:
    """The class is there, once, right after the first import, whichever that is."""
    assert stdout_of(played, f"order_{first}").splitlines()[-1] == "1 True module"


@pytest.mark.parametrize("first", ["anomalib.models", "anomalib.engine"])
def test_broken_plugin_costs_one_warning(played: dict[str, dict[str, Any]], first: str) -> None:
    result = played[f"broken_{first}"]
    assert result["returncode"] == 0, result["stderr"]
    assert result["stdout"].splitlines()[-1] == "True True Padim"
    assert result["stderr"].count("PluginWarning: ") == 1
    assert "Anomalib plugin broken-plugin: cannot load Broken" in result["stderr"]
    assert "ModuleNotFoundError: No module named 'not_installed_anywhere'" in result["stderr"]


def test_off_switch(played: dict[str, dict[str, Any]]) -> None:
    assert stdout_of(played, "off").splitlines()[-1] == "False False Padim"


def test_the_anomalib_command_itself(tmp_path: Path) -> None:
    script = Path(sysconfig.get_path("scripts")) / ("anomalib.exe" if os.name == "nt" else "anomalib")
    result = run([str(script), "train", "--model", "VTFusion", "--data", "DemoParts", "--print_config"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "class_path: anomalib_vtfusion.VTFusion" in result.stdout
    assert "class_path: anomalib_vtfusion.DemoParts" in result.stdout


def test_module_run_where_startup_files_are_not_read(tmp_path: Path) -> None:
    """As after ``pip install --target``: the folder is on the search path, but is no site-packages."""
    path = os.pathsep.join(entry for entry in sys.path if entry and Path(entry).is_dir())
    arguments = ["train", "--model", "VTFusion", "--data", "DemoParts", "--print_config"]
    result = run([sys.executable, "-S", "-m", "anomalib_vtfusion", *arguments], tmp_path, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    assert "class_path: anomalib_vtfusion.VTFusion" in result.stdout
    assert "class_path: anomalib_vtfusion.DemoParts" in result.stdout


def test_spawned_worker(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(
        textwrap.dedent("""
            def work():
                from anomalib.models import list_models
                return "VTFusion" in list_models("pascal")
        """)
    )
    code = """
        import multiprocessing, sys, work
        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.apply(work.work), "anomalib.models" in sys.modules)
    """
    (tmp_path / "main.py").write_text(textwrap.dedent(code))
    result = run([sys.executable, "main.py"], tmp_path)
    assert result.stdout.splitlines()[-1:] == ["True False"], result.stderr
