"""Numbers: the exact sum and its one rounding, in plain torch and in compiled loops, and what rounding left."""
