"""What an evaluation edits keeps the parameters of the model, or is refused before anything runs."""

import pytest

from lcx.data.sources import StandardLibrary
from lcx.evaluation.evaluation import Evaluation
from lcx.evaluation.tasks.perplexity import Perplexity
from lcx.positions.clex import CLEX
from lcx.positions.yarn import YaRN
from lcx.spec import SpecError

TASKS = (Perplexity(source=StandardLibrary(split="heldout")),)


def evaluation(*edits):
    return Evaluation(model="copier", tasks=TASKS, lengths=(128,), edits=edits)


def test_edits_that_keep_the_parameters_are_taken():
    yarn = YaRN(factor=4.0, original_length=128)
    assert evaluation(("model.rope", yarn)).experiment().model.rope == yarn


@pytest.mark.parametrize(
    "edit, said",
    [
        (("model.width", 64), r"of shape \(.*64.*\), the trained model has \(.*96"),
        (("model.rope", CLEX(original_length=128)), r"rope/down of shape \(.*, the trained model has none"),
    ],
)
def test_edits_that_need_other_parameters_are_refused(edit, said):
    with pytest.raises(SpecError, match=rf"Evaluation.edits: parameter .*{said}.*: expected edits that keep its parameters"):
        evaluation(edit).experiment()
