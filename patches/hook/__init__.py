"""The one attention hook: where a model attends, what methods ask of it, and how that is served."""
