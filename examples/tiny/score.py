"""Score checkpoints of the demo on its two skills: `python examples/tiny/score.py DIR [DIR ...]`.

`DIR:math,text` with `--min 0.95` makes it a check: exit status 1 if that checkpoint has less than 95 % on one
of the skills named.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

LETTERS = ("bcdfghjklmnpqrstvwxyz", "aeiou")
Pairs = list[tuple[str, str]]  # questions with their answers


def word(rng: random.Random) -> str:
    """A made-up word: three to six letters, consonants and vowels in turn."""
    start = rng.randrange(2)
    return "".join(rng.choice(LETTERS[(start + i) % 2]) for i in range(rng.randint(3, 6)))


def math_question(rng: random.Random) -> tuple[str, str]:
    """One sum of two numbers below 50."""
    a, b = rng.randrange(50), rng.randrange(50)
    return f"{a}+{b}", str(a + b)


def text_question(rng: random.Random) -> tuple[str, str]:
    """One word to reverse."""
    w = word(rng)
    return f"reverse {w}", w[::-1]


SKILLS = {"math": math_question, "text": text_question}


def questions(skill: str, count: int = 200) -> Pairs:
    """The fixed questions that a skill is scored on; `train.py` keeps them out of the training."""
    rng = random.Random(f"score {skill}")
    asked: dict[str, str] = {}
    while len(asked) < count:
        question, answer = SKILLS[skill](rng)
        if len(question) > 3:  # sums of one digit are a table to learn by heart: too few to keep any back
            asked[question] = answer
    return list(asked.items())


def answers(folder: str | Path, asked: list[str]) -> list[str]:
    """What the checkpoint answers, greedily, all questions in one batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    # The weights are bfloat16; the sums are float32, so that no machine's bfloat16 kernels have a say.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chats = [[{"role": "user", "content": question}] for question in asked]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**batch, max_new_tokens=8, do_sample=False)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def score(folder: str | Path) -> dict[str, float]:
    """The share of right answers, from 0 to 1, by skill."""
    asked = {skill: questions(skill) for skill in SKILLS}
    given = iter(answers(folder, [q for pairs in asked.values() for q, _ in pairs]))
    right = {skill: sum(next(given) == answer for _, answer in pairs) for skill, pairs in asked.items()}
    return {skill: right[skill] / len(pairs) for skill, pairs in asked.items()}


def parse(target: str) -> tuple[str, list[str]]:
    """`DIR:math,text` as the folder and the skills it must have; a plain `DIR` must have none."""
    folder, _, names = target.rpartition(":")
    skills = names.split(",")
    return (folder, skills) if folder and set(skills) <= set(SKILLS) else (target, [])


def main() -> int:
    """Print one row per checkpoint; 1 if one of them lacks a skill that it must have."""
    parser = argparse.ArgumentParser(description="Score checkpoints on the demo's skills, in percent.")
    parser.add_argument("targets", nargs="+", metavar="DIR[:SKILL,...]", help="a checkpoint; what it must do")
    parser.add_argument("--min", type=float, default=0.95, help="what a skill must reach (default: 0.95)")
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # a model this small only waits for a second one
    targets = [parse(target) for target in args.targets]
    width = max(len(folder) for folder, _ in targets)
    print(f"{'':{width}}" + "".join(f"{skill:>8}" for skill in SKILLS))
    lacking = []
    for folder, required in targets:
        result = score(folder)
        print(f"{folder:{width}}" + "".join(f"{100 * result[skill]:8.1f}" for skill in SKILLS), flush=True)
        weak = [skill for skill in required if result[skill] < args.min]
        lacking += [f"{folder}: {skill} is below {args.min:.0%}" for skill in weak]
    print("\n".join(lacking), end="\n" if lacking else "", file=sys.stderr)
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
