"""docs/supported.md is what happens today: every method and option on every kind of layer, tried and judged here.

A cell is one adapter: peft makes it for a tiny model and saves it after its weights were moved, a build merges it, and the
result must answer as the adapted model did before. Only the axes of the tables are written by hand.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_build
from judges.oracle import base_tensors, long, ulps_off
from judges.test_architectures import CASES
from lora_build.errors import LoraBuildError
from lora_build.methods.interface import methods
from makers.families import FAMILIES

pytestmark = pytest.mark.early

PAGE = Path(__file__).parent.parent.parent / "docs/supported.md"
MERGED, TRAINED, AS_PEFT, REFUSED, IMPOSSIBLE, WRONG = "merged", "as trained", "as peft", "refused", "-", "wrong"
HALF_ULP, SAME_ANSWER, OTHER_ANSWER = 0.51, 2e-5, 1e-3


@contextmanager
def hushed() -> Iterator[None]:
    """Silence what peft says of the many adapters here that nobody should make."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- the layers -----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """The attention of a sequence to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return result


class Experts(nn.Module):
    """A stack of matrices, one for each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.zeros(3, 8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,ni->eno", self.stack, x)


class Net(nn.Module):
    """A layer, and a Linear beside it for adapters that save the layer whole."""

    def __init__(self, part: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.part, self.other, self.x = part, nn.Linear(12, 8), x

    def forward(self) -> Tensor:
        x = self.x if self.x.dtype == torch.int64 else self.x.to(self.other.weight.dtype)
        rows = noise(7, 3, 12).to(self.other.weight.dtype)
        return torch.cat([self.part(x).flatten(), self.other(rows).flatten()])


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What is adapted.

    `make` makes the base, `target` is the module, `other` a Linear of the model, `options` go to the adapter's config, and
    `classifies` tells that the model has another head when it is trained.
    """

    name: str
    make: Callable[[], Any]
    target: str = "part"
    other: str = "other"
    options: Mapping[str, Any] = field(default_factory=dict)
    classifies: bool = False


def net(layer: Callable[[], nn.Module], *shape: int) -> Callable[[], Net]:
    return lambda: Net(layer(), noise(8, *shape))


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=24, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


TOKENS = torch.arange(6).reshape(2, 3)
LLAMA: dict[str, Any] = {"make": llama, "other": "q_proj"}
PLACES = {
    place.name: place
    for place in (
        Place(name="Linear", make=net(lambda: nn.Linear(12, 8), 3, 12)),
        Place(name="its bias", make=net(lambda: nn.Linear(12, 8), 3, 12), options={"bias": "all"}),
        Place(name="Conv1D", make=net(lambda: Conv1D(8, 12), 3, 12)),
        Place(name="Embedding", make=lambda: Net(nn.Embedding(10, 12), TOKENS)),
        Place(name="tied embedding", target="embed_tokens", **LLAMA),
        Place(name="tied head", target="lm_head", **LLAMA),
        Place(name="new head", target="q_proj", options={"task_type": "SEQ_CLS"}, classifies=True, **LLAMA),
        Place(name="Conv1d", make=net(lambda: nn.Conv1d(6, 8, 3), 2, 6, 9)),
        Place(name="Conv2d", make=net(lambda: nn.Conv2d(6, 8, 3), 2, 6, 5, 5)),
        Place(name="Conv2d 1x1", make=net(lambda: nn.Conv2d(6, 8, 1), 2, 6, 5, 5)),
        Place(name="Conv2d, groups", make=net(lambda: nn.Conv2d(8, 8, 3, groups=2), 2, 8, 5, 5)),
        Place(name="Conv3d", make=net(lambda: nn.Conv3d(4, 6, 2), 2, 4, 3, 3, 3)),
        Place(name="MultiheadAttention", make=net(Attention, 2, 5, 8), target="inner"),
        Place(name="experts", make=net(Experts, 3, 12), options={"target_parameters": ["part.stack"]}),
    )
}


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the methods and options ----------------------------------------------------------------------------------

Options = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An adapter's config, by its class and keys; `saves` and `trains` use the layer otherwise than as a target.

    `edits` changes what adapter_config.json says afterwards: such an adapter needs more to be made than a tiny model has.
    """

    name: str
    config: str = "Lora"
    options: Options = field(default_factory=dict)
    saves: bool = False
    trains: bool = False
    edits: Options = field(default_factory=dict)

    def make(self, place: Place) -> Any:
        """Return the config that adapts a place."""
        options = {"target_modules": [place.target], **place.options, **self.options}
        if "target_parameters" in options:
            options["target_modules"] = []
        if self.config in ("Lora", "AdaLora"):
            options["fan_in_fan_out"] = place.name == "Conv1D"
        if self.saves:
            options |= {"modules_to_save": [place.target], "target_modules": [place.other]}
        if self.trains:
            options |= {"trainable_token_indices": {place.target: [1, 3]}, "target_modules": [place.other]}
        return getattr(peft, f"{self.config}Config")(**options)


def lora(name: str, *, saves: bool = False, trains: bool = False, edits: Options | None = None, **options: Any) -> Row:
    return Row(
        name=name, options={"r": 4, "lora_alpha": 5, **options}, saves=saves, trains=trains, edits=edits or {}
    )  # fmt: skip


INITS = ("gaussian", "orthogonal", "eva", "mica", "pissa", "olora", "pissa_niter_4")
BLOCKS = peft.tuners.lora.BdLoraConfig(nblocks=2, match_strict=False, target_modules_bd_a=["part", "q_proj", "lm_head"])
ROWS = (
    lora("LoRA"),
    lora("LoRA, `use_rslora`", use_rslora=True),
    lora("LoRA, `rank_pattern` and `alpha_pattern`", rank_pattern={".*": 2}, alpha_pattern={".*": 7}),
    lora("LoRA, `lora_bias`", lora_bias=True),
    lora("LoRA, it in `modules_to_save`", saves=True),
    lora("LoRA, rows of it in `trainable_token_indices`", trains=True),
    lora("LoRA, `ensure_weight_tying`", ensure_weight_tying=True),
    lora("DoRA", use_dora=True),
    lora("BD-LoRA", use_bdlora=BLOCKS),
    lora("KaSA", kasa_config=peft.tuners.lora.KasaConfig()),
    lora("VeLoRA", velora_config=peft.tuners.lora.VeloraConfig()),
    lora("MonteCLoRA", monteclora_config=peft.tuners.lora.MontecloraConfig()),
    *(lora(f"`init_lora_weights: {init}`", init_lora_weights=init) for init in INITS),
    *(lora(f"`init_lora_weights: {i}` †", edits={"init_lora_weights": i}) for i in ("corda", "lora_ga", "loftq")),
    lora("QALoRA †", edits={"use_qalora": True}),
    lora("aLoRA", alora_invocation_tokens=[5, 6]),
    lora("Arrow †", edits={"arrow_config": {"top_k": 2}}),
    Row(name="AdaLoRA", config="AdaLora", options={"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 6}),
    Row(name="IA3", config="IA3", options={"feedforward_modules": []}),
    Row(name="IA3, feedforward", config="IA3", options={"feedforward_modules": ".*"}),
    Row(name="LoHa", config="LoHa", options={"r": 4, "alpha": 6}),
    Row(name="LoHa, `use_effective_conv2d`", config="LoHa", options={"r": 4, "alpha": 6, "use_effective_conv2d": True}),
    Row(name="LoKr", config="LoKr", options={"r": 1, "alpha": 2}),
    Row(name="LoKr, `use_effective_conv2d`", config="LoKr", options={"r": 1, "alpha": 2, "use_effective_conv2d": True}),
    Row(name="LoKr, `decompose_both`", config="LoKr", options={"r": 1, "alpha": 2, "decompose_both": True}),
    Row(name="OFT", config="OFT", options={"r": 0, "oft_block_size": 2}),
    Row(name="OFT, `coft`", config="OFT", options={"r": 0, "oft_block_size": 2, "coft": True, "eps": 0.25}),
    Row(name="OFT, `block_share`", config="OFT", options={"r": 0, "oft_block_size": 2, "block_share": True}),
    Row(name="trainable tokens", config="TrainableTokens", options={"token_indices": [1, 3]}),
    Row(name="VeRA", config="Vera", options={"r": 3}),
    Row(name="VeRA, `save_projection: false`", config="Vera", options={"r": 3, "save_projection": False}),
)


EMBEDDED_INITS = [f"`init_lora_weights: {init}`" for init in ("pissa", "olora")]
KNOWN_WRONG: set[tuple[str, str]] = set()


def test_every_method_has_a_row() -> None:
    with hushed():
        assert {row.make(PLACES["Linear"]).peft_type.value for row in ROWS} == set(methods())
    assert len({row.name for row in ROWS}) == len(ROWS)


# --- one cell -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """What happens, and why."""

    what: str
    why: str = ""
    is_exact: bool = True


PEFT_REFUSES = (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError)


def save_base(place: Place, folder: Path) -> Path:
    torch.manual_seed(0)
    model = place.make()
    for i, parameter in enumerate(model.parameters()):
        parameter.data = 0.3 * noise(i, *parameter.shape) + (1.0 if parameter.ndim == 1 else 0.0)
    if isinstance(model, Net):
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text('{"architectures": ["Net"], "tie_word_embeddings": false}')
    else:
        model.tie_weights()
        model.save_pretrained(folder)
    return folder


def load(place: Place, folder: Path) -> Any:
    """Return the model of a folder, with the head that is trained where there is another one."""
    if place.make is llama:
        torch.manual_seed(1)  # of a head that the base lacks
        with_head = transformers.LlamaForSequenceClassification if place.classifies else transformers.LlamaForCausalLM
        return with_head.from_pretrained(folder, dtype=torch.float32).eval()
    model = place.make()
    model.load_state_dict(base_tensors(folder))
    return model.eval()


def answer(model: Any) -> Tensor:
    with torch.no_grad(), hushed():
        inner = model.base_model.model if isinstance(model, PeftModel) else model
        found = inner() if isinstance(inner, Net) else inner(input_ids=torch.arange(3, 23).reshape(2, 10)).logits
    return torch.as_tensor(found).double()


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def train(row: Row, place: Place, base: Path, folder: Path) -> Any:
    """Save an adapter that peft makes, its weights moved, and return the adapted model."""
    torch.manual_seed(2)
    with hushed():
        model = get_peft_model(load(place, base), row.make(place))
        for i, (_, parameter) in enumerate(model.named_parameters()):
            if parameter.requires_grad:  # in place: tied factors stay tied
                size = parameter.data.abs().mean().item()
                parameter.data += 0.2 * (size if size > 0.1 else 1.0) * noise(100 + i, *parameter.shape)
        model.create_or_update_model_card = lambda _: None  # a page for readers, and a quarter of the time
        model.save_pretrained(str(folder))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None} | row.edits))
    return model.eval()


def peft_is_met(place: Place, base: Path, adapter: Path, ours: Mapping[str, Tensor]) -> bool:
    """Whether every tensor is half an ulp, and a hair, from what peft merges in float64."""
    before = base_tensors(base)
    try:
        with hushed():
            model = PeftModel.from_pretrained(load(place, base), str(adapter)).double()
            theirs = model.merge_and_unload().state_dict()
    except PEFT_REFUSES:
        return False
    for name, tensor in ours.items():
        if name not in theirs or theirs[name].shape != tensor.shape:
            return False
        start = before[name] if name in before and before[name].shape == tensor.shape else tensor
        if float(ulps_off(tensor, long(theirs[name]), start, tensor.dtype).max()) > HALF_ULP:
            return False
    return True


def attempt(row: Row, place: Place, base: Path, folder: Path) -> Cell:
    """Make an adapter with peft, build it, and judge the result."""
    folder.mkdir()
    adapter, out = folder / "adapter", folder / "out"
    try:
        trained = train(row, place, base, adapter)
        wanted = torch.empty(0) if row.edits else answer(trained)
    except PEFT_REFUSES as error:
        return Cell(IMPOSSIBLE, first_sentence(str(error)))
    try:
        manifest = lora_build.build({"base": base, "adapters": {"x": adapter}, "output": {"dir": out}}).manifest
    except LoraBuildError as error:
        return Cell(REFUSED, first_issue(str(error)))
    assert not row.edits, f"{row.name} is merged: it needs an adapter that can be asked"
    before = answer(load(place, base))
    assert before.shape != wanted.shape or off(before, wanted) > OTHER_ANSWER, "the adapter does nothing"
    met, right = peft_is_met(place, base, adapter, base_tensors(out)), off(answer(load(place, out)), wanted)
    if right > SAME_ANSWER:
        return Cell(
            *((AS_PEFT, "not what was trained") if met else (WRONG, "neither what was trained nor peft's merge"))
        )
    return Cell(MERGED if met else TRAINED, is_exact=manifest.reproducibility == "exact")


def first_sentence(message: str) -> str:
    """Return the beginning of peft's reason, without what a module holds."""
    text = re.sub(r"\(\n?.*?\)(?= is not)", "", message, flags=re.DOTALL)
    return re.split(r"(?<=\w\w)\. |\n", text.replace("<class '", "").replace("'>", ""))[0].strip().rstrip(".")


def first_issue(message: str) -> str:
    """Return why a build was refused, without where."""
    issue = message.partition("\n")[2].strip().partition("\n")[0].partition(" (base/config.json")[0]
    return re.sub(
        r"^adapters\.x(/adapter_config\.json)?: ([\w.]*(part|inner|_proj|lm_head|embed_tokens): )?", "", issue
    )


Table = Mapping[tuple[str, str], Cell]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Return every cell by the names of its row and its place."""
    root = tmp_path_factory.mktemp("supported")
    cells = {}
    for i, place in enumerate(PLACES.values()):
        base = save_base(place, root / f"base-{i}")
        for j, row in enumerate(ROWS):
            cells[row.name, place.name] = attempt(row, place, base, root / f"{i}-{j}")
    return cells


def test_what_is_merged_answers_as_it_was_trained(table: Table) -> None:
    assert {key for key, cell in table.items() if cell.what == WRONG} == KNOWN_WRONG
    assert len([cell for cell in table.values() if cell.what in (MERGED, TRAINED)]) > 200


# --- the page -------------------------------------------------------------------------------------------------

MATRICES = ("Linear", "its bias", "Conv1D", "Embedding", "tied embedding", "tied head", "new head")
OTHERS = tuple(name for name in PLACES if name not in MATRICES)
Notes = dict[str, int]


def lines(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def layers(table: Table, places: tuple[str, ...], notes: Notes) -> str:
    """Return a table of methods by layers; a new reason gets the next number."""

    def text(cell: Cell) -> str:
        mark = "" if cell.is_exact else "\\*"
        return f"{cell.what}{mark}" + (f" <sup>{notes.setdefault(cell.why, len(notes) + 1)}</sup>" if cell.why else "")

    return lines([["", *places], *([row.name, *(text(table[row.name, place]) for place in places)] for row in ROWS)])


def other_types(folder: Path) -> str:
    """Return what a build says of an adapter of each type that PEFT has and that no method is for."""
    base = save_base(PLACES["Linear"], folder / "base")
    train(ROWS[0], PLACES["Linear"], base, folder / "x")
    file = folder / "x/adapter_config.json"
    found = {}
    for kind in sorted({kind.value for kind in peft.PeftType} - set(methods())):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": kind}))
        with pytest.raises(LoraBuildError) as caught:
            lora_build.build({"base": base, "adapters": {"x": folder / "x"}, "output": {"dir": folder / "out"}})
        (found[kind],) = re.findall(rf"peft_type {kind} (.*?)(?:;|$)", str(caught.value))
    reasons = {reason: [kind for kind, why in found.items() if why == reason] for reason in found.values()}
    return lines([["`peft_type`", ""], *([", ".join(kinds), reason] for reason, kinds in reasons.items())])


def architectures() -> str:
    """Return the families of test_architectures.py, and what is built or refused there."""

    def names(arch: str, *, refused: bool) -> str:
        ids = (case.id for case in CASES if case.base.arch == arch and (case.refused is not None) == refused)
        return ", ".join(dict.fromkeys(i.removeprefix(f"{arch}-").removesuffix("-bf16") for i in ids))

    return lines([
        ["model", "class", "built", "refused"],
        *(
            [name, f"`{arch.model_class}`", names(name, refused=False), names(name, refused=True)]
            for name, arch in FAMILIES.items()
        ),
    ])  # fmt: skip


def test_the_page_says_what_happens_today(table: Table, tmp_path: Path, update_goldens: bool) -> None:
    notes: Notes = {}
    blocks = {
        "versions": f"Made with peft {peft.__version__} and transformers {transformers.__version__}.",
        "matrices": layers(table, MATRICES, notes),
        "others": layers(table, OTHERS, notes),
        "notes": "\n".join(f"{number}. {why}" for why, number in notes.items()),
        "types": other_types(tmp_path),
        "architectures": architectures(),
    }
    shown = PAGE.read_text(encoding="utf-8")
    page = shown
    for name, text in blocks.items():
        begin, end = (
            f"<!-- {name}: written by pytest tests/pages/test_supported.py --update-goldens -->",
            "<!-- end -->",
        )
        assert page.count(begin) == 1
        page = re.sub(
            rf"({re.escape(begin)}\n).*?(?={end})", lambda m, t=text: f"{m[1]}\n{t}\n\n", page, flags=re.DOTALL
        )
    if update_goldens:
        PAGE.write_text(page, encoding="utf-8")
    else:
        assert shown == page
