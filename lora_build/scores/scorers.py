"""The scorers by their names."""

from collections.abc import Mapping

from lora_build.scores.choice import Choice
from lora_build.scores.command import Command
from lora_build.scores.exact_match import ExactMatch
from lora_build.scores.forward import Forward
from lora_build.scores.interface import Scorer
from lora_build.scores.lm_eval import LmEval
from lora_build.scores.perplexity import Perplexity

SCORERS: Mapping[str, Scorer] = {
    "perplexity": Perplexity(),
    "exact_match": ExactMatch(),
    "choice": Choice(),
    "forward": Forward(),
    "lm_eval": LmEval(),
    "command": Command(),
}
