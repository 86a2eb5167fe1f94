"""Two builds or checkpoints beside each other, for `diff`: what each is (`compared`), and what they differ in.

`files` compares what lies beside the weights, `tokenizers` what those of them say that are a tokenizer's, `tensors` the
tensors by their digests, `weights` by their values, and `result` is what comes of it.
"""
