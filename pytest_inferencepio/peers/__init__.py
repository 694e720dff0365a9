"""Other engines and kernels, measured beside ours in one run: one module per peer, found by discovery."""
