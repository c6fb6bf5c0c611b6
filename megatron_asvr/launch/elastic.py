"""On how many nodes a run can go on: its batch, order and model parallel sizes stay as they are."""

from collections.abc import Sequence

from megatron_asvr.config.layout import check_layout
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import ConfigError


def most_nodes(config: Config, ranks_a_node: int) -> int:
    """The largest number of nodes whose ranks all have a sample in every step; at least 1."""
    p, t = config.parallel, config.train
    return max(1, t.global_batch // t.micro_batch * p.tp * p.pp * p.cp // ranks_a_node)


def usable_nodes(config: Config, ranks_a_node: int) -> tuple[int, ...]:
    """Numbers of nodes on which every rank has the same work in every step, ascending.

    Only the data-parallel size and the number of micro-batches a step differ between them.

    Args:
        config: a run, checked.
        ranks_a_node: ranks on each node.
    """
    counts = range(1, most_nodes(config, ranks_a_node) + 1)
    return tuple(n for n in counts if _fits(config, n * ranks_a_node))


def start_nodes(usable: Sequence[int], least: int, most: int) -> int:
    """How many of ``most`` nodes a run uses when it gets them all.

    Args:
        usable: of ``usable_nodes``.
        least: the smallest number of nodes that the job may get.
        most: the largest.

    Raises:
        ConfigError: with the smallest number it could not run.
    """
    if not usable or usable[0] > least:
        numbers = ", ".join(str(n) for n in usable[:8]) or "none"
        raise ConfigError(
            f"--nodes={least}-{most}: the layout and the global batch do not fit on {least} nodes; "
            f"numbers of nodes that they fit on: {numbers}"
        )
    return max(n for n in usable if n <= most)


def _fits(config: Config, world: int) -> bool:
    try:
        check_layout(config, world)
    except ConfigError:
        return False
    return True
