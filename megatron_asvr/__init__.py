"""Train vision-language models with autoregressive semantic visual reconstruction (ASVR)."""

__version__ = "0.1.0"
