"""Which backend makes what: the compiled pass only where it has loops for both dtypes."""

from pathlib import Path

import torch
from safetensors.torch import load_file

import lora_build
from makers import small


def test_a_base_that_an_adapter_saved_along_in_float64_is_merged_with_torch(tmp_path: Path) -> None:
    base, module = small.make_base(tmp_path / "base"), small.MODULES[0]
    adapter = small.make_adapter(tmp_path / "math")
    weight = load_file(base / "model.safetensors")[f"{module}.weight"]
    lora_build.build(small.recipe(tmp_path, output={"dir": str(tmp_path / "plain")}))
    small.edit(adapter, **{f"base_model.model.{module}.base_layer.weight": weight.to(torch.float64)})
    built = lora_build.build(small.recipe(tmp_path))
    plain, wide = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    assert all(torch.equal(plain[name], wide[name]) for name in plain)
    (record,) = (tensor for tensor in built.manifest.tensors if tensor.name == f"{module}.weight")
    assert (record.operation, record.dtype) == ("merge", "BF16")
