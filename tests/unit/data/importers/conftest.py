"""Corpora to prepare, and where they go."""

import pytest

from nemo_mapo.data.importers.prepare import PrepareOptions, prepare
from nemo_mapo.data.importers.registry import IMPORTERS
from tests.unit.data.importers.corpora import BUILDERS


@pytest.fixture
def corpus(tmp_path):
    """Write the corpus of a name."""

    def build(name):
        (tmp_path / "corpus").mkdir()
        return BUILDERS[name](tmp_path / "corpus")

    return build


@pytest.fixture
def run(tmp_path):
    """Prepare a corpus; returns the report and the output directory."""

    def prepared(name, source, *, output="prepared", **options):
        report = prepare(IMPORTERS[name], source, tmp_path / output, PrepareOptions(**options), progress=False)
        return report, tmp_path / output

    return prepared
