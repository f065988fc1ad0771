"""Fixtures of all tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def no_cache_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that another test or run compiled is found; a test of the cache asks for `cache_folder`."""
    monkeypatch.setenv("QFX_CACHE_DIR", "")


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_cache_on_disk: None) -> Path:
    """An empty folder that is the cache of compiled models during the test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("QFX_CACHE_DIR", str(folder))
    return folder
