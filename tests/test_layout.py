"""The package reads in one direction, and the parts that preprocess workers read know no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rtp_mm

PACKAGE = Path(rtp_mm.__file__).parent

# Later lines may import from earlier ones and from their own. A name stands for a file or for a folder.
LAYERS = [
    {"errors", "cores"},
    {"types", "config", "logs"},
    {"lru"},
    {"_core"},
    {"ops"},
    {"media"},
    {"preprocess"},
    {"vit"},
    {"models"},
    {"random_checkpoint"},
    {"engine"},
    {"server"},
    {"library", "start_server", "compat"},
    {"__init__", "cli"},
]
# What every line may name.
VOCABULARY = {"rtp_mm.__version__"}
TORCH_FREE = [
    *("rtp_mm", "rtp_mm.types", "rtp_mm.errors", "rtp_mm.config", "rtp_mm.media", "rtp_mm.preprocess"),
    *("rtp_mm.engine.worker_pool", "rtp_mm.vit.read_ahead", "rtp_mm.server.app", "rtp_mm.library"),  # read before it
]


def layer(module: str) -> int:
    """The line of `rtp_mm.x.y`; of the package itself, the last."""
    part = module.split(".")[1] if "." in module else "__init__"
    matches = [number for number, names in enumerate(LAYERS) if part in names]
    assert matches, f"{module} has no place in LAYERS"
    return matches[0]


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str) -> Iterator[str]:
    """Modules of ours that a file imports anywhere, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            # `from rtp_mm import _core` names a module, `from rtp_mm.types import Patches` a thing in one
            names = [f"rtp_mm.{a.name}" for a in node.names] if node.module == "rtp_mm" else [node.module or ""]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "rtp_mm")


def upward_imports(name: str, source: str) -> list[str]:
    return [target for target in imports(source) if target not in VOCABULARY and layer(target) > layer(name)]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_files_import_only_from_lines_above(file: Path) -> None:
    assert upward_imports(module_name(file), file.read_text()) == []


def test_an_import_from_below_is_found() -> None:
    source = "def late():\n    from rtp_mm.server.wire import parse\n"
    assert upward_imports("rtp_mm.media.fetch", source) == ["rtp_mm.server.wire"]
    assert upward_imports("rtp_mm.start_server", source) == []


def modules_after(imported: list[str]) -> set[str]:
    """All modules in a fresh interpreter after these imports."""
    code = f"import {', '.join(imported)}, sys; print(*sys.modules, sep=chr(10))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_what_preprocess_workers_read_imports_no_torch() -> None:
    folders = [module_name(file) for part in ("media", "preprocess") for file in (PACKAGE / part).rglob("*.py")]
    assert "torch" not in modules_after([*TORCH_FREE, *folders])
    assert "torch" in modules_after(["rtp_mm.models.registry"])


@pytest.mark.parametrize("door", ["rtp_mm.start_server", "rtp_mm.cli", "rtp_mm.compat"])
def test_commands_answer_help_without_torch(door: str) -> None:
    loaded = modules_after([door])
    assert loaded.isdisjoint({"torch", "transformers"})


def test_transformers_is_imported_by_the_peers_alone() -> None:
    """That is, only when a comparison runs."""
    users = [module_name(file) for file in FILES if "transformers" in foreign_imports(file.read_text())]
    assert users == ["rtp_mm.cli.hugging_face", "rtp_mm.cli.hugging_face_audio"]


def foreign_imports(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}


def test_dali_is_imported_in_one_file() -> None:
    assert [module_name(file) for file in FILES if "nvidia" in foreign_imports(file.read_text())] == [
        "rtp_mm.media.dali"
    ]


def test_ffmpeg_is_imported_by_the_readers_of_clips_and_sounds_alone() -> None:
    """And only when one is opened: other files of a server without PyAV work."""
    importers = {module_name(file) for file in FILES if "av" in foreign_imports(file.read_text())}
    assert importers == {f"rtp_mm.media.{name}" for name in ("audio", "container", "packet_index", "video")}
    assert "av" not in modules_after(["rtp_mm.preprocess.media"])


def swallows_all(handler: ast.ExceptHandler) -> bool:
    """Whether it catches whatever comes, and does not raise it again as it came."""
    is_blanket = handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException")
    last = handler.body[-1]
    return is_blanket and not (isinstance(last, ast.Raise) and last.exc is None)


def test_blanket_excepts_stand_at_the_edge_of_a_process_or_around_a_third_partys_code() -> None:
    """The server's, where an error becomes an answer, and a worker's, where it becomes a message to the server."""
    nodes = {path: ast.walk(ast.parse(path.read_text())) for path in FILES}
    blanket = {
        module_name(path)
        for path, tree in nodes.items()
        if any(isinstance(node, ast.ExceptHandler) and swallows_all(node) for node in tree)
    }
    assert blanket == {"rtp_mm.server.servicer", "rtp_mm.preprocess.worker", "rtp_mm.engine.third_party"}
