"""Makes RTP-LLM's import paths resolve here where RTP-LLM itself is absent, so that code written for it runs unchanged.

python -m rtp_mm.compat CLIENT.py [arguments]     or     -m rtp_llm.start_server [arguments]
import rtp_mm.compat; rtp_mm.compat.install()     in a program of one's own
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_ROOT = "rtp_llm"

_MESSAGES = """from rtp_mm.server.proto import (
    CacheStatusPB, CacheVersionPB, MMPreprocessConfigPB, MultimodalInputPB, MultimodalInputsPB, MultimodalOutputPB,
    MultimodalOutputsPB, StatusVersionPB, TensorPB, WorkerStatusPB,
)
"""
_SERVICE = """from rtp_mm.server.proto import (
    MultimodalRpcServiceServicer, MultimodalRpcServiceStub, add_MultimodalRpcServiceServicer_to_server,
)
"""

# RTP-LLM's module -> its source here. What lies between the root and these is a package.
_SOURCES = {
    f"{_ROOT}.cpp.proto.model_rpc_service_pb2": _MESSAGES,
    f"{_ROOT}.cpp.proto.model_rpc_service_pb2_grpc": _SERVICE,
    f"{_ROOT}.cpp.model_rpc.proto.model_rpc_service_pb2": _MESSAGES,
    f"{_ROOT}.cpp.model_rpc.proto.model_rpc_service_pb2_grpc": _SERVICE,
    f"{_ROOT}.config.gpt_init_model_parameters": (
        "from rtp_mm.models.gpt_init_model_parameters import GptInitModelParameters, VitParameters\n"
    ),
    f"{_ROOT}.model_factory_register": """from rtp_mm.models import registry


def register_model(name, model_type, support_architectures=(), support_hf_repos=()):
    registry.register_model(name, model_type, support_architectures or ())
""",
    f"{_ROOT}.models.multimodal.multimodal_common": """from rtp_mm.models.multimodal_common import (
    AudioEmbeddingInterface, ImageEmbeddingInterface, MultiModalEmbeddingInterface, VideoEmbeddingInterface,
)
""",
    f"{_ROOT}.models.multimodal.multimodal_mixin": (
        "from rtp_mm.models.multimodal_mixin import BaseVitWeights, MultimodalMixin, MultiModalMixin\n"
    ),
    f"{_ROOT}.utils.grpc_util": "from rtp_mm.server.tensors import trans_from_tensor, trans_tensor\n",
    f"{_ROOT}.utils.mm_process_engine": """from rtp_mm.engine.process_engine import MMProcessEngine
from rtp_mm.types import MMEmbeddingRes
""",
    f"{_ROOT}.utils.multimodal_util": "from rtp_mm.types import MMPreprocessConfig, MMUrlType, MultimodalInput\n",
    f"{_ROOT}.start_server": """import sys
from rtp_mm.start_server import main
if __name__ == "__main__":
    sys.exit(main())
""",
}


class _Compat(MetaPathFinder, InspectLoader):
    """Finds and loads the modules of `_SOURCES`, and the packages above them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _SOURCES and not self.is_package(fullname):
            return None
        return ModuleSpec(fullname, self, origin=__name__, is_package=self.is_package(fullname))

    def is_package(self, fullname: str) -> bool:
        return any(name.startswith(f"{fullname}.") for name in _SOURCES)

    def get_source(self, fullname: str) -> str:
        return _SOURCES.get(fullname, "")


def install() -> bool:
    """From now on `import rtp_llm...` resolves here; `False`, and nothing changes, where RTP-LLM is installed."""
    if any(isinstance(finder, _Compat) for finder in sys.meta_path):
        return True
    if importlib.util.find_spec(_ROOT) is not None:
        return False
    sys.meta_path.append(_Compat())
    return True


def main(arguments: list[str]) -> int:
    """Runs a script, or with `-m` a module, as `python` itself would, with the import paths in place."""
    match arguments:
        case ["-m", module, *rest]:
            sys.path[0] = os.getcwd()
            install()
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *_] if not script.startswith("-"):
            if not os.path.exists(script):
                print(f"rtp_mm.compat: there is no {script}", file=sys.stderr)
                return 2
            sys.path[0] = os.path.dirname(os.path.abspath(script))
            install()
            sys.argv = arguments
            runpy.run_path(script, run_name="__main__")
        case _:
            print("usage: python -m rtp_mm.compat CLIENT.py [arguments] | -m MODULE [arguments]", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
