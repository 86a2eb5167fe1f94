"""Whoever loads a build finds what he finds in its base: tokenizers, processors, modules, code, as their libraries load them."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import lora_build
from makers import small

TEXT = "the cat sat on a mat"
WORDS = ["<unk>", "<pad>", "<s>", "</s>", "[CLS]", "[SEP]", "[MASK]", *TEXT.split()]


def build(root: Path, **config: Any) -> Path:
    """Return the build of a base that was made, with an adapter that changes nothing of what lies beside its weights."""
    if not (root / "base/model.safetensors").exists():
        small.make_base(root / "weights", **config)
        for file in (root / "weights").iterdir():
            if not (root / "base" / file.name).exists() and file.name != "tokenizer.json":
                shutil.copy(file, root / "base")
    small.make_adapter(root / "x")
    return lora_build.build(small.recipe(root, "x")).dir


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    return tmp_path / "base"


def word_tokenizer(*more: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {word: number for number, word in enumerate(dict.fromkeys([*WORDS, *more]))}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sentencepiece model of 60 pieces."""
    import sentencepiece

    root = tmp_path_factory.mktemp("pieces")
    lines = [f"the cat {i} sat on a mat and the dog {7 * i} ran home again" for i in range(300)]
    (root / "text").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "text"), model_prefix=str(root / "m"), vocab_size=60, unk_id=0, bos_id=1, eos_id=2, pad_id=3,
        minloglevel=2,
    )  # fmt: skip
    return root / "m.model"


# --- tokenizers -------------------------------------------------------------------------------------------------


def deberta(base: Path, pieces: Path) -> None:
    shutil.copy(pieces, base / "spm.model")
    settings = {"do_lower_case": False, "vocab_type": "spm", "tokenizer_class": "DebertaV2Tokenizer"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))


def marian(base: Path, pieces: Path) -> None:
    import sentencepiece

    for name in ("source.spm", "target.spm"):
        shutil.copy(pieces, base / name)
    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    vocab = {model.id_to_piece(i): i for i in range(60)} | {"<unk2>": 60, "<pad>": 61}
    (base / "vocab.json").write_text(json.dumps(vocab))
    settings = {"source_lang": "en", "target_lang": "de", "tokenizer_class": "MarianTokenizer"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))


def whisper(base: Path, _: Path) -> None:
    vocab = {word: number for number, word in enumerate(["<|endoftext|>", *sorted(set(TEXT)), "Ġ"])}
    (base / "vocab.json").write_text(json.dumps(vocab))
    (base / "merges.txt").write_text("#version: 0.2\n")
    (base / "normalizer.json").write_text(json.dumps({"mat": "rug"}))
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "WhisperTokenizer"}))


def phobert(base: Path, _: Path) -> None:
    (base / "vocab.txt").write_text("".join(f"{word} 1\n" for word in TEXT.split()))
    (base / "bpe.codes").write_text(
        "".join(f"{a} {b} 1\n" for a, b in (("t", "h"), ("th", "e</w>"), ("a", "t</w>"), ("c", "at</w>")))
    )
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PhobertTokenizer"}))


def t5(base: Path, pieces: Path) -> None:
    shutil.copy(pieces, base / "spiece.model")
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 2}))


TOKENIZERS: dict[Callable[[Path, Path], None], tuple[str, str]] = {
    deberta: ("DebertaV2Tokenizer", "deberta-v2"), marian: ("MarianTokenizer", "marian"), whisper: ("WhisperTokenizer", "whisper"),
    phobert: ("PhobertTokenizer", "roberta"), t5: ("T5Tokenizer", "t5"),
}  # fmt: skip


@pytest.mark.parametrize("make", TOKENIZERS, ids=lambda make: make.__name__)
def test_a_tokenizer_gives_the_ids_that_it_gives_in_the_base(
    base: Path, pieces: Path, make: Callable[[Path, Path], None]
) -> None:
    make(base, pieces)
    name, _ = TOKENIZERS[make]
    built = build(base.parent)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there, here = (getattr(transformers, name).from_pretrained(folder) for folder in (base, built))
    assert there(TEXT).input_ids == here(TEXT).input_ids
    assert len(set(there(TEXT).input_ids)) > 3
    if make is whisper:
        assert there.normalize("a mat") == here.normalize("a mat") == "a rug"


def test_files_of_every_tokenizer_of_transformers_are_in_the_build_to_the_byte(base: Path) -> None:
    from files.formats.test_side_files import declared

    names = sorted({name for found in declared().values() for name in found} | {"tekken.json", "tiktoken.model"})
    for name in names:
        (base / name).write_text(json.dumps({"file": name}))
    built = build(base.parent)

    assert len(names) >= 27
    assert [name for name in names if (built / name).read_text() != (base / name).read_text()] == []


# --- processors -------------------------------------------------------------------------------------------------

SIZE = {"height": 16, "width": 16}
CROP = {"size": {"shortest_edge": 16}, "crop_size": SIZE}


def image() -> Any:
    from PIL import Image

    return Image.fromarray((np.arange(32 * 32 * 3) % 251).astype("uint8").reshape(32, 32, 3))


def sound() -> dict[str, Any]:
    return {"audio": np.sin(np.arange(16_000) / 7).astype("float32"), "sampling_rate": 16_000}


def processors() -> dict[str, Callable[[], tuple[Any, dict[str, Any]]]]:
    """Return for each type of model what makes its processor, and what that is asked."""
    t, words = transformers, word_tokenizer
    return {
        "clip": lambda: (t.CLIPProcessor(t.CLIPImageProcessorPil(**CROP), words()), {"text": TEXT, "images": image()}),
        "siglip": lambda: (t.SiglipProcessor(t.SiglipImageProcessorPil(size=SIZE), words()), {"text": TEXT, "images": image()}),
        "blip": lambda: (t.BlipProcessor(t.BlipImageProcessorPil(size=SIZE), words()), {"text": TEXT, "images": image()}),
        "instructblip": lambda: (
            t.InstructBlipProcessor(t.BlipImageProcessorPil(size=SIZE), words(), words("the", "query"), num_query_tokens=2),
            {"text": TEXT, "images": image()},
        ),
        "vilt": lambda: (
            t.ViltProcessor(t.ViltImageProcessorPil(size={"shortest_edge": 32}), words()), {"text": TEXT, "images": image()}
        ),
        "owlvit": lambda: (t.OwlViTProcessor(t.OwlViTImageProcessorPil(size=SIZE), words()), {"text": [TEXT], "images": image()}),
        "trocr": lambda: (t.TrOCRProcessor(t.ViTImageProcessorPil(size=SIZE), words()), {"images": image()}),
        "git": lambda: (t.GitProcessor(t.CLIPImageProcessorPil(**CROP), words()), {"text": TEXT, "images": image()}),
        "sam": lambda: (
            t.SamProcessor(t.SamImageProcessorPil(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32})),
            {"images": image()},
        ),
        "whisper": lambda: (t.WhisperProcessor(t.WhisperFeatureExtractor(feature_size=8, chunk_length=1), words()), sound()),
        "wav2vec2": lambda: (t.Wav2Vec2Processor(t.Wav2Vec2FeatureExtractor(), words()), sound()),
        "clap": lambda: (
            t.ClapProcessor(t.ClapFeatureExtractor(feature_size=8, max_length_s=1, sampling_rate=16_000), words()),
            {"text": TEXT} | sound(),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", processors())
@pytest.mark.filterwarnings("ignore")
def test_a_processor_gives_what_it_gives_in_the_base(base: Path, kind: str) -> None:
    made, asked = processors()[kind]()
    made.save_pretrained(base)
    built = build(base.parent)

    there, here = (type(made).from_pretrained(folder)(**asked, return_tensors="pt") for folder in (base, built))
    assert there.keys() == here.keys() > set()
    assert all(torch.equal(there[key], here[key]) for key in there)
    kept = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
    assert kept <= {path.relative_to(built) for path in built.rglob("*")}


def test_the_voices_of_bark_go_along(base: Path) -> None:
    word_tokenizer().save_pretrained(base)
    (base / "speaker_embeddings/v2").mkdir(parents=True)
    voice = {}
    for kind, shape in (("semantic_prompt", (3,)), ("coarse_prompt", (2, 3)), ("fine_prompt", (8, 3))):
        voice[kind] = f"speaker_embeddings/v2/a_{kind}.npy"
        np.save(base / voice[kind], np.ones(shape))
    (base / "speaker_embeddings_path.json").write_text(json.dumps({"repo_or_path": "", "v2/a": voice}))
    built = build(base.parent)

    there, here = (
        transformers.BarkProcessor.from_pretrained(folder)(TEXT, voice_preset="v2/a")["history_prompt"]
        for folder in (base, built)
    )
    assert all(np.array_equal(there[kind], here[kind]) for kind in voice)


# --- code and modules -------------------------------------------------------------------------------------------

CONFIGURATION = """
from transformers import PretrainedConfig
class OwnConfig(PretrainedConfig):
    model_type = "own"
"""
MODELING = """
import torch
from transformers import PreTrainedModel
from .configuration_own import OwnConfig
from .layers import scale
class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(
            torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 8, bias=False)})}) for _ in range(2))})
        self.model["norm"] = torch.nn.Linear(1, 6, bias=False)
        self.post_init()
    def forward(self, x):
        return scale(self.model["layers"][0]["self_attn"]["q_proj"](x))
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizer
class OwnTokenizer(PreTrainedTokenizer):
    vocab_size = 64
    def get_vocab(self): return {str(i): i for i in range(64)}
    def _tokenize(self, text): return list(text)
    def _convert_token_to_id(self, token): return int(token) if token.isdigit() else 0
    def _convert_id_to_token(self, index): return str(index)
    def save_vocabulary(self, *_, **__): return ()
"""


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_code_of_its_own_has_it_in_the_build(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(base.parent / "modules"))
    for name, text in (("configuration_own", CONFIGURATION), ("modeling_own", MODELING), ("own_words", TOKENIZATION),
                       ("layers", "def scale(x): return 2 * x"), ("train", "raise SystemExit")):  # fmt: skip
        (base / f"{name}.py").write_text(text)
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    (base / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["own_words.OwnTokenizer", None]}})
    )
    built = build(base.parent, model_type="own", architectures=["OwnModel"], auto_map=own)

    assert not (built / "train.py").exists()
    there, here = (
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True, use_fast=False)
        for folder in (base, built)
    )
    assert there("123").input_ids == here("123").input_ids == [1, 2, 3]
    kinds = [type(transformers.AutoConfig.from_pretrained(f, trust_remote_code=True)).__name__ for f in (base, built)]
    assert kinds == ["OwnConfig", "OwnConfig"]
    classes = [
        transformers.dynamic_module_utils.get_class_from_dynamic_module("modeling_own.OwnModel", folder)
        for folder in (base, built)
    ]
    assert [cls.__name__ for cls in classes] == ["OwnModel", "OwnModel"]


@pytest.mark.long  # importing sentence-transformers takes seven seconds
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pickled", [False, True])
def test_an_embedding_model_embeds_as_its_modules_say(base: Path, pickled: bool) -> None:
    import peft
    from sentence_transformers import SentenceTransformer, models

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    transformers.BertModel(transformers.BertConfig(**sizes, max_position_embeddings=64)).save_pretrained(
        base.parent / "bert"
    )
    word_tokenizer().save_pretrained(base.parent / "bert")
    parts = [
        models.Transformer(str(base.parent / "bert")),
        models.Pooling(16, pooling_mode="cls"),
        models.Dense(16, 8),
        models.Normalize(),
    ]
    SentenceTransformer(modules=parts, device="cpu").save(str(base))
    if pickled:
        (weights,) = base.glob("2_Dense/model.safetensors")
        torch.save(parts[2].state_dict(), base / "2_Dense/pytorch_model.bin")
        weights.unlink()
    bert = transformers.BertModel.from_pretrained(base)
    adapted = peft.get_peft_model(bert, peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    adapted.save_pretrained(base.parent / "x")
    built = lora_build.build(small.recipe(base.parent, "x"))

    merged = shutil.copytree(base, base.parent / "merged")
    adapted.merge_and_unload().save_pretrained(merged)

    there, here = (SentenceTransformer(str(folder), device="cpu") for folder in (merged, built.dir))
    assert [type(module).__name__ for module in here] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert np.allclose(there.encode([TEXT, "a dog"]), here.encode([TEXT, "a dog"]), atol=1e-6)
    assert any("pickled weights of a module" in note for note in built.manifest.notes or ()) == pickled
