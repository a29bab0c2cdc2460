"""What stands in SAPO_ variables and cannot be used is named, with its variable."""

from pathlib import Path

import pytest

from sapo_learner.errors import ConfigError
from services.runtime.settings import Environment


@pytest.mark.parametrize("value", ["soon", "0", "-1", ""])
def test_a_patience_that_is_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPO_PATIENCE_SECONDS", value)
    with pytest.raises(ConfigError, match=r"^environment SAPO_PATIENCE_SECONDS: Input should be .* \(set it anew"):
        Environment()


def test_secrets_in_no_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (path := tmp_path / "secret").write_text("hush")
    monkeypatch.setenv("SAPO_SECRETS_DIR", str(path))
    with pytest.raises(ConfigError, match=r"^environment SAPO_SECRETS_DIR: cannot be read"):
        Environment()


def test_a_secret_that_is_wrong_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="environment SAPO_TOKEN: ") as raised:
        Environment(token=["hush"])
    assert "hush" not in str(raised.value)
