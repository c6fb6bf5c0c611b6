"""The device a run uses, behind one interface; nothing above this package knows torch.cuda."""

from megatron_asvr.platforms.base import Platform
from megatron_asvr.platforms.choose import select, without_memory

__all__ = ["Platform", "select", "without_memory"]
