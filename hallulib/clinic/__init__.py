"""The built-in clinic world: notes whose facts are known, so hallucination is measured exactly."""
