"""What merging measures on its way."""

import math

from lora_build.numerics.measure import Measured, Share, share_of, total


def test_blocks_add_up_to_what_was_done_to_the_whole() -> None:
    blocks = (
        Measured(base=1.0, update=2.0, num_updated=3, num_changed=4),
        Measured(base=10.0, update=20.0, num_updated=30, num_changed=40),
    )

    assert total(iter(blocks)) == Measured(base=11.0, update=22.0, num_updated=33, num_changed=44)
    assert total(()) == Measured() == Measured(base=0.0, update=0.0, num_updated=0, num_changed=0, finite=True)


def test_the_share_of_an_adapter_has_norms_and_not_their_squares() -> None:
    share = share_of("math", Measured(base=9.0, update=4.0, num_updated=5, num_changed=6))

    assert share == Share(adapter="math", base_norm=3.0, update_norm=2.0, num_updated=5, num_changed=6)
    assert math.isinf(share_of("math", Measured(update=math.inf)).update_norm)
