"""Data: LLaVA-format JSON and images in, micro-batches out."""
