"""The planted faults still find their places; `python tests/mutations.py` plants them."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "mutations.py"
specification = importlib.util.spec_from_file_location("mutations", SCRIPT)
mutations = importlib.util.module_from_spec(specification)
specification.loader.exec_module(mutations)


@pytest.mark.parametrize("fault", mutations.FAULTS, ids=lambda fault: fault.name)
def test_a_fault_changes_one_place_of_its_file(fault):
    text = (mutations.ROOT / fault.file).read_text()
    changed = mutations.with_fault(text, fault)
    assert changed != text
    compile(changed, fault.file, "exec")


def test_each_trap_of_the_method_has_a_fault():
    numbers = {int(fault.name.split()[0]) for fault in mutations.FAULTS if fault.name[0].isdigit()}
    assert numbers >= set(range(1, 10))
