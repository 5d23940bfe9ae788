"""What the documentation says is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flightquant import errors, schemes, spec, wire

ROOT = Path(__file__).parents[1]
CONTRACT = (ROOT / "docs/contract.md").read_text()
README = (ROOT / "README.md").read_text()
FORMATS = {page.name: page.read_text() for page in (ROOT / "docs/formats").glob("*.md")}


def test_the_readme_shows_the_stock_client_as_it_is_tested() -> None:
    code = (ROOT / "examples/stock_client.py").read_text().split('"""\n', 1)[1].strip()
    assert code in README
    assert len(code.splitlines()) <= 40


@pytest.mark.parametrize("scheme", schemes.SCHEMES)
def test_every_scheme_is_documented(scheme: str) -> None:
    index = (ROOT / "docs/formats.md").read_text()
    assert f"`{scheme}`" in index
    assert f"`{scheme}`" in README
    assert f'`"{scheme}"`' in CONTRACT


@pytest.mark.parametrize("page", FORMATS)
def test_every_page_of_a_format_is_in_the_index(page: str) -> None:
    assert f"(formats/{page})" in (ROOT / "docs/formats.md").read_text()


@pytest.mark.parametrize(
    "packing", sorted({packing for scheme in schemes.SCHEMES.values() for packing in scheme.packings})
)
def test_every_packing_is_documented(packing: str) -> None:
    assert any(f"packing: {packing}`" in text or f"| `{packing}`" in text for text in FORMATS.values())


@pytest.mark.parametrize("name", [field.name for field in wire.ANSWER_FIELDS] + list(spec.OVERRIDE_KEYS))
def test_every_column_is_in_the_contract(name: str) -> None:
    assert f"`{name}`" in CONTRACT


@pytest.mark.parametrize("code", [*errors.ERRORS, *errors.ROW_STATUSES])
def test_every_error_code_is_in_the_contract(code: str) -> None:
    assert f"`{code}`" in CONTRACT


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
