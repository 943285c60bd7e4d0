from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from fake_engine import serving

import rtp_mm
from rtp_mm import compat
from rtp_mm.models import registry
from rtp_mm.models.multimodal_mixin import MultimodalMixin

ROOT = Path(__file__).parents[1]
DEBUG_CLIENT = ROOT / "tests" / "data" / "debug_client.py"
PORT, PATH = "localhost:12346", "/mnt/nas1/hf/llava-v1.5-7b/1.jpg"  # as documented


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


async def test_rtp_llms_debug_client_runs_word_for_word(tmp_path: Path) -> None:
    text = DEBUG_CLIENT.read_text()
    assert text.count(PORT) == text.count(PATH) == 1
    client = tmp_path / "client.py"
    async with serving() as server:
        port = f"localhost:{server.settings.start_port + 1}"
        client.write_text(text.replace(PORT, port).replace(PATH, "img:2"))
        done = await asyncio.to_thread(python, "-m", "rtp_mm.compat", str(client))
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "tensor([[0., 1., 2., 3., 4.],\n        [5., 6., 7., 8., 9.]], dtype=torch.bfloat16)\n"
        "tensor([[0, 1, 2],\n        [3, 4, 5]], dtype=torch.int32)\n"
    )
    (item,), caller, _ = server.engine.asked[0]
    assert (item.url, item.mm_type, item.config) == ("img:2", 1, rtp_mm.MMPreprocessConfig(mm_timeout_ms=0))
    assert caller.is_local


@pytest.mark.parametrize("name", sorted(compat._SOURCES))
def test_every_import_path_of_the_design_resolves(name: str) -> None:
    assert compat.install()
    assert compat.install()  # again: nothing changes
    assert importlib.util.find_spec(name) is not None
    if name != "rtp_llm.start_server":
        module = importlib.import_module(name)
        assert all(hasattr(module, public) for public in vars(module))
        assert any(not public.startswith("_") for public in vars(module))


def test_classes_are_ours_and_one() -> None:
    compat.install()
    from rtp_llm.cpp.model_rpc.proto.model_rpc_service_pb2 import TensorPB as Other
    from rtp_llm.cpp.proto.model_rpc_service_pb2 import TensorPB
    from rtp_llm.utils.multimodal_util import MMUrlType

    assert TensorPB is Other
    assert MMUrlType is rtp_mm.MMUrlType


def test_models_are_registered_with_rtp_llms_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the names of repositories say nothing here."""
    compat.install()
    from rtp_llm.model_factory_register import register_model

    for name in ("_classes", "_types_by_architecture"):
        monkeypatch.setattr(registry, name, {})
    register_model("a", MultimodalMixin, ["A"], ["maker/a"])
    register_model("b", MultimodalMixin, support_architectures=["B"])
    register_model("c", MultimodalMixin, None)
    assert [*registry._classes] == ["a", "b", "c"]
    assert registry._types_by_architecture == {"A": "a", "B": "b"}


def test_what_rtp_llm_has_besides_is_not_there() -> None:
    compat.install()
    with pytest.raises(ModuleNotFoundError, match=r"rtp_llm\.ops"):
        importlib.import_module("rtp_llm.ops")


def test_the_real_package_wins(tmp_path: Path) -> None:
    (tmp_path / "rtp_llm").mkdir()
    (tmp_path / "rtp_llm" / "__init__.py").write_text("real = True")
    code = "import rtp_mm.compat; print(rtp_mm.compat.install()); import rtp_llm; print(rtp_llm.real)"
    done = python("-c", code, cwd=tmp_path)
    assert done.stdout == "False\nTrue\n", done.stderr


def test_a_script_runs_as_python_would_run_it(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("word = 'beside'")
    (tmp_path / "script.py").write_text(
        "import sys, beside, rtp_llm.utils.multimodal_util\n"
        "print(__name__, sys.argv[1:], sys.argv[0] == __file__, beside.word)\n"
        "sys.exit(3)\n"
    )
    done = python("-m", "rtp_mm.compat", str(tmp_path / "script.py"), "--flag", "x")
    assert (done.returncode, done.stdout) == (3, "__main__ ['--flag', 'x'] True beside\n"), done.stderr


def test_rtp_llms_start_command_starts_ours() -> None:
    done = python("-m", "rtp_mm.compat", "-m", "rtp_llm.start_server", "--vit_separation", "2")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("rtp_mm.start_server: VIT_SEPARATION=2 ")


def test_a_script_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert compat.main(["/no/such/client.py"]) == 2
    assert capsys.readouterr().err == "rtp_mm.compat: there is no /no/such/client.py\n"


def test_without_a_script_it_says_how() -> None:
    done = python("-m", "rtp_mm.compat")
    assert done.returncode == 2
    assert "usage: python -m rtp_mm.compat" in done.stderr


@pytest.mark.parametrize("name", rtp_mm.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(rtp_mm, name) is not None
    assert name in dir(rtp_mm)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rtp_mm.nothing


def test_the_version_is_the_projects() -> None:
    assert rtp_mm.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
