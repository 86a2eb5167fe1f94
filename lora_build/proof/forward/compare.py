"""The forward check: whether a built checkpoint answers as its base with the adapters beside it, unmerged.

The bytes say that a build is what was planned; this says that what was planned is what the adapters mean. All models
run in float32, where the built one's values are exact, on the same inputs:

    u   base and adapters, unmerged: each module gives its own output plus that of the adapters
    m   the same after merging in float32
    r   m with its weights rounded, by torch, to the dtypes of the build
    b   the built checkpoint

|u - b| is what the user sees, and |m - r| is what rounding has to do with it, systematic losses included. The judge
looks at what is left: u is m but for the noise of float32, and b is r but for that and for weights so near a tie that
float32 and exact-1 round them apart. Both are measured on the same inputs: the noise by moving each weight by up to an
ulp of float32, the ties by rounding all of those weights the other way.
"""

import dataclasses
import gc
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_build.errors import SourceError
from lora_build.files.formats.config_json import CONFIG_NAME, ModelConfig
from lora_build.models.architecture import class_and_config
from lora_build.proof.builds import BuildInputs
from lora_build.proof.forward.answers import answer, compare_prompt, expect, refuse_silence
from lora_build.proof.forward.inputs import Prompts, Question, questions
from lora_build.proof.forward.models import ComparedModels
from lora_build.proof.forward.report import ForwardReport
from lora_build.proof.forward.rounding import BuildDtypes, num_roundings
from lora_build.proof.forward.tokenizers import compare_tokenizers
from lora_build.proof.forward.trace import Trace, Traced, half_ulps
from lora_build.proof.forward.weights import mismatched_tensors
from lora_build.proof.manifest import Manifest
from lora_build.recipe.identity import selected

_SAME_WEIGHTS = 0.5  # of what rounding does to a module's output: more than a few ties do, less than an update does
_SAME_IN_FLOAT32 = 32.0


def refuse_forward(base_config: ModelConfig, config: ModelConfig) -> None:
    """Raise if a build cannot be run beside its base, by the config.json of both.

    Raises:
        SourceError: transformers does not know the architecture, or the adapters replicate layers, which no live model
            here does.
    """
    class_and_config(config, "config.json")
    if config.layer_counts != base_config.layer_counts:
        counts, others = base_config.layer_counts, config.layer_counts
        key = next(key for key in (*counts, *others) if counts.get(key) != others.get(key))
        raise SourceError(
            f"config.json: {key} is not the base's; a forward check cannot run a base whose layers the adapters "
            "replicate, so leave it out"
        )


def compare_forward(directory: Path, manifest: Manifest, inputs: BuildInputs, prompts: Prompts) -> ForwardReport:
    """Return how the checkpoint in a folder answers beside its base with the adapters unmerged."""
    path = directory / CONFIG_NAME
    config = ModelConfig.parse(path.read_text(encoding="utf-8"), f"{directory.name}/{CONFIG_NAME}")
    refuse_forward(inputs.base.config, config)
    note = compare_tokenizers(directory, manifest, inputs)
    models = ComparedModels(
        directory=directory, config=config, inputs=inputs,
        dtypes=BuildDtypes(config, {tensor.name: tensor for tensor in manifest.tensors}),
    )  # fmt: skip
    with torch.no_grad():
        model = models.unmerged()
        asked = questions(model.base_model, directory, prompts)
        unmerged = [answer(model, question) for question in asked]
        refuse_silence(directory, unmerged)
        merged = model.merge_and_unload(adapter_names=list(selected(inputs.recipe)))
        others = mismatched_tensors(merged, directory, num_roundings(inputs.recipe))
        expected = expect(models, merged, asked, unmerged)
        del model, merged
        gc.collect()  # hooks and modules refer to each other in circles
        built = models.built()
        checks = tuple(compare_prompt(q, e, answer(built, q)) for q, e in zip(asked, expected, strict=True))
        report = ForwardReport(
            dtypes=models.dtypes.names, seed=prompts.seed, prompts=checks, mismatched_tensors=others,
            notes=(note,) if note else (),
        )  # fmt: skip
        if all(check.is_ok for check in checks):
            return report
        worst = max(range(len(checks)), key=lambda i: checks[i].excess)
        if checks[worst].unmerged > checks[worst].unexplained:
            del built
            traced = _trace_merge(models, asked[worst])
        else:
            traced = _trace_build(models, built, asked[worst])
    return dataclasses.replace(report, traced=traced)


def _trace_merge(models: ComparedModels, question: Question) -> Traced | None:
    """Return in which module the merged model parts from the unmerged one."""
    unmerged, merged = models.unmerged(), models.merged()
    with Trace(other=merged, half_ulps=_float32_half_ulps, threshold=_SAME_IN_FLOAT32) as trace:
        trace.watch(unmerged.base_model)
        answer(unmerged, question)
    return trace.found


def _trace_build(models: ComparedModels, built: nn.Module, question: Question) -> Traced | None:
    """Return in which module the built model parts from the rounded one."""
    rounded = models.merged()
    models.dtypes.apply(rounded)
    threshold = _SAME_WEIGHTS * (num_roundings(models.inputs.recipe) or 1.0)
    with Trace(other=built, half_ulps=models.dtypes.half_ulps, threshold=threshold) as trace:
        trace.watch(rounded)
        answer(rounded, question)
    return trace.found


def _float32_half_ulps(parameter: str, values: Tensor) -> Tensor:
    return half_ulps(values, torch.float32)
