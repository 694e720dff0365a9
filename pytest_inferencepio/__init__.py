"""pytest plugin that measures inference optimizations on real models and gates merges on the result."""
