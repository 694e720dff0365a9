"""The decoder stack of a transformers model as one native call per forward pass.

`plan` reads the modules, `cache` is what transformers sees as its cache, `positions` and `inputs` prepare a pass,
`forward` runs it in the place of the decoder's own `forward`.
"""
