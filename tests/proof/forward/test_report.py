"""What a forward check says in one sentence."""

from typing import Any

import pytest

from lora_build.proof.forward.report import ForwardReport, PromptComparison
from lora_build.proof.forward.trace import Traced

OTHERS = "; these tensors have other values: a.weight"


def report(*, unmerged: float = 0.0, unexplained: float = 0.0, **more: Any) -> ForwardReport:
    numbers = {"difference": 0.5, "rounding": 0.25, "allowance": 0.125, "top1": 1.0, "kl": 0.0}
    prompt = PromptComparison(prompt="eel", num_tokens=1, unmerged=unmerged, unexplained=unexplained, **numbers)
    return ForwardReport(dtypes=("bfloat16",), seed=0, prompts=(prompt,), **more)


@pytest.mark.parametrize("others", [(), ("a.weight",)])
def test_where_the_models_part_and_which_tensors_are_others_is_said(others: tuple[str, ...]) -> None:
    begin = "the build does not answer as base and adapters do: on 'eel' a logit differs by "
    end = OTHERS if others else ""
    traced = Traced(module="layers.1", difference=6.0, rounding=2.0)

    assert report(unmerged=1.0, traced=traced, mismatched_tensors=others).problem == (
        f"{begin}1 once they are merged in float32, where 0.125 is noise"
        f"; first in layers.1, which differs by 3 times its rounding{end}"
    )
    assert report(unexplained=1.0, traced=traced, mismatched_tensors=others).problem == (
        f"{begin}0.5, of which rounding to bfloat16 explains 0.25 and leaves 1, where 0.125 is noise"
        f"; first in layers.1, which differs by 3 times its rounding{end}"
    )


def test_a_difference_of_no_weights_is_looked_for_in_the_config() -> None:
    assert report(unexplained=1.0).problem.endswith(
        "every module with weights gives the same, so look at the build's config.json"
    )
    assert report(unexplained=1.0, mismatched_tensors=("a.weight",)).problem.endswith(f"where 0.125 is noise{OTHERS}")


def test_weights_that_no_prompt_reaches_are_said_to_be_so() -> None:
    assert report().problem == ""
    assert report(mismatched_tensors=("a.weight",)).problem == (
        "the build has other weights than base and adapters, which these prompts do not reach: a.weight"
    )
