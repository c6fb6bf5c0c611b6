"""Write the table of ``platforms/ledger.py`` into docs/gpu.md.

``tests/unit/test_ledger.py`` fails when the page is out of date.
"""

from pathlib import Path

from megatron_asvr.platforms.ledger import ROWS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- ledger: begin -->\n", "<!-- ledger: end -->\n"
INTRODUCTION = """*Written by `make docs` from
`megatron_asvr/platforms/ledger.py`; change it there.*
A branch by the kind of device anywhere else in the package fails `tests/unit/test_ledger.py`.
"""


def table() -> str:
    """The ledger in Markdown."""
    lines = ["| what | CUDA | CPU | why | test on the CPU | probes | probes last ran |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in ROWS:
        file, _, name = row.contract.partition("::")
        probes = ", ".join(f"`{name}`" for name in row.probes)
        test = f"`{file}`: {name.rpartition('::')[2].removeprefix('test_').replace('_', ' ')}"
        cells = (row.name, row.cuda, row.cpu, row.why, test, probes, row.ran)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with the table as it should be.

    Args:
        text: of the page, with both marks.
    """
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}{INTRODUCTION}\n{table()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
