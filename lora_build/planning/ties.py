"""What a change of one of several tied parameters means: a tensor of its own, or a change of all that share it."""

from dataclasses import dataclass

from lora_build.planning.layout import Layout
from lora_build.recipe.schema import TiedEmbeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class Separation:
    """Whether a change of a parameter stays with it.

    Attributes:
        is_own: whether it does; else what happens to it happens to all that share its tensor.
        must_cut: whether the tie has to be cut for it.
        issues: why nothing can be done about it.
        notes: what a user should know.
    """

    is_own: bool = True
    must_cut: bool = False
    issues: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def separate(layout: Layout, parameter: str, *, tied: TiedEmbeddings, replaces: bool) -> Separation:
    """Return whether a parameter gets a tensor of its own, as the recipe says of ties.

    Args:
        layout: where it lies.
        parameter: its path.
        tied: the recipe's word on ties.
        replaces: whether an adapter replaces it whole.
    """
    weights = layout.tied_weights
    if not weights.shared(parameter):
        is_unsaid = tied is TiedEmbeddings.untie and weights.is_kept_apart(parameter)
        return Separation(must_cut=is_unsaid and not weights.is_cut)
    member, name = weights.member(parameter), weights.name(parameter)
    if tied is TiedEmbeddings.error:
        others = ", ".join(weights.others(parameter))
        issue = f"base: {member} is tied to {others}, an adapter changes it, and the recipe says tied_embeddings: error"
        return Separation(issues=(issue,))
    if tied is TiedEmbeddings.peft and not replaces:
        note = f"{member} is tied: its update goes into {name} and so into all that share it (tied_embeddings: peft)"
        return Separation(is_own=False, notes=(note,))
    if bound := weights.bound(parameter):
        issue = (
            f"base: {member} shares its tensor with {', '.join(bound)} whatever tie_word_embeddings says, "
            "so an update to it alone cannot be kept apart; set tied_embeddings: peft to share it"
        )
        return Separation(issues=(issue,))
    return Separation(must_cut=not weights.is_cut)
