"""The decoder stack of a transformers model as one native call per forward pass, and a loop over tokens of its own.

`plan` reads the modules, `cache` is what transformers sees as its cache, `positions` and `masks` prepare a pass,
`forward` runs it in the place of the decoder's own `forward`. `generation` gives `generate()` the cache and the
loop: `token_loop` walks from token to token, `steps` takes one step for all rows, `token_choice` and `stopping` are
transformers' processors and criteria, `token_ids` the text so far.
"""
