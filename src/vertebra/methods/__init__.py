"""Methods: training objectives around a backbone or a task model."""
