"""Python face of the compiled kernels.

`loader` finds the compiled module, `checks` refuses wrong tensors in words, `reference` computes the same in plain
torch; each kernel family has a module of its own. Importing any of them works without the compiled module; the first
call then says what was looked for and how to build it.
"""
