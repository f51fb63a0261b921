"""The list of mutants stays true: their text is there once, their tests exist."""

import ast
import re
from pathlib import Path

import pytest

from tests.numerics import mutants
from tests.numerics.mutants import MUTANTS, ROOT, Mutant
from tests.numerics.test_variants import VARIANTS


def test_there_are_at_least_twenty_with_names_of_their_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_mutant_can_be_made_and_its_test_exists(mutant: Mutant) -> None:
    assert mutants.occurrences(mutant) == 1
    assert mutant.source != mutant.replacement
    file, _, test = mutant.test.partition("::")
    tree = ast.parse(Path(ROOT, "tests", file).read_text(encoding="utf-8"))
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    name, _, case = test.partition("[")
    assert name in functions
    assert not case or case.rstrip("]") in {variant.name for variant in VARIANTS}


@pytest.mark.slow
def test_a_mutant_is_caught_and_the_untouched_code_is_not() -> None:
    """That the script tells the two apart; `make mutants` tries them all."""
    mutant = next(found for found in MUTANTS if found.name == "weights over their sum")
    untouched = Mutant("none", mutant.file, mutant.source, mutant.source, mutant.test)
    assert mutants.is_caught(mutant)
    assert not mutants.is_caught(untouched)


def test_a_mutant_whose_test_is_gone_is_no_catch() -> None:
    gone = Mutant("gone", mutants.LOSS, "-weight_B", "weight_B", "numerics/no_such_test.py")
    with pytest.raises(RuntimeError, match=re.escape("no_such_test.py")):
        mutants.is_caught(gone)
