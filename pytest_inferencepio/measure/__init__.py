"""From a runner to samples: timing, memory, energy, fidelity, serving."""
