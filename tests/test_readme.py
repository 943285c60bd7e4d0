"""What the README says works as it stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import rtp_mm
from benchmarks.readme import DOCUMENTS, media, rendered
from rtp_mm import errors
from rtp_mm.cli.options import markdown_table
from rtp_mm.config import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ERROR_NAMES = {cls.name for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.MMError)}


def test_every_option_is_listed_as_it_is() -> None:
    options = (ROOT / "docs" / "OPTIONS.md").read_text()
    assert options.endswith(f"\n{markdown_table()}"), "paste the output of: rtp-mm options --markdown"
    assert all(f"`{name.upper()}`" in markdown_table() for name in Settings.model_fields)


def test_the_example_model_is_served(tmp_path: Path, photo_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, checkpoint = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "MyModelFor" in code)
    Path("my_model.py").write_text(model)
    exec(compile(checkpoint, "README.md", "exec"), {})
    with rtp_mm.create_engine(
        checkpoint_path="my_checkpoint", mm_model_module="my_model.py", act_type="fp32", device="cpu"
    ) as engine:
        embedding = engine.submit([photo_path]).embeddings[0]
    assert embedding.shape == (16, 8)
    assert torch.equal(embedding[:, 3:], torch.full((16, 5), 0.5))
    assert embedding[:, :3].min() >= 0.5


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_measured_tables_are_those_of_the_committed_results(document: Path) -> None:
    assert rendered(document.read_text()) == document.read_text(), "run python -m benchmarks.readme"


def test_every_option_that_is_named_is_one() -> None:
    """In the README and the documents beside it; RTP_MM_ and TORCH are the build's, OTEL_ the SDK's."""
    known = {name.upper() for name in Settings.model_fields}
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        named = set(re.findall(r"(?<![A-Z_])(?:MM|VIT)_[A-Z0-9_]+", document.read_text()))
        assert named - ERROR_NAMES <= known, document.name


def test_every_link_leads_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
            path, _, anchor = target.partition("#")
            linked = document.parent / path if path else document
            assert linked.exists(), f"{document.name}: {target}"
            assert not anchor or anchor in anchors(linked), f"{document.name}: {target}"


def anchors(document: Path) -> set[str]:
    """Of its headings."""
    headings = re.findall(r"^#+ (.*)", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("has_dali", [True, False])
def test_a_table_of_media_has_dali_only_where_it_was_there(
    has_dali: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jpeg = {"bytes": 1000, "Pillow": {"median": 4.0}, "ours": {"median": 2.0}}
    formats = {"JPEG": jpeg | ({"DALI": {"median": 3.0}} if has_dali else {}), "GIF": jpeg}
    (tmp_path / "images.json").write_text(json.dumps({"formats": formats}))
    monkeypatch.setattr("benchmarks.readme.RESULTS", tmp_path)
    header, _, first, second = media("images", "photograph as", "Pillow").splitlines()
    assert header == "| photograph as | KB | Pillow, ms | ours, ms |  |" + (" DALI, ms |" if has_dali else "")
    assert first == "| JPEG | 1 | 4.0 | 2.0 | 2.0x |" + (" 3.0 |" if has_dali else "")
    assert second == "| GIF | 1 | 4.0 | 2.0 | 2.0x |" + ("  |" if has_dali else "")
