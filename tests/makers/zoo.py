"""Tiny random models and adapters, made offline from configs by transformers and peft themselves.

    zoo = Zoo(tmp_path)
    base = zoo.base(Base(arch="mixtral", dtype="bfloat16", sharded=True))        # a folder as on the Hub
    adapter = zoo.adapter(Base(arch="mixtral"), Adapter(experts=True))           # a folder as peft saves it
    truth = zoo.reference(Base(arch="mixtral"), (Adapter(experts=True),))        # what peft makes of them

Everything is seeded by the specs, so a spec names its bytes. Deltas are never zero: whatever peft initialises
is replaced or moved. `Reference` holds the tensors that peft merges in float64, under the names that
save_pretrained gives them, and what the unmerged adapter model answers. It knows nothing of lora_build.
"""

import json
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from judges.oracle import base_tensors, expected_checkpoint
from makers.families import FAMILIES, VOCAB, Architecture, reads_text
from makers.rewrites import REWRITES, renamed

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

PREFIX = "base_model.model."
SHARD = "20KB"

THIRD_PARTY_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # peft 0.21 asks transformers >= 5.20 for an attribute that was renamed there
    (r"`is_gradient_checkpointing` is deprecated", FutureWarning),
    # what peft says about the very cases that the tests are about
    (r"Model has `tie_word_embeddings=True` and a tied layer is part of the adapter", UserWarning),
    (r"Model with `tie_word_embeddings=True` and the tied_target_modules", UserWarning),
    (r"Input and output embeddings are no longer tied after merging", UserWarning),
    (r"Setting `save_embedding_layers` to `True`", UserWarning),
    (r"fan_in_fan_out is set to (True|False) but the target module is", UserWarning),
    (r"Already following adapters were merged a0. You are now additionally merging a1", UserWarning),
    (r"Specified to not (save|load) vera_A and vera_B", UserWarning),
    (r"LoRA adapter added to ConvNd layer with groups > 1", UserWarning),
    # peft takes the one-dimensional lora_B.bias of lora_bias=True for a DeepSpeed artefact
    (r"Adapter '\w+': \d+ LoRA tensor\(s\) have invalid shape", UserWarning),
    # peft misses patterns for parameters, and those that another pattern before them hides
    (r"The following (rank|alpha)_pattern keys did not match any targeted module", RuntimeWarning),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence exactly the warnings that peft and transformers give for these models."""
    with warnings.catch_warnings():
        for message, category in THIRD_PARTY_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base checkpoint.

    `flipped` has the other `tie_word_embeddings`, `options` are of its config, `fp32_norms` stores the norms in
    float32, `both_tied` stores a tied head although it need not be, `bare` leaves out the prefix `transformer.`, as gpt2
    on the Hub does.
    """

    arch: str = "llama"
    dtype: str = "float32"
    sharded: bool = False
    flipped: bool = False
    fp32_norms: bool = False
    both_tied: bool = False
    bare: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def architecture(self) -> Architecture:
        """Return its family."""
        return FAMILIES[self.arch]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter.

    `dtype` is that of its tensors, `loaded_as` that of the base while it was trained. `method` is the peft config's
    class without `Config`, `options` go to it, `edits` change adapter_config.json after peft wrote it, `experts` adds
    the family's stacks of experts. `model` is what is done to the base before training: `grown` vocabulary, or a
    sequence classifier (`classifier`). `v4` writes the file by hand with the names of the base's files;
    `rewrite` names a function of REWRITES that turns what peft saved into another file for the same deltas.
    """

    weight: float = 1.0
    seed: int = 0
    rank: int = 4
    alpha: float = 8
    dtype: str = "float32"
    loaded_as: str = "auto"
    method: str = "Lora"
    targets: str | tuple[str, ...] | None = None
    experts: bool = False
    model: str = "base"
    v4: bool = False
    rewrite: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    edits: tuple[tuple[str, Any], ...] = ()

    @property
    def file(self) -> "Adapter":
        """Return what decides the bytes of its files."""
        return replace(self, weight=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What peft makes of a base and adapters.

    `tensors` are the merged ones by their names in files, `before`, `unmerged` and `merged` the answers of the
    base, of the adapter model and of the merged model, as far as there are any.
    """

    tensors: Mapping[str, torch.Tensor]
    before: torch.Tensor | None = None
    unmerged: torch.Tensor | None = None
    merged: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Zoo:
    """Makes each base, adapter and reference once, under `root`."""

    root: Path
    _made: dict[str, Any] = field(default_factory=dict)

    def base(self, spec: Base) -> Path:
        """Return the folder of a base checkpoint."""
        return self._once(spec, lambda path: _make_base(spec, path))

    def adapter(self, base: Base, spec: Adapter) -> Path:
        """Return the folder of an adapter that peft saved for this base, or of another file for the same deltas."""
        base = replace(base, sharded=False)
        folder = self.base(base)
        return self._once((base, spec.file), lambda path: _make_adapter(base, folder, spec, path))

    def reference(
        self, base: Base, adapters: tuple[Adapter, ...], dtype: str = "float64", *, mute: bool = False
    ) -> Reference:
        """Return what peft, or for files with names of transformers 4 the file-only oracle, makes of them.

        Args:
            base: The base checkpoint.
            adapters: The adapters, in the recipe's order.
            dtype: The dtype in which peft merges.
            mute: Whether the unmerged adapter model is not asked for its answer.
        """
        key = repr((base, adapters, dtype))
        if key not in self._made:
            plain = tuple(replace(adapter, rewrite=None, edits=()) for adapter in adapters)
            folders = [self.adapter(base, adapter) for adapter in plain]
            if adapters[0].v4:
                expected = expected_checkpoint(
                    self.base(base), [(f, a.weight) for f, a in zip(folders, adapters, strict=True)]
                )
                tensors = {n: torch.from_numpy(e.exact().astype("float64")) for n, e in expected.items()}
                self._made[key] = Reference(tensors=tensors)
            else:
                self._made[key] = self._by_peft(base, dict(zip(folders, plain, strict=True)), dtype, mute)
        return self._made[key]

    def _by_peft(self, base: Base, adapters: Mapping[Path, Adapter], dtype: str, mute: bool) -> Reference:
        arch, first = base.architecture, next(iter(adapters.values()))
        model = load_model(base.arch, self.base(base), dtype, model=first.model)
        before = answer(arch, model)
        names = [f"a{i}" for i in range(len(adapters))]
        weights = {name: adapter.weight for name, adapter in zip(names, adapters.values(), strict=True)}
        weights = {name: weight for name, weight in weights.items() if weight != 1}
        adapted = load_peft(model, dict(zip(names, adapters, strict=True)), weights)
        unmerged = None if mute else answer(arch, adapted)
        if "layer_replication" in dict(first.options):
            return Reference(tensors=_one_layer_each(adapted), before=before, unmerged=unmerged, merged=unmerged)
        with quiet():
            merged = adapted.merge_and_unload(adapter_names=names)
        after = answer(arch, merged)
        path = self.root / "reference"
        with quiet():
            merged.save_pretrained(path)
        tensors = base_tensors(path)
        shutil.rmtree(path)
        return Reference(tensors=tensors, before=before, unmerged=unmerged, merged=after)

    def _once(self, spec: Any, make: Callable[[Path], None]) -> Path:
        if repr(spec) not in self._made:
            path = self.root / f"made-{len(self._made):04d}"
            shutil.rmtree(path, ignore_errors=True)  # left by one that could not be made
            make(path)
            self._made[repr(spec)] = path
        return self._made[repr(spec)]


def load_model(arch: str, folder: Path, dtype: str | torch.dtype = "auto", *, model: str = "base") -> Any:
    """Return the model of a folder as transformers loads it, prepared for training as `Adapter.model` says."""
    loader, options = FAMILIES[arch].auto, {}
    if model == "classifier":
        loader = getattr(transformers, FAMILIES[arch].model_class.replace("CausalLM", "SequenceClassification"))
        options = {"num_labels": 3}
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    with quiet():
        torch.manual_seed(0)
        loaded = loader.from_pretrained(folder, dtype=dtype, experts_implementation="eager", **options).eval()
        if model == "grown":
            loaded.resize_token_embeddings(VOCAB + 4)
    return loaded


def answer(arch: Architecture, model: Any) -> torch.Tensor:
    """Return the model's logits for the family's fixed input, in float64."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    inputs = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in arch.inputs().items()
    }
    with torch.no_grad(), quiet():
        output = model(**inputs)
    logits: torch.Tensor = output.logits if "logits" in output else output.logits_per_image
    return logits.double()


def logits(arch: str, model: Any) -> torch.Tensor:
    """Return the logits, as they are, of two sentences that hold almost every token id but the special ones."""
    half = VOCAB // 2 - 4
    ids = torch.arange(4, 4 + 2 * half).reshape(2, half)[:, torch.randperm(half, generator=_generator("ids"))]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in FAMILIES[arch].inputs():
        inputs["decoder_input_ids"] = ids.flip(0)[:, :20]
    with torch.no_grad(), quiet():
        result: torch.Tensor = model(**inputs).logits
    return result


def load_peft(model: Any, adapters: Mapping[str, Path], weights: Mapping[str, float]) -> peft.PeftModel:
    """Return `model` with the adapters loaded by peft's defaults, all active, each scaled by its weight.

    peft multiplies the whole update of a layer, lora_B.bias included, by `layer.scaling[name]`.
    """
    first, *rest = adapters
    with quiet():
        adapted = peft.PeftModel.from_pretrained(model, adapters[first], adapter_name=first)
        for name in rest:
            adapted.load_adapter(adapters[name], adapter_name=name)
        if rest:
            adapted.base_model.set_adapter(list(adapters))
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "scaling"):
            for name in module.scaling.keys() & weights.keys():
                module.scaling[name] *= weights[name]
    return adapted.eval()


def _one_layer_each(adapted: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a model whose replicated layers share a base but not their updates."""
    tensors = {}
    for name, tensor in adapted.base_model.model.state_dict().items():
        if ".lora_" not in name:
            tensors[name.replace(".base_layer.", ".")] = tensor.clone()
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            tensors[f"{name}.weight"] += module.get_delta_weight("a0")
    return tensors


def _generator(*seed: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))


def _make_base(spec: Base, path: Path) -> None:
    arch = spec.architecture
    config = arch.config()
    for name, value in spec.options:
        setattr(config, name, value)
    if spec.flipped:
        tied = not config.get_text_config().tie_word_embeddings
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tied
    with quiet():
        torch.manual_seed(0)
        model = arch.auto(config)
        generator = _generator("base", spec.arch, *spec.options)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            spread = torch.exp(torch.randn(parameter.shape, generator=generator))  # exponents far apart
            own = torch.where(parameter.abs() < 0.1, 0.0, parameter)  # ones of norms and their like, no noise
            parameter.data = own.detach() + 0.05 * noise * spread
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += 0.1 * torch.rand(buffer.shape, generator=generator)
        model.tie_weights()
        model.to(getattr(torch, spec.dtype)).save_pretrained(path, max_shard_size=SHARD if spec.sharded else "5GB")
    if arch.hub_names:
        _rename_base(path, arch.hub_names)
    if reads_text(arch):
        _save_tokenizer(path)
    if spec.fp32_norms or spec.both_tied or spec.bare:
        _rewrite(spec, path / "model.safetensors")


def _rewrite(spec: Base, path: Path) -> None:
    tensors = load_file(path)
    if spec.fp32_norms:
        tensors = {k: t.float() if "norm" in k else t for k, t in tensors.items()}
    if spec.both_tied:
        tensors |= {head: tensors[source].clone() for head, source in spec.architecture.tied.items()}
    if spec.bare:
        tensors = {k.removeprefix("transformer."): t for k, t in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _save_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    specials = ("<pad>", "<s>", "</s>", "<unk>")
    words = {word: i for i, word in enumerate((*specials, *(f"w{i}" for i in range(4, VOCAB))))}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(path)


def _rename_base(path: Path, renames: tuple[tuple[str, str], ...]) -> None:
    for file in path.glob("*.safetensors"):
        save_file({renamed(n, renames): t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    for file in path.glob("*.index.json"):
        index = json.loads(file.read_text())
        index["weight_map"] = {renamed(name, renames): f for name, f in index["weight_map"].items()}
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _make_adapter(base: Base, base_dir: Path, spec: Adapter, path: Path) -> None:
    if spec.v4:
        _write_v4_adapter(base, base_dir, spec, path)
    else:
        _train_adapter(base, base_dir, spec, path)
    if spec.rewrite:
        tensors = load_file(path / "adapter_model.safetensors")
        save_file(REWRITES[spec.rewrite](tensors), path / "adapter_model.safetensors", metadata={"format": "pt"})
    if spec.edits:
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(spec.edits), indent=2))


def _train_adapter(base: Base, base_dir: Path, spec: Adapter, path: Path) -> None:
    arch = base.architecture
    targets = arch.targets if spec.targets is None else spec.targets
    options: dict[str, Any] = {"target_modules": targets if isinstance(targets, str) else list(targets)}
    if spec.method == "Lora":
        options |= {"r": spec.rank, "lora_alpha": spec.alpha, "fan_in_fan_out": arch.conv1d}
    if spec.experts:
        options["target_parameters"] = list(arch.experts)
    with quiet():
        config = getattr(peft, f"{spec.method}Config")(**(options | dict(spec.options)))
    generator = _generator("adapter", base.arch, spec.seed)
    model = load_model(base.arch, base_dir, spec.loaded_as, model=spec.model)
    with quiet():
        torch.manual_seed(1 + spec.seed)
        adapted = peft.get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                _train(name, parameter, generator, keep=isinstance(dict(spec.options).get("init_lora_weights"), str))
                parameter.data = parameter.data.to(getattr(torch, spec.dtype))
        adapted.save_pretrained(str(path))


def _train(name: str, parameter: torch.nn.Parameter, generator: torch.Generator, *, keep: bool) -> None:
    """Replace a parameter by what training might have left there, or `keep` it and move it a little."""
    noise = torch.randn(parameter.shape, generator=generator)
    factor = re.search(r"\.lora_(A|B|embedding_A|embedding_B)\b", name)
    if factor and parameter.ndim > 1 and not keep:
        # rows of B from 2^-10 to 1: some updates drown in W, some rule it
        shape = (parameter.shape[0], *[1] * (parameter.ndim - 1))
        rows = 2.0 ** -torch.randint(0, 11, shape, generator=generator)
        values = 0.2 * noise * (rows if factor[1] in ("B", "embedding_A") else 1.0)
    else:
        size = parameter.data.abs().mean().item() or 1.0
        values = parameter.data.float() + 0.2 * size * noise
    parameter.data.copy_(values)  # in place: ensure_weight_tying makes one adapter's factors views of another's


def _write_v4_adapter(base: Base, base_dir: Path, spec: Adapter, path: Path) -> None:
    """Write an adapter with the names of the base's files, one pair of factors for each matrix there."""
    arch = base.architecture
    generator = _generator("v4", base.arch, spec.seed)
    dtype = getattr(torch, spec.dtype)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in sorted(base_tensors(base_dir).items()):
        module = name.removesuffix(".weight")
        if weight.ndim == 2 and name != module and module.endswith(tuple(f".{t}" for t in arch.v4) + arch.v4):
            rows = 2.0 ** -torch.randint(0, 8, (weight.shape[0], 1), generator=generator)
            B = 0.2 * rows * torch.randn(weight.shape[0], spec.rank, generator=generator)
            A = 0.2 * torch.randn(spec.rank, weight.shape[1], generator=generator)
            tensors[f"{PREFIX}{module}.lora_A.weight"] = A.to(dtype)
            tensors[f"{PREFIX}{module}.lora_B.weight"] = B.to(dtype)
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = peft.LoraConfig(
        r=spec.rank, lora_alpha=int(spec.alpha), target_modules=list(arch.v4), base_model_name_or_path=str(base_dir)
    )
    config.save_pretrained(str(path))
    file = path / "adapter_config.json"
    written = json.loads(file.read_text())
    del written["peft_version"]  # peft wrote none before 0.18
    file.write_text(json.dumps(written, indent=2))
