"""The shipped benchmark tests, one module per category; collected with --pio-model."""
