"""Every family and every option through a live model: the streamed build's bits, and a forward that is peft's.

The cases of test_architectures.py are built twice, once streamed and once through a live model, and must agree in every byte. The
unmerged forward is judged by the merged one and by peft's own adapters.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import lora_build
from judges.oracle import base_tensors
from judges.test_architectures import BUILDABLE, OPTION_CASES, Case
from lora_build import LoraModel
from lora_build.errors import PlanError
from makers.families import FAMILIES
from makers.live import Snapshot, all_bits, relative, saved, snapshot
from makers.zoo import Zoo, answer, load_model, quiet

pytestmark = pytest.mark.early

NEED_ANOTHER_MODEL = {
    "llama-classifier": "load the base with the head that they were trained with",
    "llama-grown": "resize it first",
    "llama_tied-grown": "resize it first",
    "llama-grown-saved": "resize it first",
    "llama-layer-replication": "its layers are replicated",
}
# transformers' forward of mamba reads dt_proj's weight without calling it; so peft's adapters do nothing there until
# they are merged
READ_PAST_ITS_MODULE = {"mamba-dt_proj"}
IN_BFLOAT16 = {f"{name}-bf16" for name in ("dora", "dora-dora", "embedding", "lora-bias", "conv", "square-experts",
                                           "siglip-head", "twin-of-transformers-4", "trainable-tokens-list", "oft")}  # fmt: skip


def selection() -> list[Case]:
    """Return one case of each family and of each option, and some options in bfloat16 as well."""
    by_id = {case.id: case for case in BUILDABLE}
    chosen = {}
    for name, arch in FAMILIES.items():
        kind = "experts-two" if arch.experts else "v4-names-two" if arch.v4 else "two"
        two = by_id[f"{name}-{kind}"]
        chosen[name] = replace(two, adapters=two.adapters[1:]) if kind == "two" else two  # of plain layers one will do
    for case in OPTION_CASES:
        option = case.id.partition("-")[2]
        option = option if option in IN_BFLOAT16 else option.removesuffix("-bf16")
        if case.refused is None and case.id.removesuffix("-bf16") not in NEED_ANOTHER_MODEL:
            chosen.setdefault(f"option {option}", case)
    return list(chosen.values())


CASES = selection()
IN_FLOAT32 = [case for case in CASES if case.base.dtype == "float32"]
BY_PEFT = [case for case in IN_FLOAT32 if case in OPTION_CASES and case.id not in READ_PAST_ITS_MODULE]


def test_every_family_and_every_option_is_there() -> None:
    assert {case.base.arch for case in CASES} == set(FAMILIES)
    assert len(CASES) == 50 + 91
    assert len(BY_PEFT) >= 60


def wrap(case: Case, zoo: Zoo, dtype: str = "auto") -> LoraModel:
    """Return the case's base as transformers loads it with all of the case's adapters active."""
    with quiet():
        model = case.base.architecture.auto.from_pretrained(
            zoo.base(case.base), dtype=dtype, experts_implementation="eager"
        )
    return with_adapters(model.eval(), case, zoo)


def with_adapters(model: Any, case: Case, zoo: Zoo) -> LoraModel:
    wrapper = LoraModel(model, tied_embeddings=case.tied)
    for i, adapter in enumerate(case.adapters):
        wrapper.load_adapter(zoo.adapter(case.base, adapter), f"a{i}")
        wrapper.set_scale(f"a{i}", adapter.weight)
    wrapper.set_adapter([f"a{i}" for i in range(len(case.adapters))])
    return wrapper


def streamed(case: Case, zoo: Zoo, out: Path) -> dict[str, Tensor]:
    """Return the tensors of the streamed build of a case."""
    adapters = {
        f"a{i}": {"source": str(zoo.adapter(case.base, adapter)), "weight": adapter.weight}
        for i, adapter in enumerate(case.adapters)
    }
    recipe = {"base": str(zoo.base(case.base)), "adapters": adapters, "tied_embeddings": case.tied}
    lora_build.build({**recipe, "output": {"dir": str(out)}})
    return base_tensors(out)


@dataclass(frozen=True, slots=True)
class Live:
    """A case through a live model: what it answers before and after merging, and as it was once unmerged again."""

    unmerged: Tensor
    merged: Tensor
    tensors: Mapping[str, Tensor]
    before: Snapshot
    between: Snapshot
    after: Snapshot


@pytest.fixture(scope="module")
def live(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Live]:
    """Return the function that takes a case through a live model, once for all tests."""

    @cache
    def take(case_id: str) -> Live:
        case = next(case for case in CASES if case.id == case_id)
        wrapper, arch = wrap(case, zoo), case.base.architecture
        names = list(wrapper.active_adapters)
        before = snapshot(wrapper.base_model)
        unmerged = answer(arch, wrapper)
        between = snapshot(wrapper.base_model)
        wrapper.merge_adapter(names)
        wrapper.unmerge_adapter()
        after = snapshot(wrapper.base_model)
        model = wrapper.merge_and_unload(adapter_names=names)
        merged = answer(arch, model)
        tensors = saved(model, tmp_path_factory.mktemp("saved") / case.id)
        return Live(unmerged=unmerged, merged=merged, tensors=tensors, before=before, between=between, after=after)

    return lambda case: take(case.id)


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


@each(CASES)
def test_merging_in_memory_gives_the_bytes_of_the_streamed_build(
    case: Case, zoo: Zoo, live: Callable[[Case], Live], tmp_path: Path
) -> None:
    assert all_bits(live(case).tensors) == all_bits(streamed(case, zoo, tmp_path / "out"))


@each(CASES)
def test_unmerging_gives_back_every_byte_every_tie_and_the_config(case: Case, live: Callable[[Case], Live]) -> None:
    assert live(case).after == live(case).before


@each(CASES)
def test_a_call_leaves_the_base_model_as_it_was(case: Case, live: Callable[[Case], Live]) -> None:
    assert live(case).between == live(case).before


@each(IN_FLOAT32)
def test_adapters_beside_the_weights_answer_as_those_merged(case: Case, live: Callable[[Case], Live]) -> None:
    assert relative(live(case).unmerged, live(case).merged) < 1e-5


@each(BY_PEFT)
def test_the_unmerged_answer_is_pefts(case: Case, zoo: Zoo, live: Callable[[Case], Live]) -> None:
    """What is `apart` peft merges wrongly, but its unmerged adapters are what was trained, and judge.

    Where a case is mute (whisper's forward asks the wrapped layer for its stride) peft's merged model does.
    """
    theirs = zoo.reference(case.base, case.adapters, case.judge, mute=case.mute)
    expected = theirs.merged if case.mute else theirs.unmerged
    assert expected is not None
    assert theirs.before is not None
    assert relative(theirs.before, expected) > 1e-3
    assert relative(live(case).unmerged, expected) < max(1e-5, case.error)  # an error where the base is decomposed


@each([case for case in BY_PEFT if case.judge == "float64" and not case.mute])
def test_in_float64_the_unmerged_answer_is_pefts_to_nine_digits(case: Case, zoo: Zoo) -> None:
    theirs = zoo.reference(case.base, case.adapters, case.judge)
    model = wrap(case, zoo).double()
    assert theirs.unmerged is not None
    assert relative(answer(case.base.architecture, model), theirs.unmerged) < 1e-9


def test_a_cut_tie_is_written_under_the_name_that_transformers_gives_it(zoo: Zoo, tmp_path: Path) -> None:
    case = next(case for case in BUILDABLE if case.id == "gemma3-tied-embedding")
    built = streamed(case, zoo, tmp_path / "out")
    with quiet():
        model = wrap(case, zoo).merge_and_unload()

    ours = saved(model, tmp_path / "saved")

    built["lm_head.weight"] = built.pop("language_model.lm_head.weight")  # as the embedding beside it is called there
    assert all_bits(ours) == all_bits(built)
    assert model.config.tie_word_embeddings is False
    assert model.config.text_config.tie_word_embeddings is False


def test_what_transformers_keeps_in_float32_is_saved_in_it(zoo: Zoo, tmp_path: Path) -> None:
    case = next(case for case in BUILDABLE if case.id == "deepseek_v3-one")
    built = streamed(case, zoo, tmp_path / "out")

    ours = saved(wrap(case, zoo).merge_and_unload(), tmp_path / "saved")

    wide = {name for name in ours if ours[name].dtype != built[name].dtype}
    assert wide == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    assert all_bits({n: t for n, t in ours.items() if n not in wide}) == all_bits(
        {n: t for n, t in built.items() if n not in wide}
    )


@pytest.mark.parametrize("id", NEED_ANOTHER_MODEL)
def test_adapters_of_another_model_are_refused_with_advice(id: str, zoo: Zoo) -> None:
    case = next(case for case in BUILDABLE if case.id == id)

    with pytest.raises(PlanError, match=f"another model.*{NEED_ANOTHER_MODEL[id]}.*build a recipe"):
        wrap(case, zoo)


@pytest.mark.parametrize(("id", "kind"), [("llama-classifier", "classifier"), ("llama-grown", "grown"),
                                          ("llama-grown-saved", "grown")])  # fmt: skip
def test_who_follows_the_advice_gets_the_streamed_bytes(id: str, kind: str, zoo: Zoo, tmp_path: Path) -> None:
    case = next(case for case in BUILDABLE if case.id == id)
    model = load_model(case.base.arch, zoo.base(case.base), "float32", model=kind)

    merged = with_adapters(model, case, zoo).merge_and_unload()

    assert all_bits(saved(merged, tmp_path / "saved")) == all_bits(streamed(case, zoo, tmp_path / "out"))
