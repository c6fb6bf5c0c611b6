"""Collectives are called in one module only: what would hang or corrupt on a GPU is refused there.

megatron-core's collectives are its own. Whatever else in the package names one of torch's, as a
function, through an alias or as a method of a group, is found in its syntax tree.
"""

import ast
import re
from pathlib import Path

import pytest

import megatron_asvr

PACKAGE = Path(megatron_asvr.__file__).parent
HOME = PACKAGE / "parallel" / "collectives.py"
COLLECTIVE = re.compile(
    r"torch\.(distributed|ops\._?c10d\w*)\b.*"
    r"\._?(all_|all[grt]|reduce|gather|scatter|broadcast|i?send|i?recv|batch_isend|P2POp|barrier"
    r"|monitored_barrier|permute_tensor|\*)\w*"
)
# Of a process group; those that share a name with a method of tensors or connections are left out.
METHODS = {
    *("allreduce", "allreduce_coalesced", "allgather", "_allgather_base", "allgather_coalesced"),
    *("reduce_scatter", "_reduce_scatter_base", "alltoall", "alltoall_base"),
    *("broadcast", "barrier", "monitored_barrier"),
}


def collectives(source: str) -> list[str]:
    """Line and full name of every collective of torch that the source names."""
    tree = ast.parse(source)
    known: dict[str, str] = {}  # full name of what a local name stands for
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                first = item.name.partition(".")[0]
                known[item.asname or first] = item.name if item.asname else first
        elif isinstance(node, ast.ImportFrom):
            for item in node.names:
                known[item.asname or item.name] = f"{node.module}.{item.name}"
                names.append((node.lineno, f"{node.module}.{item.name}"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            known.setdefault(node.targets[0].id, _full_name(node.value, known))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            names.append((node.lineno, _full_name(node, known)))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in METHODS:
            names.append((node.lineno, f"torch.distributed.{node.func.attr}"))
    return sorted({f"{line}: {name}" for line, name in names if COLLECTIVE.fullmatch(name)})


def _full_name(node: ast.AST, known: dict[str, str]) -> str:
    """``torch.distributed.all_reduce`` for ``dist.all_reduce``; empty when it is no name."""
    if isinstance(node, ast.Attribute):
        return f"{_full_name(node.value, known)}.{node.attr}"
    return known.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def test_collectives_are_called_in_one_module_only() -> None:
    found = {
        str(path.relative_to(PACKAGE)): names
        for path in PACKAGE.rglob("*.py")
        if path != HOME and (names := collectives(path.read_text()))
    }
    assert not found, f"call parallel.collectives instead: {found}"
    assert collectives(HOME.read_text())


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.distributed.all_reduce(x)",
        "import torch.distributed\ntorch.distributed.barrier()",
        "import torch.distributed as dist\ndef f(): dist.all_gather_object(x, y)",
        "from torch import distributed as d\nd.broadcast_object_list(x, src=0)",
        "from torch.distributed import all_reduce",
        "from torch.distributed import irecv as later\nlater(x)",
        "from torch.distributed import *",
        "import torch\nd = torch.distributed\nd.reduce_scatter_tensor(x, y)",
        "import torch.distributed as dist\nrun(dist.isend, x)",
        "import torch.distributed as dist\ndist.batch_isend_irecv([dist.P2POp(a, b, 1)])",
        "import torch.distributed as dist\ndist.all_to_all_single(x, y)",
        "import torch.distributed as dist\ndist.monitored_barrier()",
        "import torch.distributed as dist\ndist.scatter_object_list(x, y)",
        "import torch.distributed.nn\ntorch.distributed.nn.all_reduce(x)",
        "from torch.distributed.nn import functional as F\nF.all_gather(x)",
        "import torch.distributed._functional_collectives as fc\nfc.reduce_scatter_tensor(x)",
        "from torch.distributed.distributed_c10d import _all_gather_base",
        "import torch\ntorch.ops._c10d_functional.all_reduce(x, 'sum', '0')",
        "import torch\ntorch.ops.c10d.allreduce_([x], g, op)",
        "group.allreduce([x])",
        "group.barrier()",
    ],
)
def test_planted_collectives_are_found(source: str) -> None:
    assert collectives(source)


def test_other_names_are_no_collectives() -> None:
    source = """
import torch, torch.distributed as dist
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.checkpoint import FileSystemReader, load
from megatron_asvr.parallel.collectives import all_reduce_sum, gather_objects
x = torch.zeros(2).scatter(0, i, y).gather(0, i)
all_reduce_sum(x, group=dist.group.WORLD); gather_objects(dist.get_rank(), group=None)
parameter.allreduce = False; connection.send(x); dist.get_process_group_ranks(g); x.all()
"""
    assert collectives(source) == []
