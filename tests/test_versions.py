"""A torch newer than the tested versions comes with a warning."""

import warnings

import pytest

from minisft import versions


def test_a_version_past_the_tested_ones_warns(monkeypatch):
    monkeypatch.setattr(versions, "VERSION", (9, 0))
    with pytest.warns(UserWarning, match=r"newer than 2\.14, the newest that minisft was tested with; .* pip install"):
        versions.warn_if_untested()


@pytest.mark.parametrize("version", [(2, 11), (2, 13), (2, 14)])
def test_a_tested_version_does_not(monkeypatch, version):
    monkeypatch.setattr(versions, "VERSION", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_if_untested()
