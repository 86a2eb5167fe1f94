"""What an adapter's headers and config tell: its tensors by what they are, and its updates where no base is needed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lora_build.dtypes import FLOATS
from lora_build.files.formats.adapter import Adapter
from lora_build.grading import base_of
from lora_build.methods.checks import unmergeable
from lora_build.methods.interface import AdaptedModule, Measurable, Update, methods
from lora_build.methods.lora.implied import Implied
from lora_build.methods.trainable_tokens import token_indices
from lora_build.planning.inspection.result import TrainedTokens, WholeParameter
from lora_build.planning.targets import config_problems

# adapter_config.json: keys that make a LoRA another one, and what its authors call it
_VARIANTS = {
    "use_rslora": "rsLoRA", "use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "kasa_config": "KaSA",
    "velora_config": "VeLoRA", "monteclora_config": "MonteCLoRA", "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
}  # fmt: skip
_INITS = {
    "pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA", "loftq": "LoftQ", "eva": "EVA",
    "mica": "MiCA",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterContents:
    """What an adapter's headers and config tell.

    Attributes:
        adapter: the adapter.
        modules: the modules that it has factors for, by their paths.
        updates: what it does to which parameter of which module, where no base is needed to tell.
        problems: what keeps it from being merged, whatever the base.
    """

    adapter: Adapter
    modules: Mapping[str, AdaptedModule]
    updates: Mapping[tuple[str, str], Update]
    problems: tuple[str, ...]


def read_contents(adapter: Adapter) -> AdapterContents:
    """Return what an adapter's headers and config tell."""
    method = methods().get(adapter.peft_type)
    if method is None:
        problem = f"{adapter.source}: peft_type {adapter.peft_type} {unmergeable(adapter.peft_type)}"
        return AdapterContents(adapter=adapter, modules={}, updates={}, problems=(problem,))
    parts = adapter.parts
    wrong = config_problems(adapter, method)
    problems = [*wrong, *parts.problems]
    problems += (
        f"{tensor.source}: {tensor.name} is {tensor.dtype}; merging needs F32, F16 or BF16"
        for factors in parts.factors.values()
        for tensor in factors.values()
        if tensor.dtype not in FLOATS
    )
    measurable = method if isinstance(method, Measurable) and not wrong else None
    modules = {path: _module(adapter, path, measurable) for path in parts.factors}
    updates: dict[tuple[str, str], Update] = {}
    for module in modules.values() if measurable else ():
        found, misfits = method.updates(module)
        problems += misfits
        updates |= {(module.path, parameter): update for parameter, update in found.items()}
    return AdapterContents(adapter=adapter, modules=modules, updates=updates, problems=tuple(problems))


def _module(adapter: Adapter, path: str, method: Measurable | None) -> AdaptedModule:
    """Return a module with factors, on the base that they imply where the method can tell."""
    parts = adapter.parts
    module = AdaptedModule(
        adapter=adapter.name, path=path, config=adapter.config.data, adapter_weight=base_of(adapter.weight),
        factors=parts.factors[path], base=Implied(shapes={}), wrapped=path in parts.wrapped, shared=parts.shared,
        expert_packing=adapter.expert_packing,
    )  # fmt: skip
    return module if method is None else replace(module, base=method.implied(module))


def variants_of(adapter: Adapter) -> tuple[str, ...]:
    """Return what kind of LoRA an adapter is, by the names of its authors."""
    if adapter.peft_type != "LORA":
        return ()
    found = [name for key, name in _VARIANTS.items() if adapter.config.data.get(key)]
    init = str(adapter.config.data.get("init_lora_weights")).lower()
    return (*found, *(name for key, name in _INITS.items() if init.startswith(key)))


def whole_parameters(contents: AdapterContents) -> Iterator[WholeParameter]:
    """Yield the parameters that an adapter holds whole, and why it does."""
    adapter, parts = contents.adapter, contents.adapter.parts
    saved = adapter.config.saved_modules
    for frozen, tensors in ((False, parts.replaced), (True, parts.frozen)):
        for parameter, tensor in tensors.items():
            if frozen:
                what = "frozen"
            elif any(f".{name}." in f".{parameter}" for name in saved):
                what = "modules_to_save"
            else:
                what = "bias" if parameter.endswith(".bias") else "saved"
            yield WholeParameter(
                parameter=parameter, kind=what, dtype=tensor.dtype, shape=tensor.shape, size_bytes=tensor.num_bytes
            )


def trained_tokens(contents: AdapterContents) -> Iterator[TrainedTokens]:
    """Yield the tokens that an adapter was trained on, by module."""
    for module, rows in contents.adapter.parts.tokens.items():
        indices = token_indices(contents.adapter.config.data, module)
        num_tokens = rows.shape[0] if rows.shape else 0
        yield TrainedTokens(module=module, num_tokens=num_tokens, indices=None if indices is None else tuple(indices))


def parameters_by_key(contents: AdapterContents) -> dict[str, str]:
    """Return what the adapter calls the parameter that each of its keys is for."""
    parts = contents.adapter.parts
    found = {t.name: f"{module}.weight" for module, factors in parts.factors.items() for t in factors.values()}
    found |= {t.name: f"{m}.{parameter}" for (m, parameter), u in contents.updates.items() for t in u.factors.values()}
    found |= {rows.name: f"{module}.weight" for module, rows in parts.tokens.items()}
    return found | {t.name: parameter for group in (parts.replaced, parts.frozen) for parameter, t in group.items()}
