"""The command `asvr`: one small file a command; the only place that prints."""
