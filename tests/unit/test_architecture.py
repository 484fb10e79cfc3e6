"""Who may import whom, read from the source files without running them."""

import ast
import sys
from pathlib import Path

import pytest

import anomalib_vtfusion

PACKAGE = Path(anomalib_vtfusion.__file__).parent
NAME = PACKAGE.name
LONGEST_FILE = 350
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
# Small helpers without a subject of their own, which any component may use.
LEAVES = {"components/frozen_state", "components/predictions", "components/variable_buffers"}
ENCODERS = {name for name in FILES if name.startswith("components/encoder")}


def imports_of(name: str) -> set[str]:
    """Dotted names of all modules that a file imports, anywhere in it; relative imports resolved."""
    found: set[str] = set()
    package = [NAME, *name.split("/")][:-1]
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)  # from package import module
    return found


def foreign(name: str) -> set[str]:
    """Top-level packages that a file imports."""
    return {module.partition(".")[0] for module in imports_of(name)}


def own(name: str) -> set[str]:
    """Files of the package that a file imports."""
    prefix = f"{NAME}."
    paths = {module.removeprefix(prefix).replace(".", "/") for module in imports_of(name) if module.startswith(prefix)}
    return {path for path in paths if path in FILES} | {f"{p}/__init__" for p in paths if f"{p}/__init__" in FILES}


def files_of(part: str) -> list[str]:
    """Files of a subpackage, or the file of that name."""
    return [name for name in FILES if name == part or name.startswith(f"{part}/")]


def test_the_reader_sees_imports_of_every_form(monkeypatch, tmp_path):
    source = "import a.b\nfrom c import d\nfrom .scene import Scene\nfrom .. import loss\ndef f():\n    import g\n"
    (tmp_path / "file.py").write_text(source)
    monkeypatch.setitem(FILES, "synthesis/masks", tmp_path / "file.py")
    assert foreign("synthesis/masks") == {"a", "c", "g", NAME}
    assert own("synthesis/masks") == {"synthesis/scene", "loss", "__init__"} - {"__init__"}


@pytest.mark.parametrize("part", ["prompting", "synthesis", "loss", "components"])
def test_the_parts_know_nothing_of_the_host_or_of_each_other(part):
    for name in files_of(part):
        assert not foreign(name) & {"lightning", "pytorch_lightning", "anomalib"}, name
        outside = {imported for imported in own(name) if imported not in files_of(part)}
        assert not outside, f"{name} imports {outside}"


def test_components_know_each_other_only_through_small_helpers():
    for name in sorted(set(files_of("components")) - ENCODERS):
        assert own(name) <= LEAVES, name
    for name in LEAVES:
        assert not own(name), name
    for name in ENCODERS:
        assert own(name) <= ENCODERS, name


def test_only_the_encoders_import_open_clip():
    for library in ("open_clip", "timm", "huggingface_hub"):
        importers = {name for name in FILES if library in foreign(name)}
        assert importers <= ENCODERS, library


def test_only_the_model_puts_the_components_together():
    importers = {name for name in FILES if any(imported.startswith("components/") for imported in own(name))}
    assert importers - set(files_of("components")) <= {"torch_model", "lightning_model"}


def test_only_the_lightning_model_and_its_calibration_call_the_synthesis():
    importers = {name for name in FILES if any(imported.startswith("synthesis/") for imported in own(name))}
    # The package's front page names the synthesizer without loading it.
    assert importers - set(files_of("synthesis")) <= {"lightning_model", "calibration", "__init__"}


def test_the_network_knows_nothing_of_lightning():
    assert "lightning" not in foreign("torch_model")


@pytest.mark.parametrize("name", ["plugin", "registration", "prompting"])
def test_standard_library_only(name):
    assert foreign(name) <= sys.stdlib_module_names | {NAME}
    assert own(name) <= {"registration"} if name == "plugin" else not own(name)


def test_start_up_imports_nothing():
    """The package's ``__init__`` runs at every interpreter start."""
    tree = ast.parse(FILES["__init__"].read_text(encoding="utf-8"))
    assert not [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]


def test_the_package_never_imports_its_surroundings():
    for name in FILES:
        assert not foreign(name) & {"benchmarks", "tests", "pytest"}, name


@pytest.mark.parametrize("name", FILES)
def test_every_file_has_one_subject_and_says_which(name):
    source = FILES[name].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST_FILE
    assert ast.get_docstring(ast.parse(source))
