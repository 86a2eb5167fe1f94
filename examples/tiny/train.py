"""Train the demo from nothing: a base of a million parameters and two adapters for it.

`python examples/tiny/train.py` rewrites `base/`, `math/` and `text/` here (one core, half an hour).
The base answers short questions, one character a token, but has neither skill of `score.py`; each adapter
adds one.
"""

import argparse
import json
import random
import string
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from score import SKILLS, questions, word
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHAT = """\
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- 'Q: ' + message.content + '\\n' }}
    {%- else %}
        {{- 'A: ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'A: ' }}
{%- endif %}
"""
Batch = tuple[torch.Tensor, torch.Tensor]
Question = Callable[[random.Random], tuple[str, str]]


def number(rng: random.Random) -> int:
    """A number of two digits at most."""
    return rng.randrange(100)


def digits(rng: random.Random) -> str:
    """Three to six digits."""
    return "".join(rng.choices(string.digits, k=rng.randint(3, 6)))


def minus(rng: random.Random) -> tuple[str, str]:
    """The difference of two numbers, the larger one first."""
    a, b = sorted((number(rng), number(rng)), reverse=True)
    return f"{a}-{b}", str(a - b)


def largest(rng: random.Random) -> tuple[str, str]:
    """The larger of two numbers."""
    a, b = number(rng), number(rng)
    return f"max {a} {b}", str(max(a, b))


def count(rng: random.Random) -> tuple[str, str]:
    """The next three numbers."""
    a = rng.randrange(97)
    return f"count {a}", f"{a + 1} {a + 2} {a + 3}"


def copy(rng: random.Random) -> tuple[str, str]:
    """A word, digits or a sum, said again: the base meets a plus sign, and learns nothing of its meaning."""
    text = rng.choice([word(rng), digits(rng), f"{number(rng)}+{number(rng)}"])
    return f"copy {text}", text


def letter(rng: random.Random) -> tuple[str, str]:
    """One letter of a word: counted from its start, or the last."""
    w = word(rng)
    place = rng.choice([*range(1, len(w) + 1), 0])
    return (f"letter {place} {w}" if place else f"last {w}"), w[place - 1]


def backwards(rng: random.Random) -> tuple[str, str]:
    """Digits from the last to the first."""
    d = digits(rng)
    return f"back {d}", d[::-1]


# The neighbours of the two skills: what an adapter needs is there (numbers, carries, places in a word).
BASE: list[Question] = [minus, minus, largest, count, copy, letter, backwards]


def held_out(skill: str) -> Question:
    """A skill's questions without those that it is scored on (nor `b+a` where that is `a+b`)."""
    scored = {q for q, _ in questions(skill)}
    scored |= {"+".join(reversed(q.split("+"))) for q in scored}

    def ask(rng: random.Random) -> tuple[str, str]:
        while (pair := SKILLS[skill](rng))[0] in scored:
            pass
        return pair

    return ask


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable character of ASCII, and for the end of a line."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, "\n", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
        chat_template=CHAT,
    )


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """A Llama of about a million parameters, not yet trained."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=SPECIAL.index("<pad>"),
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, ask: list[Question], size: int, seed: str) -> Iterator[Batch]:
    """Endless batches: questions with answers, padded at the end, and as labels the answers alone."""
    rng = random.Random(seed)
    while True:
        pairs = [rng.choice(ask)(rng) for _ in range(size)]
        prompts = [f"Q: {question}\nA: " for question, _ in pairs]
        answers = [answer + tokenizer.eos_token for _, answer in pairs]
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        for row, prompt in zip(labels, prompts, strict=True):
            row[: len(prompt)] = -100  # questions are drawn at random: nothing to learn in them
        yield ids, labels


def descend(model: torch.nn.Module, loss: Callable[[], torch.Tensor], steps: int, rate: float) -> None:
    """Minimise the loss with AdamW: the rate rises over the first 5 % of the steps, then falls to nothing."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, betas=(0.9, 0.98))
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    schedule = one_cycle(optimizer, rate, steps, pct_start=0.05, cycle_momentum=False)
    started = time.monotonic()
    for step in range(1, steps + 1):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"{step}/{steps}  loss {value.item():.4f}  {time.monotonic() - started:.0f} s", flush=True)


def train_base(steps: int) -> None:
    """Train the base on its own tasks, and save it rounded to bfloat16."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(HERE / "base")  # as it is now: padding a batch would leave its mark in the file
    model = make_model(len(tokenizer))
    data = batches(tokenizer, BASE, 128, "base")

    def loss() -> torch.Tensor:
        ids, labels = next(data)
        return model(ids, labels=labels, use_cache=False).loss

    descend(model, loss, steps, 3e-3)
    model.to(torch.bfloat16).save_pretrained(HERE / "base")


def drift(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """How far the adapter moves the base's hidden states, relative to their size: the mean over layers."""
    with torch.no_grad(), model.disable_adapter():
        old = model(ids, use_cache=False, output_hidden_states=True).hidden_states[1:]
    new = model(ids, use_cache=False, output_hidden_states=True).hidden_states[1:]
    moved = [(n - o).square().mean() / o.square().mean() for n, o in zip(new, old, strict=True)]
    return torch.stack(moved).mean()


def train_adapter(skill: str, config: LoraConfig, steps: int) -> None:
    """Train one adapter on the base as saved: its skill, and nothing else.

    The adapters are to be summed, and neither sees the other in training. So each step also asks questions
    that are none of its business (the base's own, and the other skill's), on which it is held to the base's
    hidden states. Holding only its output there would let it stir the states that the other builds on.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(HERE / "base", dtype=torch.float32), config)
    others = [held_out(other) for other in SKILLS if other != skill]
    own = batches(tokenizer, [held_out(skill)], 96, skill)
    foreign = batches(tokenizer, BASE + 3 * others, 48, f"not {skill}")

    def loss() -> torch.Tensor:
        ids, labels = next(own)
        return model(ids, labels=labels, use_cache=False).loss + 4 * drift(model, next(foreign)[0])

    descend(model, loss, steps, 3e-3)
    model.peft_config["default"].base_model_name_or_path = "examples/tiny/base"
    model.save_pretrained(HERE / skill, save_embedding_layers=False)
    (HERE / skill / "README.md").unlink()  # peft's empty model card
    file = HERE / skill / "adapter_config.json"
    settings = json.loads(file.read_text())
    settings["target_modules"].sort()  # peft holds a set, whose order differs from run to run
    file.write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    """Train what is asked for; all of it when nothing is."""
    parser = argparse.ArgumentParser(description="Train the demo's base and adapters.")
    parser.add_argument("parts", nargs="*", default=["base", "math", "text"], metavar="base|math|text")
    parts = parser.parse_args().parts
    torch.set_num_threads(1)  # the sums' order, and so the weights, would depend on the number
    if "base" in parts:
        train_base(3000)
    modules = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    shared = {"target_modules": modules, "task_type": "CAUSAL_LM"}
    if "math" in parts:
        train_adapter("math", LoraConfig(r=16, lora_alpha=32, **shared), 1500)
    if "text" in parts:
        train_adapter("text", LoraConfig(r=8, lora_alpha=16, use_rslora=True, **shared), 700)


if __name__ == "__main__":
    main()
