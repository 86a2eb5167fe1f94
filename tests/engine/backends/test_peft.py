"""`numerics: peft` against the installed peft, bit by bit: the same model, adapters, order and safe_merge.

peft runs in the test: from_pretrained in the checkpoint's dtype, load_adapter, merge_and_unload, save_pretrained. Every
tensor of its files must have the same dtype and bytes as ours.
"""

import itertools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from peft.utils.warning import PeftWarning
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_build
from judges.oracle import base_tensors
from lora_build.engine.backends.peft_steps import Deltas, merge
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.identity import SourceName
from lora_build.methods.interface import AdaptedModule, PlacedUpdate, methods
from lora_build.pipeline import memory_bytes, prepare
from lora_build.planning.peft_compat import as_in_peft
from lora_build.recipe.validate import from_mapping
from makers import small
from makers.zoo import Adapter, Base, Zoo, load_model, quiet

Tensors = Mapping[str, Tensor]
DTYPES = ("bfloat16", "float16", "float32")
WHOLE = ("q_proj", "down_proj", "embed_tokens", "lm_head")
HEAD = r".*head\.attention"


def _lora(**fields: Any) -> Adapter:
    """Return an adapter; what is not a field of Adapter is an option of LoraConfig."""
    own = {name: fields.pop(name) for name in Adapter.__dataclass_fields__ if name in fields}
    return Adapter(**own, options=tuple(fields.items()))


def by_peft(zoo: Zoo, base: Base, adapters: tuple[Adapter, ...], *, safe_merge: bool, dtype: str) -> Tensors:
    model = load_model(base.arch, zoo.base(base), dtype)
    first, *rest = (zoo.adapter(base, adapter) for adapter in adapters)
    out = zoo.root / "by-peft"
    with quiet():
        adapted = peft.PeftModel.from_pretrained(model, first, adapter_name="a0")
        for i, folder in enumerate(rest, 1):
            adapted.load_adapter(folder, adapter_name=f"a{i}")
        names = [f"a{i}" for i in range(len(adapters))]
        adapted.merge_and_unload(safe_merge=safe_merge, adapter_names=names).save_pretrained(out)
    tensors = base_tensors(out)
    shutil.rmtree(out)
    return tensors


def recipe(zoo: Zoo, base: Base, adapters: tuple[Adapter, ...], **more: Any) -> dict[str, Any]:
    sources = {f"a{i}": str(zoo.adapter(base, adapter)) for i, adapter in enumerate(adapters)}
    output = {"dir": str(zoo.root / "ours"), "if_exists": "overwrite"}
    return {"base": str(zoo.base(base)), "adapters": sources, "numerics": "peft", "output": output} | more


def by_us(zoo: Zoo, base: Base, adapters: tuple[Adapter, ...], **more: Any) -> Tensors:
    lora_build.build(recipe(zoo, base, adapters, **more))
    return base_tensors(zoo.root / "ours")


def differences(ours: Tensors, theirs: Tensors) -> list[str]:
    """Return the tensors that are not the same, byte by byte."""

    def same(a: Tensor, b: Tensor) -> bool:
        bits = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)

    return [n for n in sorted({*ours, *theirs}) if n not in ours or n not in theirs or not same(ours[n], theirs[n])]


def assert_same_bits(zoo: Zoo, base: Base, *adapters: Adapter, dtype: str = "keep", **more: Any) -> None:
    """Hold a build to peft's for both values of safe_merge, and see that there was something to merge."""
    for safe_merge in (True, False):
        ours = by_us(zoo, base, adapters, safe_merge=safe_merge, dtype=dtype, **more)
        loaded = base.dtype if dtype == "keep" else dtype
        theirs = by_peft(zoo, base, adapters, safe_merge=safe_merge, dtype=loaded)
        assert differences(ours, theirs) == [], f"{safe_merge=}"
        assert differences(ours, base_tensors(zoo.base(base))) != []


@pytest.mark.parametrize(("base_dtype", "dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_linear_layers_and_embeddings_have_pefts_bits_in_every_dtype(base_dtype: str, dtype: str, zoo: Zoo) -> None:
    assert_same_bits(zoo, Base(arch="llama", dtype=base_dtype), _lora(targets=WHOLE, dtype=dtype))


@pytest.mark.parametrize("base_dtype", DTYPES)
def test_adapters_in_either_order_have_pefts_bits_in_that_order(base_dtype: str, zoo: Zoo) -> None:
    base = Base(arch="llama", dtype=base_dtype)
    three = tuple(_lora(seed=i, rank=2 + i, dtype=dtype, targets=WHOLE) for i, dtype in enumerate(DTYPES))

    assert_same_bits(zoo, base, *three)
    assert_same_bits(zoo, base, *three[::-1])
    assert differences(by_us(zoo, base, three), by_us(zoo, base, three[::-1])) != []


BLOCKS = BdLoraConfig(
    target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj", "up_proj"], nblocks=2, match_strict=False
)
QKV = ("q_proj", "k_proj", "v_proj")
GPT2 = ("c_attn", "c_proj", "wte")
PATTERNS: dict[str, Any] = {"rank_pattern": {"q_proj": 2, "v_proj": 3}, "alpha_pattern": {"down_proj": 5}}
LAYERS: dict[str, tuple[Adapter, ...]] = {
    "llama rslora-patterns": (_lora(use_rslora=True, **PATTERNS),),
    "llama one-parameter": (_lora(targets=("v_proj",), target_parameters=["q_proj.weight"]),),
    "llama bdlora": (_lora(use_bdlora=BLOCKS), _lora(seed=1)),
    "llama mica": (_lora(init_lora_weights="mica", targets=WHOLE),),
    "llama dora": (_lora(use_dora=True, targets=WHOLE),),
    "llama dora-three": tuple(_lora(use_dora=i != 1, seed=i, rank=4 - i, targets=WHOLE) for i in range(3)),
    "llama lora-dora-lora": tuple(_lora(use_dora=i == 1, seed=i, targets=WHOLE) for i in range(3)),
    "llama bdlora-dora": (_lora(use_bdlora=BLOCKS), _lora(seed=1, use_dora=True)),
    "llama saved-modules": (_lora(modules_to_save=["lm_head", "embed_tokens"]), _lora(seed=1)),
    "llama tokens": (_lora(trainable_token_indices=[7, 3]), _lora(seed=1, trainable_token_indices=[2, 9])),
    "qwen2 lora-bias": tuple(_lora(seed=i, lora_bias=True, targets=QKV) for i in range(2)),
    "gpt2 conv1d": (_lora(lora_bias=True), _lora(seed=1)),
    "gpt2 bias-all": (_lora(bias="all", dtype="bfloat16"),),
    "gpt2 dora-two": (_lora(use_dora=True, targets=GPT2), _lora(use_dora=True, seed=1, targets=GPT2)),
    "siglip attention": (_lora(targets=HEAD), _lora(targets=HEAD, seed=1, rank=3, use_rslora=True)),
    "resnet kernels": (_lora(), _lora(seed=1, use_dora=True), _lora(seed=2, use_dora=True)),
    "mixtral experts": (_lora(experts=True), _lora(experts=True, seed=1, rank=3, dtype="bfloat16")),
    "granitemoe experts": (_lora(experts=True), _lora(experts=True, seed=1, use_rslora=True)),
    "gpt_oss experts": (_lora(experts=True), _lora(experts=True, seed=1)),
    "dinov2 split": (_lora(),),
    "vit renamed": (_lora(),),
}


@pytest.mark.parametrize("case", LAYERS)
def test_every_kind_of_layer_has_pefts_bits(case: str, zoo: Zoo) -> None:
    base = Base(arch=case.split()[0], dtype="bfloat16")
    tied = {"tied_embeddings": "peft"} if base.arch == "gpt2" else {}
    assert_same_bits(zoo, base, *LAYERS[case], **tied)


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_dtype_has_the_bits_of_a_model_that_peft_loads_in_it(dtype: str, zoo: Zoo) -> None:
    adapter = _lora(targets=("q_proj", "embed_tokens"), modules_to_save=["lm_head"])
    assert_same_bits(zoo, Base(arch="llama", dtype="float32"), adapter, _lora(seed=1), dtype=dtype)


@pytest.mark.parametrize(("arch", "dtype"), [("t5", "float16"), ("deepseek_v3", "bfloat16")])
def test_what_transformers_keeps_in_float32_is_merged_and_written_so(arch: str, dtype: str, zoo: Zoo) -> None:
    base = Base(arch=arch, dtype=dtype)
    assert_same_bits(zoo, base, _lora())
    assert {str(t.dtype) for t in by_us(zoo, base, (_lora(),)).values()} == {f"torch.{dtype}", "torch.float32"}


def test_an_embedding_without_its_tied_head_has_the_bits_of_an_untied_model(zoo: Zoo) -> None:
    base, adapter = Base(arch="gpt2", dtype="bfloat16"), _lora(targets=("c_attn", "wte"))
    ours = by_us(zoo, base, (adapter,))
    theirs = by_peft(zoo, base, (adapter,), safe_merge=True, dtype="bfloat16")

    assert differences(ours, theirs) == ["lm_head.weight"]
    assert torch.equal(ours["lm_head.weight"], base_tensors(zoo.base(base))["transformer.wte.weight"])


# --- layers that no small model of transformers has ---------------------------------------------------------


class Net(nn.Module):
    """Convolutions of each dimension, matrices stored [in, out], and one large enough for a BLAS to cut it up."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.dot, self.cube = nn.Conv1d(6, 8, 3), nn.Conv1d(6, 8, 1), nn.Conv3d(4, 6, 2)
        self.plane, self.point = nn.Conv2d(6, 8, (3, 2)), nn.Conv2d(6, 8, 1)
        self.square, self.large = Conv1D(12, 12), nn.Linear(777, 1030)

    def forward(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Stub:
    """What the base has: shapes and a class."""

    shapes: Mapping[str, tuple[int, ...]]
    layer_type: str
    settings: Mapping[str, Any]

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        return self.shapes.get(parameter)


def _net(dtype: torch.dtype) -> Net:
    torch.manual_seed(1)
    return Net().to(dtype)


def _saved(folder: Path, seed: int, **options: Any) -> Path:
    """Return the folder of an adapter on every module of the net."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4 + seed, lora_alpha=5, target_modules=list(_net(torch.float32)._modules), **options)
    with quiet():
        model = peft.get_peft_model(_net(torch.float32), config)  # type: ignore[arg-type]
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(str(folder))
    return folder


def _merged_here(net: Net, module: str, folders: list[Path], *, safe_merge: bool) -> Tensor:
    """Return a module's weight as `numerics: peft` merges it."""
    values: dict[TensorInfo, Tensor] = {}
    updates = []
    weight = net.get_parameter(f"{module}.weight").detach()
    layer_type = "Conv1D" if module == "square" else "Linear"
    for folder in folders:
        prefix = f"base_model.model.{module}."
        factors = {}
        for key, tensor in load_file(folder / "adapter_model.safetensors").items():
            if key.startswith(prefix):
                info = TensorInfo(
                    source=SourceName.of_adapter("x"), file=folder.name, name=key, dtype="F32", shape=tuple(tensor.shape), start=0, end=0
                )  # fmt: skip
                values[info] = tensor
                factors[key.removeprefix(prefix)] = info
        adapted = AdaptedModule(
            adapter=folder.name,
            path=module,
            config=json.loads((folder / "adapter_config.json").read_text()),
            adapter_weight=1.0,
            factors=factors,
            base=Stub({"weight": tuple(weight.shape)}, layer_type, {}),
        )
        found, problems = methods()["LORA"].updates(adapted)
        assert problems == []
        repeated = as_in_peft(adapted, "weight", found["weight"])
        assert not isinstance(repeated, str)
        update, layer = repeated
        updates.append(PlacedUpdate(update=update, start=0, stop=len(weight), transposed=update.transposed, peft=layer))
    steps = merge(weight.flatten(1), updates, Deltas(values.__getitem__), safe_merge=safe_merge)
    return steps[-1].after.reshape(weight.shape)


@pytest.mark.parametrize(("dora", "dtype"), list(itertools.product((False, True), (torch.bfloat16, torch.float32))))
def test_kernels_and_large_matrices_have_pefts_bits(dora: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    folders = [_saved(tmp_path / "a0", 0), _saved(tmp_path / "a1", 1, use_dora=dora)]

    for safe_merge in (True, False):
        with quiet():
            adapted = peft.PeftModel.from_pretrained(_net(dtype), folders[0], adapter_name="a0")  # type: ignore[arg-type]
            adapted.load_adapter(folders[1], adapter_name="a1")
            merged = adapted.merge_and_unload(safe_merge=safe_merge, adapter_names=["a0", "a1"])  # type: ignore[operator]
        for module in _net(dtype)._modules:
            ours = _merged_here(_net(dtype), module, folders, safe_merge=safe_merge)
            assert torch.equal(ours, merged.get_parameter(f"{module}.weight")), (module, safe_merge)


# --- what is recorded and reported --------------------------------------------------------------------------


def _small(folder: Path, *adapters: str, **more: Any) -> dict[str, Any]:
    return small.recipe(folder, *adapters, **({"numerics": "peft"} | more))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    small.make_adapter(tmp_path / "code", seed=70, scale=0.05)
    return tmp_path


def test_the_manifest_says_that_the_bits_are_those_of_this_environment(folder: Path) -> None:
    manifest = lora_build.build(_small(folder)).manifest

    assert manifest.plan.options["numerics"] == "peft-0.21"
    assert manifest.reproducibility == "environment"


def test_a_plan_counts_the_whole_parameters_that_pefts_merge_holds(folder: Path) -> None:
    exact, peft = (
        memory_bytes(prepare(from_mapping(_small(folder, numerics=numerics)))) for numerics in ("exact", "peft")
    )

    assert peft - exact == 4 * 8 * 8 * 6  # four float64 of a weight [8, 6]


def test_the_order_of_adapters_is_part_of_the_build_key(folder: Path) -> None:
    one, other = (lora_build.build(_small(folder, *names)) for names in (("math", "code"), ("code", "math")))
    assert one.manifest.build_key != other.manifest.build_key

    one, other = (
        lora_build.build(_small(folder, *names, numerics="exact")) for names in (("math", "code"), ("code", "math"))
    )
    assert one.manifest.build_key == other.manifest.build_key


def test_the_survival_report_has_the_share_of_each_adapter_in_its_turn(folder: Path) -> None:
    lora_build.build(_small(folder, "math", "code"))

    (first, *_) = json.loads((folder / "out" / "lora-build.survival.json").read_text())["tensors"]
    shares = {share["adapter"]: share for share in first["shares"]}
    assert set(shares) == {"math", "code"}
    assert all(0 < share["num_changed"] <= share["num_updated"] == 48 for share in shares.values())
    assert shares["math"]["update_norm"] > shares["code"]["update_norm"] > 0


def test_safe_merge_names_the_adapter_and_the_element_that_is_not_finite(folder: Path) -> None:
    B = torch.zeros(8, 2)
    B[3, 1] = torch.inf
    small.edit(folder / "math", q_proj__lora_B__weight=B)

    with pytest.raises(lora_build.LoraBuildError, match=r"\[3, 0\] is not finite: adapter math has a NaN or inf"):
        lora_build.build(_small(folder))
    assert not (folder / "out").exists()


# --- refusals -----------------------------------------------------------------------------------------------


def refusal(recipe: Mapping[str, Any]) -> str:
    with pytest.raises(lora_build.LoraBuildError) as caught:
        lora_build.build(recipe)
    return str(caught.value)


def test_weights_and_other_methods_are_refused_together_before_a_byte_is_written(folder: Path) -> None:
    small.make_adapter(folder / "hada", peft_type="LOHA")
    found = _small(folder, "math", "hada")
    found["adapters"]["math"] = {"source": str(folder / "math"), "weight": 0.5}

    message = refusal(found)
    assert "adapters.math: has weight 0.5, but peft merges whole adapters; set its weight to 1" in message
    assert "adapters.hada: numerics: peft repeats only LORA and TRAINABLE_TOKENS, not LOHA" in message
    assert not (folder / "out").exists()


@pytest.mark.parametrize("config", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_adapters_that_change_the_base_at_load_are_refused(config: dict[str, Any], folder: Path) -> None:
    small.make_adapter(folder / "svd", **config)
    assert "peft decomposes the base when it loads it" in refusal(_small(folder, "svd"))


def test_a_base_of_mixed_dtypes_is_refused_unless_the_recipe_says_one(folder: Path) -> None:
    tensors = load_file(folder / "base" / "model.safetensors")
    small.edit(folder / "base", model__norm__weight=tensors["model.norm.weight"].float())

    message = refusal(_small(folder))
    assert (
        "model.norm.weight is F32 and other tensors are BF16, but peft has a model in one dtype: set dtype" in message
    )
    assert lora_build.build(_small(folder, dtype="bfloat16"))


REFUSED: dict[str, tuple[str, tuple[Adapter, ...], dict[str, Any], str]] = {
    "experts of transformers 4": ("mixtral", (_lora(v4=True),), {}, "is only a part of a parameter in memory"),
    "experts of peft 0.18": (
        "qwen3_moe", (_lora(experts=True, rewrite="experts of peft 0.18"),), {},
        "peft 0.21 does not read the factors of this stack",
    ),
    "both ends of a tie": (
        "llama_tied", (_lora(targets=WHOLE),), {"tied_embeddings": "peft"}, "peft merges all adapters of one module before"
    ),
    "a tie that training kept": (
        "llama_tied", (_lora(targets=("embed_tokens",), ensure_weight_tying=True, loaded_as="float32"),), {}, "(ensure_weight_tying)"
    ),
    "replicated layers": ("llama", (_lora(layer_replication=[[0, 2], [1, 2]]),), {}, "which peft cannot merge"),
    "kasa": ("llama", (_lora(kasa_config=KasaConfig()),), {}, "peft decomposes the base"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_repeated_bit_by_bit_is_refused_by_name(case: str, zoo: Zoo) -> None:
    arch, adapters, more, reason = REFUSED[case]
    message = refusal(recipe(zoo, Base(arch=arch, dtype="bfloat16"), adapters, **more))

    assert reason in message
    assert "set numerics: exact" in message


def test_biases_of_an_attention_are_refused(zoo: Zoo) -> None:
    with pytest.warns(PeftWarning, match="has no bias"):
        found = recipe(zoo, Base(arch="siglip", dtype="bfloat16"), (_lora(targets=HEAD, lora_bias=True),))

    assert "peft loses some of the biases that it trains on an attention block (lora_bias)" in refusal(found)


def test_factors_packed_as_unsloth_packs_them_are_refused(zoo: Zoo) -> None:
    found = recipe(zoo, Base(arch="mixtral", dtype="bfloat16"), (_lora(experts=True),))
    found["adapters"]["a0"] = {"source": found["adapters"]["a0"], "expert_packing": "unsloth"}

    assert "expert_packing is unsloth, and peft knows only its own" in refusal(found)
