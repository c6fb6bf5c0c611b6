"""Settings: the schema, how files and overrides fill it, and the checks across settings."""
