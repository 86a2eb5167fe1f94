"""Models that are not those of a checkpoint: without their head, with state of their own, without a config."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from lora_build import LoraModel
from makers.live import BF16, LLAMA, MATH, base_model, relative, snapshot, wrapped
from makers.zoo import Zoo, logits, quiet


def test_a_bare_model_takes_the_adapter_of_its_head(zoo: Zoo) -> None:
    with quiet():
        bare = transformers.AutoModel.from_pretrained(zoo.base(BF16), dtype="auto")
    ours = LoraModel.from_pretrained(bare, zoo.adapter(BF16, MATH)).merge_and_unload()

    whole = wrapped(zoo, BF16, math=MATH).merge_and_unload()
    assert snapshot(ours).bits == snapshot(whole.model).bits


def test_a_modules_state_may_hold_what_is_no_tensor(zoo: Zoo) -> None:
    """Layers that torch quantised keep packed weights there, those of Transformer Engine their scales."""

    class Kept(nn.Identity):
        def get_extra_state(self) -> Any:
            return {"scales": None}

    base = base_model(zoo)
    base.model.layers[0].extra = Kept()
    model = LoraModel.from_pretrained(base, zoo.adapter(LLAMA, MATH))
    assert torch.equal(logits("llama", model), logits("llama", wrapped(zoo, math=MATH)))


class Picture(nn.Module):
    """A layer of each kind, each called once; square ones too, whose shape does not tell how they are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 12)
        self.square = nn.Linear(12, 12)
        self.conv = nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 4, 1))
        self.plane = nn.Conv2d(1, 2, 3)
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.square(self.table(ids))  # [n, 4, 12]
        x = self.conv(x)  # [n, 4, 10]
        result: Tensor = self.head(self.plane(x[:, None]))
        return result


def picture() -> Picture:
    torch.manual_seed(0)
    return Picture().eval()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return adapters of a plain module that peft saved, by the option that they are about."""
    layers = ["table", "square", "conv.0", "conv.3", "plane", "head"]
    folders = {}
    for name, options in {
        "lora": {"target_modules": layers},
        "dora": {"target_modules": layers, "use_dora": True},
        "bias": {"target_modules": ["square", "conv.0"], "bias": "all"},
        "lora-bias": {"target_modules": ["square", "conv.3"], "lora_bias": True},
        "saved": {"target_modules": ["square"], "modules_to_save": ["head", "conv.1"]},
    }.items():
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(picture(), peft.LoraConfig(r=3, lora_alpha=5, **options))
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.3 * torch.randn(parameter.shape)
            folders[name] = tmp_path_factory.mktemp("picture") / name
            adapted.save_pretrained(str(folders[name]))
    return folders


@pytest.mark.parametrize("option", ["lora", "dora", "bias", "lora-bias", "saved"])
def test_a_plain_module_without_a_config_answers_and_merges_as_with_peft(
    option: str, pictures: dict[str, Path]
) -> None:
    ids = torch.arange(8).reshape(2, 4)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(picture(), pictures[option]).eval()(ids)
    model = LoraModel.from_pretrained(picture(), pictures[option])
    before = snapshot(model.base_model)

    with torch.no_grad():
        unmerged = model(ids)
        assert snapshot(model.base_model) == before
        merged = model.merge_and_unload()(ids)

    assert relative(unmerged, picture()(ids).detach()) > 1e-2
    assert relative(unmerged, theirs) < 1e-5
    assert relative(merged, theirs) < 1e-5
