"""Surgery: model to changed model."""
