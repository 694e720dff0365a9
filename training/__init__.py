"""How the reference checkpoints are made; nothing here is imported by the plugin."""
