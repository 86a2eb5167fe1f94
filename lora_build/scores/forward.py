"""The forward check as a score: how the build answers beside its base and its adapters, unmerged.

ok          1 where rounding explains every difference, as `checks.forward` wants it, else 0
top1        the least share of positions of a prompt where both prefer the same token
kl          the largest KL divergence of a position, in nats
difference  the largest difference of a logit
"""

import math
from dataclasses import dataclass, replace

from lora_build.files.identity import Digest
from lora_build.files.readback import read_file
from lora_build.proof.scored import PlannedScore
from lora_build.scores.data import located, read_planned
from lora_build.scores.interface import Metrics, ScoredBuild


@dataclass(frozen=True, slots=True)
class Forward:
    """How a build answers beside its base and adapters."""

    version: int = 1
    is_remembered: bool = True

    def plan(self, score: PlannedScore) -> PlannedScore:
        """Return the score with the digest of its prompts."""
        if score.options["prompts"] is None:
            return score
        from lora_build.proof.forward.inputs import read_prompts  # torch

        path = located(score, "prompts")
        read_prompts(path)
        return replace(score, data=path, data_digest=Digest.sha256(read_file(path)))

    def device(self, score: PlannedScore) -> str:
        """Return what it runs on."""
        return "cpu"

    def measure(self, score: PlannedScore, build: ScoredBuild) -> Metrics:
        """Return how far its answers are off."""
        from lora_build.proof.forward.compare import compare_forward
        from lora_build.proof.forward.inputs import Prompts, read_prompts

        seed = int(score.options["seed"])
        prompts = Prompts(seed=seed)
        if score.data is not None:
            read_planned(score)
            prompts = read_prompts(score.data, seed)
        build.models.clear()  # it loads others
        found = compare_forward(build.folder, build.manifest, build.inputs(), prompts)
        build.tell(score.name, 1, 1)
        top1 = [check.top1 for check in found.prompts if check.top1 is not None]
        kl = [check.kl for check in found.prompts if check.kl is not None]
        return Metrics(
            metrics={
                "ok": float(found.is_ok),
                "top1": min(top1, default=math.nan),
                "kl": max(kl, default=math.nan),
                "difference": max(check.difference for check in found.prompts),
            },
            details={"problem": found.problem} if found.problem else None,
        )
