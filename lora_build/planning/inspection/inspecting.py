"""What an adapter is, how large its updates are, and whether it fits a base. Nothing is written.

    found = lora_build.inspect("./math", base="org/model")
    found.norm, found.is_ok, found.fit.issues

Headers and configs say most of it. The adapter's weights are read once from end to end, for values that are not finite
and for the file's digest, and then one module at a time for the norms; of a base only headers and config are read.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from lora_build.errors import PlanError
from lora_build.files.formats.adapter import WEIGHTS_NAME, open_adapter
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.identity import BASE, SourceName
from lora_build.files.sources import Source, open_hashed
from lora_build.methods.interface import key_rules
from lora_build.planning.inspection.contents import (
    AdapterContents,
    parameters_by_key,
    read_contents,
    trained_tokens,
    variants_of,
    whole_parameters,
)
from lora_build.planning.inspection.result import BaseFit, ChangedTensor, Inspection
from lora_build.planning.inspection.weights import adapted_parameters, not_finite
from lora_build.planning.operations import Copy, Merge, Operation
from lora_build.planning.plan import MergePlan, make_plan
from lora_build.planning.resolve import open_source, resolve, split_reference
from lora_build.recipe.schema import AdapterSpec, BaseSpec, Recipe, resolve_path
from lora_build.recipe.shorthand import expand
from lora_build.recipe.values import is_local


def inspect(adapter: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Inspection:
    """Return what an adapter is and, if a base is named, how the two go together.

    Args:
        adapter: a folder, or a Hub repository `org/name` or `org/name@revision`; a folder of this name comes first.
        base: the same, of a base; nothing of it but headers and config is read.

    Raises:
        LoraBuildError: one of them cannot be read. What keeps them from being merged is not raised but returned.
    """
    source, revision = split_reference("adapter", adapter)
    spec = AdapterSpec(source=source, revision=revision)
    name = _name(source)
    recipe = Recipe(name="inspect", adapters={name: spec})
    if base is None:
        opened_source = open_source(recipe, SourceName.of_adapter(name), spec)
        opened = open_adapter(opened_source, rules=key_rules)
        return _inspect(opened_source, read_contents(opened))
    source, revision = split_reference("base", base)
    recipe = replace(recipe, base=BaseSpec(source=source, revision=revision))
    resolved = resolve(recipe)
    (opened,) = resolved.inputs.adapters
    contents, base_uri = read_contents(opened), resolved.sources[BASE].uri
    try:
        fit = fit_to(base_uri, make_plan(recipe, resolved.inputs), contents)
    except PlanError as error:
        fit = BaseFit(base=base_uri, issues=error.issues, num_tensors={}, config_changes={})
    return _inspect(resolved.sources[opened.source], contents, fit)


def _name(source: str) -> str:
    """Return what messages call the adapter: the last part of its source, as in a recipe that lists it."""
    path = os.path.realpath(resolve_path(Recipe(), source)) if is_local(source) else source
    return str(*expand({"adapters": [path]})["adapters"])


def _inspect(source: Source, contents: AdapterContents, fit: BaseFit | None = None) -> Inspection:
    """Return an inspection, for which the weights are read."""
    adapter, parts = contents.adapter, contents.adapter.parts
    with open_hashed(source, WEIGHTS_NAME) as file:
        bad = tuple(not_finite(file, adapter))
        digest = file.finish()
        adapted = tuple(adapted_parameters(file, contents))
    return Inspection(
        source=source.uri,
        config=adapter.config.data,
        variants=variants_of(adapter),
        num_tensors=len(adapter.tensors),
        size_bytes=source.files[WEIGHTS_NAME].size_bytes,
        digest=digest,
        dtypes=dict(sorted(Counter(tensor.dtype for tensor in adapter.tensors.values()).items())),
        adapted=adapted,
        whole=tuple(whole_parameters(contents)),
        tokens=tuple(trained_tokens(contents)),
        shared=tuple(tensor.name for tensor in parts.shared.values()),
        training_only=tuple(parts.ignored),
        problems=tuple(dict.fromkeys((*contents.problems, *bad))),
        fit=fit,
    )


def fit_to(base: str, plan: MergePlan, contents: AdapterContents) -> BaseFit:
    """Return how an adapter goes with a base, from the plan of both."""
    names = parameters_by_key(contents)
    return BaseFit(
        base=base,
        num_tensors=dict(Counter(op.verb for op in plan.operations)),
        touched=tuple(
            ChangedTensor(
                name=op.name, operation=op.verb, adapted=tuple(sorted({names[t.name] for t in _used(op, names)}))
            )
            for op in plan.operations
            if not isinstance(op, Copy)
        ),
        notes=(*plan.remarks, *plan.notes),
        config_changes=plan.config.changes,
    )


def _used(operation: Operation, names: Mapping[str, str]) -> list[TensorInfo]:
    """Return the tensors of the adapter that go into an output tensor, without those it has in common."""
    updates = operation.updates if isinstance(operation, Merge) else ()
    tensors = (operation.source, *(tensor for update in updates for tensor in update.factors.values()))
    return [tensor for tensor in tensors if not tensor.source.is_base and tensor.name in names]
