"""What differs between the versions of torch is known, and a newer one than was tested is said."""

import warnings

import pytest

from minisft import versions


def test_a_version_past_the_tested_ones_is_said(monkeypatch):
    monkeypatch.setattr(versions, "VERSION", (9, 0))
    with pytest.warns(UserWarning, match=r"newer than the newest that minisft was tested with, 2\.14; .* pip install"):
        versions.warn_if_untested()


@pytest.mark.parametrize("version", [(2, 11), (2, 13), (2, 14)])
def test_a_tested_version_is_not(monkeypatch, version):
    monkeypatch.setattr(versions, "VERSION", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_if_untested()
