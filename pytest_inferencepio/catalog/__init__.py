"""The models: dimensions, reference checkpoints, loading, inputs."""
