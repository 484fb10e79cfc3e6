"""The start-up hook against a small stand-in for Anomalib: fast, and free to import things in any order.

Every test runs a fresh interpreter without site-packages, so that no other plugin and no other start-up file is seen.
"""

import os
import pkgutil
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import anomalib_vtfusion
from anomalib_vtfusion.plugin import install

PACKAGE = Path(anomalib_vtfusion.__file__).parent
STARTUP = Path(__file__).parents[2] / "startup"

HOST = {
    "anomalib/__init__.py": "",
    "anomalib/data/__init__.py": """
        class AnomalibDataModule: ...
        class Folder(AnomalibDataModule): ...
        __all__ = ["AnomalibDataModule", "Folder"]
    """,
    "anomalib/models/__init__.py": """
        from anomalib.data import AnomalibDataModule
        class AnomalibModule: ...
        class Padim(AnomalibModule): ...
        __all__ = ["Padim"]
        def list_models():
            return sorted(model.__name__ for model in AnomalibModule.__subclasses__())
    """,
    "anomalib/engine.py": "from anomalib.models import AnomalibModule\nclass Engine: ...",
    "anomalib/cli/__init__.py": "",
    "anomalib/cli/cli.py": """
        import sys
        from anomalib.models import list_models
        def main():
            print(sys.argv, list_models())
    """,
}
GOOD = {
    "good/__init__.py": "",
    "good/model.py": "from anomalib.models import AnomalibModule\nclass Good(AnomalibModule): ...",
    "good/data.py": "from anomalib.data import AnomalibDataModule\nclass Parts(AnomalibDataModule): ...",
}
GOOD_ENTRY_POINTS = """
    [anomalib.models]
    Good = good.model:Good
    [anomalib.data]
    Parts = good.data:Parts
"""
# In the alphabet, and so in the order of loading, before the good plugin.
BROKEN = {"broken/__init__.py": "import not_installed"}
BROKEN_ENTRY_POINTS = """
    [anomalib.models]
    Broken = broken.model:Broken
    AlsoBroken = broken.model:AlsoBroken
    [anomalib.data]
    BrokenData = broken.data:Data
"""


class Site:
    """A folder that stands for site-packages, and interpreters that use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.add(HOST)
        package = folder / "anomalib_vtfusion"
        package.mkdir()
        for name in ("__init__", "__main__", "plugin", "registration"):
            shutil.copy(PACKAGE / f"{name}.py", package)
        for file in STARTUP.iterdir():
            shutil.copy(file, folder)

    def add(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))

    def add_plugin(self, name: str, files: dict[str, str], entry_points: str) -> None:
        self.add(files)
        metadata = f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n"
        folder = f"{name}_plugin-1.0.dist-info"
        self.add({f"{folder}/METADATA": metadata, f"{folder}/entry_points.txt": entry_points})

    def run(self, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run code after the start-up files of the folder have been read."""
        start = f"import site; site.addsitedir({str(self.folder)!r})\n"
        return self.python("-I", "-c", start + textwrap.dedent(code), **environment)

    def python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "ANOMALIB_PLUGINS"))}
        command = [sys.executable, "-S", "-B", *arguments]
        variables = {**clean, **environment}
        result = subprocess.run(
            command, cwd=self.folder.parent, env=variables, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        return result


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Return a site with the stand-in host and the good plugin."""
    site = Site(tmp_path / "site")
    site.add_plugin("good", GOOD, GOOD_ENTRY_POINTS)
    return site


def test_start_loads_two_small_modules_only(site: Site) -> None:
    (site.folder / "other").mkdir()
    (site.folder / "other" / "other.pth").write_text("import sys\n")
    code = f"""
        import site, sys
        site.addsitedir({str(site.folder / "other")!r})  # what reading any start-up file takes
        before = set(sys.modules)
        site.addsitedir({str(site.folder)!r})
        print(sorted(set(sys.modules) - before))
    """
    result = site.python("-c", textwrap.dedent(code))
    assert result.stdout.strip() == "['anomalib_vtfusion', 'anomalib_vtfusion.plugin']"


def test_both_startup_files_name_the_same_function() -> None:
    assert pkgutil.resolve_name((STARTUP / "anomalib_vtfusion.start").read_text().strip()) is install
    line = (STARTUP / "anomalib_vtfusion.pth").read_text()
    assert line == "import anomalib_vtfusion.plugin; anomalib_vtfusion.plugin.install()\n"


def test_plugins_are_shown_in_both_registries(site: Site) -> None:
    result = site.run("""
        from anomalib.models import *
        from anomalib.data import Parts
        import anomalib.data, anomalib.models
        print(Good.__module__, Parts.__module__, anomalib.models.list_models())
        print(anomalib.models.__all__, anomalib.data.__all__)
    """)
    assert result.stdout.splitlines() == [
        "good.model good.data ['Good', 'Padim']",
        "['Padim', 'Good'] ['AnomalibDataModule', 'Folder', 'Parts']",
    ]
    assert result.stderr == ""


def test_find_spec_does_not_import_and_loader_is_the_hosts_own(site: Site) -> None:
    result = site.run("""
        import importlib.util, sys
        spec = importlib.util.find_spec("anomalib.models")
        print("anomalib.models" in sys.modules, "class Padim" in spec.loader.get_source("anomalib.models"))
        import anomalib.models
        print(type(anomalib.models.__spec__.loader).__name__, type(anomalib.models.__loader__).__name__)
        print(importlib.util.find_spec("anomalib.nothing"), importlib.util.find_spec("anomalib.engine").loader)
    """)
    first, second, third = result.stdout.splitlines()
    assert first == "False True"
    assert second == "SourceFileLoader SourceFileLoader"
    assert third.startswith("None <_frozen_importlib_external.SourceFileLoader")


def test_reload_keeps_plugins_once(site: Site) -> None:
    result = site.run("""
        import importlib, sys, anomalib.models
        importlib.reload(anomalib.models)
        print(anomalib.models.Good.__name__, anomalib.models.__all__)
        del sys.modules["good.model"]  # the reloaded plugin has a new class, which takes the old one's place
        old = anomalib.models.Good
        importlib.reload(anomalib.models)
        print(anomalib.models.Good is old, anomalib.models.__all__)
        del sys.modules["anomalib.models"]
        import anomalib.models
        print(anomalib.models.Good.__name__, anomalib.models.__all__)
    """)
    assert result.stdout.splitlines() == ["Good ['Padim', 'Good']", "False ['Padim', 'Good']", "Good ['Padim', 'Good']"]
    assert result.stderr == ""


def test_error_in_the_host_itself_is_passed_on(site: Site) -> None:
    site.add({"anomalib/data/__init__.py": "import missing_dependency"})
    result = site.run("""
        for _ in range(2):
            try:
                import anomalib.models
            except ModuleNotFoundError as error:
                print(error)
    """)
    assert result.stdout.splitlines() == ["No module named 'missing_dependency'"] * 2
    assert result.stderr == ""


@pytest.mark.parametrize("first", ["anomalib.models", "anomalib.data", "anomalib.engine"])
def test_broken_plugin_costs_one_warning(site: Site, first: str) -> None:
    site.add_plugin("broken", BROKEN, BROKEN_ENTRY_POINTS)
    result = site.run(f"""
        import {first}
        from anomalib.models import Good, Padim, list_models
        from anomalib.data import Parts
        import anomalib.models
        print(list_models(), anomalib.models.__all__)
    """)
    assert result.stdout.strip() == "['Good', 'Padim'] ['Padim', 'Good']"
    assert result.stderr.count("PluginWarning: ") == 1
    assert "Anomalib plugin broken-plugin: cannot load Broken" in result.stderr
    assert "(ModuleNotFoundError: No module named 'not_installed')" in result.stderr


def test_plugin_that_exits_or_gives_no_class_is_survived(site: Site) -> None:
    entry_points = "[anomalib.models]\nRude = rude:Rude\nnumber = odd:number"
    site.add_plugin("rude", {"rude.py": "raise SystemExit(3)", "odd.py": "number = 3"}, entry_points)
    result = site.run("import anomalib.models as m; print(m.Good.__name__, hasattr(m, 'number'))")
    assert result.stdout.strip() == "Good False"
    assert result.stderr.count("PluginWarning: ") == 2
    assert "cannot load Rude = rude:Rude (SystemExit: 3)" in result.stderr
    assert "number = odd:number is not a class" in result.stderr


def test_host_names_are_never_replaced(site: Site) -> None:
    clash = {"clash.py": "class Padim: ...\nclass Good: ..."}
    site.add_plugin("clash", clash, "[anomalib.models]\nPadim = clash:Padim\nlist_models = clash:Good")
    result = site.run("import anomalib.models as m; print(m.Padim.__module__, m.list_models())")
    assert result.stdout.strip() == "anomalib.models ['Good', 'Padim']"
    assert result.stderr.count("PluginWarning: ") == 2
    assert "clash-plugin: anomalib.models already has the name Padim: not replaced" in result.stderr


@pytest.mark.parametrize("value", ["0", "false", "OFF", " no "])
def test_off_switch(site: Site, value: str) -> None:
    code = "import sys, anomalib.models as m; print(m.list_models(), len(sys.meta_path), 'good' in sys.modules)"
    finders = int(site.run(code).stdout.split()[-2])
    result = site.run(code, ANOMALIB_PLUGINS=value)
    assert result.stdout.strip() == f"['Padim'] {finders - 1} False"


def test_off_switch_after_the_start(site: Site) -> None:
    result = site.run("""
        import os
        os.environ["ANOMALIB_PLUGINS"] = "0"
        from anomalib.models import list_models
        print(list_models())
    """)
    assert result.stdout.strip() == "['Padim']"


@pytest.mark.parametrize(
    "first",
    ["good.model", "good.parts_of_model", "anomalib.engine", "anomalib.cli.cli", "anomalib.data", "good.data"],
)
def test_any_import_order_ends_with_all_plugins_shown(site: Site, first: str) -> None:
    """Whatever is imported first, and so is half imported while the plugins load, ends up as if it had been second."""
    site.add(
        {
            "good/model.py": """
            from anomalib.engine import Engine
            from anomalib.models import AnomalibModule
            from good.parts_of_model import Part
            class Good(AnomalibModule): ...
        """,
            "good/parts_of_model.py": "from anomalib.models import AnomalibModule\nclass Part: ...",
            "anomalib/cli/cli.py": "from anomalib.engine import Engine\nfrom anomalib.models import AnomalibModule",
        }
    )
    result = site.run(f"""
        import {first}
        from anomalib.models import list_models
        from anomalib.data import Parts
        import anomalib.models
        print(list_models(), anomalib.models.Good.__module__, Parts.__module__, anomalib.models.__all__)
        print(type(anomalib.models).__name__)
    """)
    assert result.stdout.splitlines() == ["['Good', 'Padim'] good.model good.data ['Padim', 'Good']", "module"]
    assert result.stderr == ""


def test_command_line_sees_plugins_that_needed_the_engine(site: Site) -> None:
    """The real command holds on to ``AnomalibModule`` from its own import, and never looks at the registry again."""
    site.add(
        {
            "good/model.py": """
            from anomalib.engine import Engine
            from anomalib.models import AnomalibModule
            class Good(AnomalibModule): ...
        """,
            "anomalib/cli/cli.py": "from anomalib.engine import Engine\nfrom anomalib.models import AnomalibModule",
        }
    )
    result = site.run("""
        from anomalib.cli.cli import AnomalibModule
        print([model.__name__ for model in AnomalibModule.__subclasses__()])
    """)
    assert result.stdout.strip() == "['Padim', 'Good']"


def test_threads_that_import_at_the_same_time(site: Site) -> None:
    result = site.run("""
        import threading
        seen, barrier = [], threading.Barrier(8)
        def work(number):
            barrier.wait()
            if number % 2:
                from anomalib.models import Good
                seen.append(Good.__name__)
            else:
                from anomalib.data import Parts
                seen.append(Parts.__name__)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(sorted(seen))
    """)
    assert result.stdout.strip() == str(["Good"] * 4 + ["Parts"] * 4)
    assert result.stderr == ""


def test_beside_another_import_hook_that_searches_all_finders(site: Site) -> None:
    result = site.run("""
        import sys
        class Other:
            def find_spec(self, name, path=None, target=None):
                found = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)
                return next(filter(None, found), None) if name.startswith("anomalib.") else None
        sys.meta_path.insert(1, Other())
        from anomalib.models import Good
        import anomalib.models
        print(anomalib.models.__all__, type(anomalib.models.__loader__).__name__)
    """)
    assert result.stdout.strip() == "['Padim', 'Good'] SourceFileLoader"


def test_install_again_and_late(site: Site) -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(site.folder)!r})
        import anomalib.models  # before the hook: as in a notebook that has just installed the plugin
        print(anomalib.models.list_models())
        from anomalib_vtfusion.plugin import install
        install(); install()
        print(anomalib.models.list_models(), anomalib.models.__all__)
        print(sum(type(finder).__name__ == "RegistryFinder" for finder in sys.meta_path))
    """
    result = site.python("-c", textwrap.dedent(code))
    assert result.stdout.splitlines() == ["['Padim']", "['Good', 'Padim'] ['Padim', 'Good']", "1"]


def test_module_run_gives_the_same_command_without_startup_files(site: Site) -> None:
    result = site.python("-m", "anomalib_vtfusion", "train", "--model", "Good", PYTHONPATH=str(site.folder))
    assert result.stdout.strip() == ("['python -m anomalib_vtfusion', 'train', '--model', 'Good'] ['Good', 'Padim']")
