"""Tests of several ranks import megatron-core at their top, so the process is prepared here."""

from megatron_asvr.platforms import mcore  # noqa: F401
